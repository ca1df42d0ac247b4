package testnet

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"fmt"
	"strings"
	"time"
)

// AWSSigner signs instance identity documents as a region of AWS does, with keys of its own.
type AWSSigner struct {
	short, long       *x509.Certificate
	shortKey, longKey *rsa.PrivateKey
}

// NewAWSSigner makes the keys of a region.
func NewAWSSigner() (*AWSSigner, error) {
	s := new(AWSSigner)
	var err error
	// The lengths of AWS's own keys.
	if s.short, s.shortKey, err = issue(1024, awsCertificate(), nil, nil); err != nil {
		return nil, fmt.Errorf("cannot make a key for the fake AWS: %w", err)
	}
	if s.long, s.longKey, err = issue(2048, awsCertificate(), nil, nil); err != nil {
		return nil, fmt.Errorf("cannot make a key for the fake AWS: %w", err)
	}
	return s, nil
}

func awsCertificate() *x509.Certificate {
	now := time.Now().UTC()
	return &x509.Certificate{
		Subject:   pkix.Name{Country: []string{"US"}, Organization: []string{"Fake Web Services"}},
		NotBefore: now.Add(-time.Hour), // clocks differ
		NotAfter:  now.AddDate(10, 0, 0),
	}
}

// Certificates verify what is signed; a server that shall believe this signer trusts both.
func (s *AWSSigner) Certificates() []*x509.Certificate { return []*x509.Certificate{s.short, s.long} }

// Sign returns what the metadata service serves as "signature" and as "rsa2048": base64 in lines.
func (s *AWSSigner) Sign(document string) (signature, rsa2048 string, err error) {
	sum := sha256.Sum256([]byte(document))
	raw, err := rsa.SignPKCS1v15(nil, s.shortKey, crypto.SHA256, sum[:])
	if err != nil {
		return "", "", fmt.Errorf("cannot sign for the fake AWS: %w", err)
	}
	envelope, err := signAWS([]byte(document), s.long, s.longKey, time.Now())
	if err != nil {
		return "", "", fmt.Errorf("cannot sign for the fake AWS: %w", err)
	}
	return lines76(base64.StdEncoding.EncodeToString(raw)), lines76(base64.StdEncoding.EncodeToString(envelope)), nil
}

func lines76(s string) string {
	var lines []string
	for len(s) > 76 {
		lines, s = append(lines, s[:76]), s[76:]
	}
	return strings.Join(append(lines, s), "\n")
}
