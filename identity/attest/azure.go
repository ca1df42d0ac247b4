package attest

import (
	"bytes"
	"context"
	"crypto/subtle"
	"crypto/x509"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/smallstep/pkcs7"

	"github.com/berthd/berth/wire"
)

// maxAzureSignature is in bytes; real ones have some 4300.
const maxAzureSignature = 32 << 10

// AzureDomains are the names of Azure's metadata services: the public cloud, US Government, China and
// Germany. They are all there is to tell Azure from any other holder of a web certificate.
func AzureDomains() []string {
	return []string{"metadata.azure.com", "metadata.azure.us", "metadata.azure.cn", "metadata.microsoftazure.de"}
}

// AzureConfig says whom an [Azure] believes.
type AzureConfig struct {
	// Domains are the names that a signer may have, or be below of; empty means [AzureDomains].
	Domains []string
	// Certificates are CAs of an operator's own, beside the embedded ones. The self-signed are roots, the
	// others intermediates.
	Certificates []*x509.Certificate
	// Now is the clock; nil is the real one.
	Now func() time.Time
}

// Azure verifies attested documents of Azure's instance metadata service.
//
// They are signed with ordinary web certificates, so what counts is the signer's name, and a chain to
// one of the roots at the time of this machine's clock. Intermediates that are not known are fetched
// from where the certificates say, but only from hosts of Microsoft and DigiCert.
type Azure struct {
	domains       []string
	roots         *x509.CertPool
	intermediates *x509.CertPool
	// known are the intermediates, to see which is an issuer's.
	known   []*x509.Certificate
	pins    []Pin
	clock   clock
	issuers *issuers
}

// NewAzure returns a verifier that knows Azure's roots and the intermediates of today.
func NewAzure(config AzureConfig) (*Azure, error) {
	a := &Azure{
		domains: config.Domains, clock: config.Now, issuers: newIssuers(),
		roots: x509.NewCertPool(), intermediates: x509.NewCertPool(),
	}
	if len(a.domains) == 0 {
		a.domains = AzureDomains()
	}
	for _, file := range []string{"azure/roots.pem", "azure/intermediates.pem"} {
		certs, err := embeddedCertificates(file)
		if err != nil {
			return nil, err
		}
		a.trust(certs...)
	}
	for _, cert := range config.Certificates {
		if !cert.IsCA {
			return nil, fmt.Errorf("cannot trust the certificate of %q for Azure documents: it is no CA", cert.Subject)
		}
	}
	a.trust(config.Certificates...)
	return a, nil
}

// trust adds CAs: the self-signed as roots.
func (a *Azure) trust(certs ...*x509.Certificate) {
	for _, cert := range certs {
		if bytes.Equal(cert.RawIssuer, cert.RawSubject) && cert.CheckSignatureFrom(cert) == nil {
			a.roots.AddCert(cert)
		} else {
			a.intermediates.AddCert(cert)
			a.known = append(a.known, cert)
		}
		a.pins = append(a.pins, Pin{cert.Subject.CommonName, cert.NotAfter})
	}
}

// Pins are the CAs that are known, those that are over left out.
func (a *Azure) Pins() []Pin {
	now := a.clock.now()
	return slices.DeleteFunc(slices.Clone(a.pins), func(p Pin) bool { return p.Ends.Before(now) })
}

// AzureProof is what an Azure machine sends.
type AzureProof struct {
	// Signature is base64 PKCS#7, as the metadata service gives it, and Encoding says so: "pkcs7".
	Signature, Encoding string
	// Nonce must be in the document; empty means that any will do.
	Nonce string
}

// Verify checks that the document was signed by Azure's metadata service and is not over. It may fetch
// certificates, for a few seconds.
func (a *Azure) Verify(ctx context.Context, proof AzureProof) (instance Instance, err error) {
	defer recovered(&instance, &err)
	if instance, err = a.verify(ctx, proof); err != nil {
		return Instance{}, fmt.Errorf("cannot verify Azure identity: %w", err)
	}
	return instance, nil
}

func (a *Azure) verify(ctx context.Context, proof AzureProof) (Instance, error) {
	if len(proof.Signature) > maxAzureSignature {
		return Instance{}, fmt.Errorf("signature of %d bytes (limit %d)", len(proof.Signature), maxAzureSignature)
	}
	if !strings.EqualFold(proof.Encoding, "pkcs7") {
		return Instance{}, fmt.Errorf("encoding %q is not pkcs7", proof.Encoding)
	}
	p7, err := openEnvelope(proof.Signature, false)
	if err != nil {
		return Instance{}, err
	}
	// The signer is the certificate that the signature names, not the first one.
	leaf := p7.GetOnlySigner()
	if leaf == nil {
		return Instance{}, errors.New("the certificate of the one signer is not there")
	}
	if err := p7.Verify(); err != nil {
		return Instance{}, err
	}
	domain, region, err := a.signerName(leaf)
	if err != nil {
		return Instance{}, err
	}
	chain, err := a.chain(ctx, leaf, p7.Certificates)
	if err != nil {
		return Instance{}, err
	}
	if err := allUsed(p7, chain); err != nil {
		return Instance{}, err
	}
	instance, nonce, err := parseAzureDocument(p7.Content, a.clock.now())
	if err != nil {
		return Instance{}, fmt.Errorf("document: %w", err)
	}
	if proof.Nonce != "" && subtle.ConstantTimeCompare([]byte(nonce), []byte(proof.Nonce)) != 1 {
		return Instance{}, fmt.Errorf("the document answers nonce %q, not the challenge", nonce)
	}
	instance.Region, instance.Partition = region, domain
	// There is but one encoding, so this is the same for the same signature.
	instance.Payload = payloadHash(p7.Content, leaf.Raw)
	return instance, nil
}

