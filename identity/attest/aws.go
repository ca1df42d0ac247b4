package attest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"path"
	"regexp"
	"strings"
	"time"

	"github.com/berthd/berth/wire"
)

// Limits in bytes. A document has about 500, a base64 signature with line breaks 175 (512 for an
// RSA-2048 key of an operator's own), and PKCS#7 in base64 some 1500.
const (
	maxAWSDocument  = 16 << 10
	maxAWSSignature = 16 << 10
	// maxRawSignature is where a signature ends and PKCS#7 begins: RSA keys of AWS have 128 bytes, and
	// PKCS#7 holds the document, too.
	maxRawSignature = 512
)

// awsInstanceID is the form of all EC2 instance ids: 8 digits until 2016, 17 since.
var awsInstanceID = regexp.MustCompile(`^i-[0-9a-f]{8,17}$`)

// AWSConfig says whom an [AWS] believes beside AWS.
type AWSConfig struct {
	// Certificates vouch for documents of the region they are listed for, beside the published ones: of
	// a region or a key newer than this program, or of a stand-in for AWS. They never vouch for another
	// region, because partitions such as China have operators of their own. They must hold RSA keys.
	Certificates map[string][]*x509.Certificate
	// Now is the clock; nil is the real one.
	Now func() time.Time
}

// AWS verifies EC2 instance identity documents.
//
// Certificates are matched by key, and their dates are not looked at: AWS lets them run out and
// reissues them with the same key.
type AWS struct {
	regions map[string][]*x509.Certificate
	pins    []Pin
	clock   clock
}

