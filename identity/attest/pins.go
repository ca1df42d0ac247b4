package attest

import (
	"crypto/rsa"
	"crypto/x509"
	"embed"
	"encoding/pem"
	"errors"
	"fmt"
	"time"
)

// certs/aws1024/<region>.pem and certs/aws2048/<region>.pem are the certificates that AWS publishes
// for the "signature" and the "rsa2048" of identity documents of that region. certs/azure holds the
// roots that Azure's metadata service is known to chain to, and the intermediates between; those that
// are over are there for documents of their time, and prove nothing now.
//
//go:embed certs
var embedded embed.FS

// ParseCertificates reads a PEM file of certificates; it must hold one at least, and nothing else.
func ParseCertificates(text []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("holds a %s, not only certificates", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(certs)+1, err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, errors.New("holds no certificate in PEM")
	}
	return certs, nil
}

func embeddedCertificates(file string) ([]*x509.Certificate, error) {
	text, err := embedded.ReadFile("certs/" + file)
	if err != nil {
		return nil, fmt.Errorf("cannot read the certificates of this program: %w", err)
	}
	certs, err := ParseCertificates(text)
	if err != nil {
		return nil, fmt.Errorf("cannot use %s: %w", file, err)
	}
	return certs, nil
}

// Pin is a certificate that a verifier trusts without asking anybody.
type Pin struct {
	// Name says which it is, such as "rsa2048 of eu-central-1" or the subject of a CA.
	Name string
	// Ends is when it is over. AWS's are matched by key and go on after that, but it is when a new key is
	// to be looked for; without a CA of Azure nobody can be let in.
	Ends time.Time
}

func rsaKey(cert *x509.Certificate) (*rsa.PublicKey, error) {
	key, ok := cert.PublicKey.(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("its key is %s, not RSA", cert.PublicKeyAlgorithm)
	}
	return key, nil
}
