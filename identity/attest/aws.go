package attest

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"embed"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"strings"
	"time"
)

// certs/aws/<region>.pem is the certificate that AWS publishes for the "signature" of instance
// identity documents of that region.
//
//go:embed certs/aws/*.pem
var awsCerts embed.FS

// Limits in bytes. A document has about 500, a base64 signature with line breaks 175 (512 for an
// RSA-2048 key of an operator's own).
const (
	maxAWSDocument  = 16 << 10
	maxAWSSignature = 4 << 10
)

// awsInstanceID is the form of all EC2 instance ids: 8 digits until 2016, 17 since.
var awsInstanceID = regexp.MustCompile(`^i-[0-9a-f]{8,17}$`)

// AWS verifies EC2 instance identity documents.
type AWS struct {
	regions map[string]*rsa.PublicKey
	extra   []*rsa.PublicKey
}

// NewAWS returns a verifier that knows the published key of every region.
//
// The extra certificates vouch for regions without a published key here: a region newer than this
// program, or a stand-in for AWS. They never vouch for a region that has one, because partitions
// such as China or the European Sovereign Cloud have operators of their own and a key of one must
// not speak for another. An extra certificate must hold an RSA key; it is matched by key, and its
// dates are not checked: AWS lets certificates run out and reissues them with the same key.
func NewAWS(extra ...*x509.Certificate) (*AWS, error) {
	a := &AWS{regions: map[string]*rsa.PublicKey{}}
	files, err := awsCerts.ReadDir("certs/aws")
	if err != nil {
		return nil, fmt.Errorf("cannot list the AWS certificates: %w", err)
	}
	for _, f := range files {
		text, err := awsCerts.ReadFile(path.Join("certs/aws", f.Name()))
		if err != nil {
			return nil, fmt.Errorf("cannot read an AWS certificate: %w", err)
		}
		block, _ := pem.Decode(text)
		if block == nil {
			return nil, fmt.Errorf("cannot read AWS certificate %s: not PEM", f.Name())
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("cannot parse AWS certificate %s: %w", f.Name(), err)
		}
		key, err := rsaKey(cert)
		if err != nil {
			return nil, fmt.Errorf("cannot use AWS certificate %s: %w", f.Name(), err)
		}
		a.regions[strings.TrimSuffix(f.Name(), ".pem")] = key
	}
	for _, cert := range extra {
		key, err := rsaKey(cert)
		if err != nil {
			return nil, fmt.Errorf("cannot trust certificate of %q for AWS documents: %w", cert.Subject, err)
		}
		a.extra = append(a.extra, key)
	}
	return a, nil
}

func rsaKey(cert *x509.Certificate) (*rsa.PublicKey, error) {
	key, ok := cert.PublicKey.(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("its key is %s, not RSA", cert.PublicKeyAlgorithm)
	}
	return key, nil
}

// Verify checks that signature, base64 as the metadata service gave it, is AWS's over the exact
// bytes of document, with the key of the region that the document names.
func (a *AWS) Verify(signature, document string) (Instance, error) {
	if len(document) > maxAWSDocument || len(signature) > maxAWSSignature {
		return Instance{}, fmt.Errorf("cannot verify AWS identity: document of %d bytes (limit %d), signature of %d (limit %d)",
			len(document), maxAWSDocument, len(signature), maxAWSSignature)
	}
	// Base64 comes in lines of 76, whose ends this decoder skips; everything else must be canonical.
	raw, err := base64.StdEncoding.Strict().DecodeString(signature)
	if err != nil {
		return Instance{}, fmt.Errorf("cannot verify AWS identity: signature is not base64: %w", err)
	}
	// The region has to be read before the signature can be checked, since it selects the key: a
	// forged one selects a key that then does not fit. Nothing else is believed until it does.
	doc, err := parseAWSDocument([]byte(document))
	if err != nil {
		return Instance{}, fmt.Errorf("cannot verify AWS identity: %w", err)
	}
	if err := a.check(doc.region, []byte(document), raw); err != nil {
		return Instance{}, fmt.Errorf("cannot verify AWS identity: %w", err)
	}
	return doc.instance()
}

func (a *AWS) check(region string, document, signature []byte) error {
	sum := sha256.Sum256(document)
	keys := a.extra
	if key, ok := a.regions[region]; ok {
		keys = []*rsa.PublicKey{key}
	}
	if len(keys) == 0 {
		return fmt.Errorf("no certificate for region %q", region)
	}
	for _, key := range keys {
		if rsa.VerifyPKCS1v15(key, crypto.SHA256, sum[:], signature) == nil {
			return nil
		}
	}
	return fmt.Errorf("signature does not fit the document and the key of region %q", region)
}

// awsDocument holds the members of a document as they stand there, not yet believed.
type awsDocument struct {
	region, id, account, pending string
}

// parseAWSDocument reads one JSON object. It takes names exactly and each only once, unlike
// encoding/json into a struct, so that nobody else can read another id from the same bytes.
func parseAWSDocument(text []byte) (awsDocument, error) {
	dec := json.NewDecoder(bytes.NewReader(text))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return awsDocument{}, errors.New("document is not a JSON object")
	}
	var doc awsDocument
	fields := map[string]*string{
		"region": &doc.region, "instanceId": &doc.id, "accountId": &doc.account, "pendingTime": &doc.pending,
	}
	seen := map[string]bool{}
	for dec.More() {
		token, err := dec.Token()
		if err != nil {
			return awsDocument{}, fmt.Errorf("document is not JSON: %w", err)
		}
		name, _ := token.(string) // More and a Token without error leave nothing but a name here
		folded := strings.ToLower(name)
		if seen[folded] {
			return awsDocument{}, fmt.Errorf("document holds %q twice", name)
		}
		seen[folded] = true
		var value any
		target := any(&value)
		if field, ok := fields[name]; ok {
			target = field
		}
		if err := dec.Decode(target); err != nil {
			return awsDocument{}, fmt.Errorf("document member %q: %w", name, err)
		}
	}
	if _, err := dec.Token(); err != nil {
		return awsDocument{}, fmt.Errorf("document is not JSON: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return awsDocument{}, errors.New("document goes on after its JSON object")
	}
	return doc, nil
}

// instance gives meaning to a document whose signature was verified.
func (d awsDocument) instance() (Instance, error) {
	if !awsInstanceID.MatchString(d.id) {
		return Instance{}, fmt.Errorf("cannot use AWS identity: instanceId %q is not one", d.id)
	}
	started, err := time.Parse(time.RFC3339, d.pending)
	if err != nil {
		return Instance{}, fmt.Errorf("cannot use AWS identity: pendingTime: %w", err)
	}
	return Instance{Provider: "aws", ID: d.id, Account: d.account, Region: d.region, Started: started}, nil
}