// NewAWS returns a verifier that knows the published keys of every region.
func NewAWS(config AWSConfig) (*AWS, error) {
	a := &AWS{regions: map[string][]*x509.Certificate{}, clock: config.Now}
	add := func(region, what string, certs ...*x509.Certificate) error {
		for _, cert := range certs {
			if _, err := rsaKey(cert); err != nil {
				return fmt.Errorf("cannot trust the certificate of %q for AWS documents of %s: %w", cert.Subject, region, err)
			}
			a.regions[region] = append(a.regions[region], cert)
			a.pins = append(a.pins, Pin{what + " of " + region, cert.NotAfter})
		}
		return nil
	}
	for _, kind := range []struct{ dir, name string }{{"aws1024", "signature"}, {"aws2048", "rsa2048"}} {
		files, err := embedded.ReadDir("certs/" + kind.dir)
		if err != nil {
			return nil, fmt.Errorf("cannot list the AWS certificates: %w", err)
		}
		for _, f := range files {
			certs, err := embeddedCertificates(path.Join(kind.dir, f.Name()))
			if err != nil {
				return nil, err
			}
			if err := add(strings.TrimSuffix(f.Name(), ".pem"), kind.name, certs...); err != nil {
				return nil, err
			}
		}
	}
	for region, certs := range config.Certificates {
		if err := add(region, "own certificate", certs...); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// Pins are the certificates that are trusted.
func (a *AWS) Pins() []Pin { return a.pins }

// AWSProof is what an EC2 instance sends. All but Document is base64 as the metadata service gives it.
type AWSProof struct {
	// Document is the exact text that was signed.
	Document string
	// Signature is the RSA signature over it. PKCS#7 around the same document is taken here, too.
	Signature string
	// RSA2048 is PKCS#7 around the same document, or empty. When it is there, both must be good.
	RSA2048 string
}

// Verify checks that every signature there is was made over the exact bytes of the document, with a
// key of the region that the document names.
func (a *AWS) Verify(_ context.Context, proof AWSProof) (instance Instance, err error) {
	defer recovered(&instance, &err)
	if len(proof.Document) > maxAWSDocument || len(proof.Signature)+len(proof.RSA2048) > maxAWSSignature {
		return Instance{}, fmt.Errorf("cannot verify AWS identity: document of %d bytes (limit %d), signatures of %d (limit %d)",
			len(proof.Document), maxAWSDocument, len(proof.Signature)+len(proof.RSA2048), maxAWSSignature)
	}
	document := []byte(proof.Document)
	// The region has to be read before a signature can be checked, since it selects the key: a forged
	// one selects a key that then does not fit. Nothing else is believed until it does.
	doc, err := parseAWSDocument(document)
	if err != nil {
		return Instance{}, fmt.Errorf("cannot verify AWS identity: %w", err)
	}
	certs := a.regions[doc.region]
	if len(certs) == 0 {
		return Instance{}, fmt.Errorf("cannot verify AWS identity: no certificate for region %q", doc.region)
	}
	if err := checkAWSSignature(certs, document, proof.Signature); err != nil {
		return Instance{}, fmt.Errorf("cannot verify AWS identity: signature, by the keys of region %q: %w", doc.region, err)
	}
	if proof.RSA2048 != "" {
		if err := checkAWSEnvelope(certs, document, proof.RSA2048); err != nil {
			return Instance{}, fmt.Errorf("cannot verify AWS identity: rsa2048, by the keys of region %q: %w", doc.region, err)
		}
	}
	if instance, err = doc.instance(a.clock.now()); err != nil {
		return Instance{}, fmt.Errorf("cannot use AWS identity: %w", err)
	}
	instance.Payload = payloadHash(document)
	return instance, nil
}

func checkAWSSignature(certs []*x509.Certificate, document []byte, signature string) error {
	// Base64 comes in lines of 76, whose ends this decoder skips; everything else must be canonical.
	raw, err := base64.StdEncoding.Strict().DecodeString(signature)
	if err != nil {
		return fmt.Errorf("not base64: %w", err)
	}
	if len(raw) > maxRawSignature {
		return checkAWSEnvelope(certs, document, signature)
	}
	sum := sha256.Sum256(document)
	for _, cert := range certs {
		if key, err := rsaKey(cert); err == nil && rsa.VerifyPKCS1v15(key, crypto.SHA256, sum[:], raw) == nil {
			return nil
		}
	}
	return errors.New("does not fit the document")
}

func checkAWSEnvelope(certs []*x509.Certificate, document []byte, text string) error {
	p7, err := openEnvelope(text, true)
	if err != nil {
		return err
	}
	if len(p7.Certificates) > 0 {
		return errors.New("certificates inside, which AWS does not send")
	}
	for _, cert := range certs {
		trusted := *cert
		// The library would compare the time of signing with these, which mean nothing here.
		trusted.NotBefore, trusted.NotAfter = time.Time{}, time.Unix(1<<40, 0)
		p7.Certificates = append(p7.Certificates, &trusted)
	}
	if err := p7.Verify(); err != nil {
		return err
	}
	if !bytes.Equal(p7.Content, document) {
		return errors.New("signs another document")
	}
	return nil
}

// awsDocument holds the members of a document as they stand there, not yet believed.
type awsDocument struct {
	region, zone, id, account, pending string
}

func parseAWSDocument(text []byte) (awsDocument, error) {
	members, err := parseObject(text)
	if err != nil {
		return awsDocument{}, fmt.Errorf("document: %w", err)
	}
	var doc awsDocument
	for name, field := range map[string]*string{
		"region": &doc.region, "availabilityZone": &doc.zone, "instanceId": &doc.id, "accountId": &doc.account, "pendingTime": &doc.pending,
	} {
		if *field, err = members.text(name); err != nil {
			return awsDocument{}, fmt.Errorf("document: %w", err)
		}
	}
	return doc, nil
}

// instance gives meaning to a document whose signature was verified.
func (d awsDocument) instance(now time.Time) (Instance, error) {
	if !awsInstanceID.MatchString(d.id) {
		return Instance{}, fmt.Errorf("instanceId %q is not one", d.id)
	}
	started, err := time.Parse(time.RFC3339, d.pending)
	if err != nil {
		return Instance{}, fmt.Errorf("pendingTime: %w", err)
	}
	if started.After(now.Add(futureSkew)) {
		return Instance{}, fmt.Errorf("pendingTime %s is in the future; is this machine's clock right?", d.pending)
	}
	return Instance{
		Provider: wire.ProviderAWS, ID: d.id, Account: d.account, Region: d.region, Zone: d.zone, Partition: awsPartition(d.region), Issued: started,
	}, nil
}

// awsPartition names the partition of a region.
func awsPartition(region string) string {
	for _, p := range []struct{ prefix, name string }{{"cn-", "aws-cn"}, {"us-gov-", "aws-us-gov"}, {"eusc-", "aws-eusc"}, {"us-iso", "aws-iso"}} {
		if strings.HasPrefix(region, p.prefix) {
			return p.name
		}
	}
	return "aws"
}
