package testnet

import (
	"cmp"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"time"
)

// AzureLeaf says what the certificate of an [AzureSigner] holds. The zero value is like Azure's.
type AzureLeaf struct {
	// Names are its DNS names; none means those of a metadata service in the region "berthlocal".
	Names []string
	// CommonName is metadata.azure.com by default; nothing should look at it.
	CommonName string
	// NotBefore and NotAfter are an hour ago and in 180 days by default.
	NotBefore, NotAfter time.Time
	// Usage is serverAuth by default.
	Usage []x509.ExtKeyUsage
	// IssuerURLs are where the certificate says that its issuer's can be had.
	IssuerURLs []string
}

// AzureSigner signs attested documents as Azure does, with a chain of its own: a root, an issuing CA
// and a leaf.
type AzureSigner struct {
	root, issuing, leaf          *x509.Certificate
	rootKey, issuingKey, leafKey *rsa.PrivateKey
}

// NewAzureSigner makes the keys and certificates of a chain.
func NewAzureSigner(leaf AzureLeaf) (*AzureSigner, error) {
	now := time.Now().UTC()
	ca := func(name string) *x509.Certificate {
		return &x509.Certificate{
			Subject:   pkix.Name{Organization: []string{"Fake Azure"}, CommonName: name},
			NotBefore: now.AddDate(-20, 0, 0), NotAfter: now.AddDate(10, 0, 0), // clocks of tests go back
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		}
	}
	s := new(AzureSigner)
	var err error
	if s.root, s.rootKey, err = issue(2048, ca("Fake Azure Root"), nil, nil); err != nil {
		return nil, fmt.Errorf("cannot make a root certificate: %w", err)
	}
	if s.issuing, s.issuingKey, err = issue(2048, ca("Fake Azure Issuing CA"), s.root, s.rootKey); err != nil {
		return nil, fmt.Errorf("cannot make an issuing CA: %w", err)
	}
	if s.leafKey, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		return nil, fmt.Errorf("cannot make a key: %w", err)
	}
	if err := s.Renew(leaf); err != nil {
		return nil, err
	}
	return s, nil
}

// Renew replaces the leaf by another of the same chain and key.
func (s *AzureSigner) Renew(leaf AzureLeaf) error {
	now := time.Now().UTC()
	if len(leaf.Names) == 0 {
		leaf.Names = []string{"berthlocal.metadata.azure.com", "metadata.azure.com"}
	}
	if leaf.NotBefore.IsZero() {
		leaf.NotBefore = now.Add(-time.Hour)
	}
	if leaf.NotAfter.IsZero() {
		leaf.NotAfter = now.AddDate(0, 0, 180)
	}
	if leaf.Usage == nil {
		leaf.Usage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	var err error
	s.leaf, err = certify(s.leafKey, &x509.Certificate{
		Subject:  pkix.Name{Organization: []string{"Fake Azure"}, CommonName: cmp.Or(leaf.CommonName, "metadata.azure.com")},
		DNSNames: leaf.Names, NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment, ExtKeyUsage: leaf.Usage,
		IssuingCertificateURL: leaf.IssuerURLs, BasicConstraintsValid: true,
	}, s.issuing, s.issuingKey)
	if err != nil {
		return fmt.Errorf("cannot make a leaf certificate: %w", err)
	}
	return nil
}

// Root, Issuing and Leaf are the certificates of the chain. A server that shall believe this signer
// trusts the first two.
func (s *AzureSigner) Root() *x509.Certificate    { return s.root }
func (s *AzureSigner) Issuing() *x509.Certificate { return s.issuing }
func (s *AzureSigner) Leaf() *x509.Certificate    { return s.leaf }

// Sign returns the PKCS#7 around a document in base64, as the member "signature" of the answer of
// Azure's metadata service.
func (s *AzureSigner) Sign(document string) (string, error) {
	der, err := signAzure([]byte(document), s.leaf, s.leafKey)
	if err != nil {
		return "", fmt.Errorf("cannot sign for the fake Azure: %w", err)
	}
	return base64.StdEncoding.EncodeToString(der), nil
}

// AzureDocument is what Azure attests of a machine.
type AzureDocument struct {
	VMID, SubscriptionID string
	// Nonce is the caller's; empty means the time of expiry, as in Azure.
	Nonce            string
	Created, Expires time.Time
}

// azureTime is how an attested document writes times, which are UTC.
const azureTime = "01/02/06 15:04:05 -0000"

// String returns the document as Azure signs it.
func (d AzureDocument) String() string {
	type plan struct {
		Name      string `json:"name"`
		Product   string `json:"product"`
		Publisher string `json:"publisher"`
	}
	type stamp struct {
		CreatedOn string `json:"createdOn"`
		ExpiresOn string `json:"expiresOn"`
	}
	expires := d.Expires.UTC()
	text, err := json.Marshal(struct {
		LicenseType    string `json:"licenseType"`
		Nonce          string `json:"nonce"`
		Plan           plan   `json:"plan"`
		SKU            string `json:"sku"`
		SubscriptionID string `json:"subscriptionId"`
		TimeStamp      stamp  `json:"timeStamp"`
		VMID           string `json:"vmId"`
	}{
		Nonce: cmp.Or(d.Nonce, expires.Format("20060102-150405")), SKU: "22_04-lts-gen2", SubscriptionID: d.SubscriptionID, VMID: d.VMID,
		TimeStamp: stamp{d.Created.UTC().Format(azureTime), expires.Format(azureTime)},
	})
	if err != nil {
		panic(fmt.Sprintf("testnet: an attested document cannot be encoded: %v", err)) // strings always can
	}
	return string(text)
}
