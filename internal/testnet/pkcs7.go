package testnet

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"time"
)

// Object identifiers of PKCS#7 (RFC 2315, 6211) and of what it is made with.
var (
	oidData          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}
	oidSignedData    = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}
	oidContentType   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 3}
	oidMessageDigest = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}
	oidSigningTime   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 5}
	oidProtection    = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 52}
	oidSHA256        = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}
	oidRSA           = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}
	oidSHA256WithRSA = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}
)

type (
	contentInfo struct {
		Type    asn1.ObjectIdentifier
		Content any `asn1:"explicit,tag:0"`
	}
	signedData struct {
		Version      int
		Digests      []pkix.AlgorithmIdentifier `asn1:"set"`
		Content      contentInfo
		Certificates asn1.RawValue `asn1:"optional"`
		Signers      []signerInfo  `asn1:"set"`
	}
	signerInfo struct {
		Version    int
		Issuer     issuerAndSerial
		Digest     pkix.AlgorithmIdentifier
		Attributes asn1.RawValue `asn1:"optional"`
		Algorithm  pkix.AlgorithmIdentifier
		Signature  []byte
	}
	issuerAndSerial struct {
		Issuer asn1.RawValue
		Serial *big.Int
	}
	attribute struct {
		Type   asn1.ObjectIdentifier
		Values []any `asn1:"set"`
	}
	// algorithmProtection is the value of an attribute that says which algorithms are meant.
	algorithmProtection struct {
		Digest    pkix.AlgorithmIdentifier
		Signature pkix.AlgorithmIdentifier `asn1:"tag:1"`
	}
)

func algorithm(oid asn1.ObjectIdentifier) pkix.AlgorithmIdentifier {
	return pkix.AlgorithmIdentifier{Algorithm: oid, Parameters: asn1.NullRawValue}
}

// signAzure makes PKCS#7 in the shape of Azure's: the content and the one certificate inside, no signed
// attributes, and a signature algorithm where the name of the digest belongs.
func signAzure(content []byte, cert *x509.Certificate, key *rsa.PrivateKey) ([]byte, error) {
	sum := sha256.Sum256(content)
	signature, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, sum[:])
	if err != nil {
		return nil, err
	}
	return marshalSigned(content, []*x509.Certificate{cert}, signerInfo{
		Issuer:    issuerAndSerial{asn1.RawValue{FullBytes: cert.RawIssuer}, cert.SerialNumber},
		Digest:    algorithm(oidSHA256WithRSA),
		Algorithm: algorithm(oidRSA),
		Signature: signature,
	})
}

// signAWS makes PKCS#7 as AWS does: the content inside, signed attributes, and no certificate. AWS
// writes the outer parts with indefinite lengths; here all lengths are definite.
func signAWS(content []byte, cert *x509.Certificate, key *rsa.PrivateKey, at time.Time) ([]byte, error) {
	sum := sha256.Sum256(content)
	protection := algorithmProtection{algorithm(oidSHA256), algorithm(oidSHA256WithRSA)}
	attributes, err := asn1.MarshalWithParams([]attribute{
		{oidContentType, []any{oidData}},
		{oidSigningTime, []any{at.UTC()}},
		{oidProtection, []any{protection}},
		{oidMessageDigest, []any{sum[:]}},
	}, "set")
	if err != nil {
		return nil, fmt.Errorf("cannot encode the attributes: %w", err)
	}
	// What is signed is the SET; what is sent has the tag of its place.
	signedSum := sha256.Sum256(attributes)
	signature, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, signedSum[:])
	if err != nil {
		return nil, err
	}
	attributes[0] = 0xa0
	return marshalSigned(content, nil, signerInfo{
		Issuer:     issuerAndSerial{asn1.RawValue{FullBytes: cert.RawIssuer}, cert.SerialNumber},
		Digest:     algorithm(oidSHA256),
		Attributes: asn1.RawValue{FullBytes: attributes},
		Algorithm:  algorithm(oidSHA256WithRSA),
		Signature:  signature,
	})
}

func marshalSigned(content []byte, certs []*x509.Certificate, signers ...signerInfo) ([]byte, error) {
	data := signedData{Version: 1, Content: contentInfo{oidData, content}, Signers: signers}
	for i := range signers {
		signers[i].Version = 1
		data.Digests = []pkix.AlgorithmIdentifier{signers[i].Digest}
	}
	if len(certs) > 0 {
		var all []byte
		for _, cert := range certs {
			all = append(all, cert.Raw...)
		}
		data.Certificates = asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: all}
	}
	return asn1.Marshal(contentInfo{oidSignedData, data})
}

// issue makes a certificate for a new RSA key, signed by a parent or, without one, by itself.
func issue(bits int, template *x509.Certificate, parent *x509.Certificate, parentKey *rsa.PrivateKey) (*x509.Certificate, *rsa.PrivateKey, error) {
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		return nil, nil, err
	}
	cert, err := certify(key, template, parent, parentKey)
	return cert, key, err
}

// certify makes a certificate for a key.
func certify(key *rsa.PrivateKey, template *x509.Certificate, parent *x509.Certificate, parentKey *rsa.PrivateKey) (*x509.Certificate, error) {
	serial := make([]byte, 16)
	rand.Read(serial)
	serial[0] &= 0x7f // a serial number is positive
	template.SerialNumber = new(big.Int).SetBytes(serial)
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}