// signerName finds the domain that a certificate speaks for. The region is what stands before it in a
// name with one label more.
func (a *Azure) signerName(leaf *x509.Certificate) (domain, region string, err error) {
	if leaf.IsCA || !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth) {
		return "", "", errors.New("the signer's certificate is not one of a server")
	}
	for _, name := range leaf.DNSNames {
		name = strings.ToLower(name)
		for _, d := range a.domains {
			below, ok := strings.CutSuffix(name, "."+d)
			if name != d && (!ok || below == "") {
				continue
			}
			domain = d
			if ok && !strings.ContainsAny(below, ".*") {
				return domain, below, nil
			}
		}
	}
	if domain == "" {
		return "", "", fmt.Errorf("the signer is %q, not Azure's metadata service", leaf.DNSNames)
	}
	return domain, "", nil
}

// allUsed refuses certificates in the envelope that had no part: nobody has signed for them.
func allUsed(p7 *pkcs7.PKCS7, chain []*x509.Certificate) error {
	seen := map[string]bool{}
	for _, cert := range p7.Certificates {
		if seen[string(cert.Raw)] || !slices.ContainsFunc(chain, cert.Equal) {
			return fmt.Errorf("a certificate of %q that is no part of the signer's chain", cert.Subject)
		}
		seen[string(cert.Raw)] = true
	}
	return nil
}

// maxFetched is how many issuers are fetched for one document. Azure's chains have one or two.
const maxFetched = 3

// chain finds the way from the signer to a root, at the time of the clock. Time of signing in the
// envelope is the sender's word.
func (a *Azure) chain(ctx context.Context, leaf *x509.Certificate, sent []*x509.Certificate) ([]*x509.Certificate, error) {
	options := x509.VerifyOptions{
		Roots: a.roots, Intermediates: a.intermediates.Clone(), CurrentTime: a.clock.now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	known := slices.Concat(sent, a.known)
	for _, cert := range sent {
		options.Intermediates.AddCert(cert)
	}
	chains, err := leaf.Verify(options)
	top := leaf
	for range maxFetched {
		var unknown x509.UnknownAuthorityError
		if err == nil || !errors.As(err, &unknown) {
			break
		}
		// What is missing is above the last one that is there.
		for range len(known) {
			i := slices.IndexFunc(known, func(c *x509.Certificate) bool { return issued(c, top) })
			if i < 0 {
				break
			}
			top = known[i]
		}
		issuer, fetchErr := a.issuers.of(ctx, top)
		if fetchErr != nil {
			return nil, fmt.Errorf("%w; %w", err, fetchErr)
		}
		options.Intermediates.AddCert(issuer)
		known = append(known, issuer)
		chains, err = leaf.Verify(options)
	}
	if err != nil {
		return nil, err
	}
	return slices.Concat(chains...), nil
}

// issued tells whether ca signed cert, and is not itself that.
func issued(ca, cert *x509.Certificate) bool {
	return bytes.Equal(ca.RawSubject, cert.RawIssuer) && !bytes.Equal(ca.RawSubject, cert.RawSubject) && cert.CheckSignatureFrom(ca) == nil
}

// azureTime is how a document writes times. In it "-0000" is UTC.
const azureTime = "01/02/06 15:04:05 -0700"

var azureVMID = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// parseAzureDocument reads signed content.
func parseAzureDocument(text []byte, now time.Time) (instance Instance, nonce string, err error) {
	members, err := parseObject(text)
	if err != nil {
		return Instance{}, "", err
	}
	stamp, err := members.object("timeStamp")
	if err != nil {
		return Instance{}, "", err
	}
	var id, account, created, expires string
	for _, field := range []struct {
		from object
		name string
		into *string
	}{
		{members, "vmId", &id}, {members, "subscriptionId", &account}, {members, "nonce", &nonce},
		{stamp, "createdOn", &created}, {stamp, "expiresOn", &expires},
	} {
		if *field.into, err = field.from.text(field.name); err != nil {
			return Instance{}, "", err
		}
	}
	id = strings.ToLower(id)
	if !azureVMID.MatchString(id) {
		return Instance{}, "", fmt.Errorf("vmId %q is not one", id)
	}
	instance = Instance{Provider: wire.ProviderAzure, ID: id, Account: strings.ToLower(account)}
	if instance.Issued, err = time.Parse(azureTime, created); err != nil {
		return Instance{}, "", fmt.Errorf("createdOn: %w", err)
	}
	if instance.Expires, err = time.Parse(azureTime, expires); err != nil {
		return Instance{}, "", fmt.Errorf("expiresOn: %w", err)
	}
	switch {
	case instance.Issued.After(now.Add(futureSkew)):
		return Instance{}, "", fmt.Errorf("made at %s, in the future; is this machine's clock right?", created)
	case !now.Before(instance.Expires.Add(expirySkew)):
		return Instance{}, "", fmt.Errorf("over since %s", expires)
	}
	instance.Issued, instance.Expires = instance.Issued.UTC(), instance.Expires.UTC()
	return instance, nonce, nil
}
