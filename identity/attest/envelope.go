package attest

import (
	"bytes"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"github.com/smallstep/pkcs7"
)

// PKCS#7 says the same in many ways, and much of it is signed by nobody: lengths, version numbers,
// names of algorithms, whole members that readers skip. openEnvelope therefore takes only the one
// encoding of the one shape that the clouds use, before the library sees it and decides about the
// signature. This also keeps from the library what has made it panic before.

var (
	oidAlgorithmProtection = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 52} // RFC 6211
	oidRSA                 = pkcs7.OIDEncryptionAlgorithmRSA
	oidSHA256              = pkcs7.OIDDigestAlgorithmSHA256
	oidSHA256WithRSA       = pkcs7.OIDEncryptionAlgorithmRSASHA256
)

// The parts of PKCS#7 that the clouds use.
type (
	contentInfo struct {
		Type    asn1.ObjectIdentifier
		Content signedData `asn1:"explicit,tag:0"`
	}
	signedData struct {
		Version      int
		Digests      []pkix.AlgorithmIdentifier `asn1:"set"`
		Content      innerContent
		Certificates asn1.RawValue `asn1:"optional,tag:0"`
		Signers      []signerInfo  `asn1:"set"`
	}
	innerContent struct {
		Type    asn1.ObjectIdentifier
		Content []byte `asn1:"explicit,tag:0"`
	}
	signerInfo struct {
		Version         int
		IssuerAndSerial issuerAndSerial
		Digest          pkix.AlgorithmIdentifier
		Attributes      []attribute `asn1:"optional,omitempty,set,tag:0"`
		Algorithm       pkix.AlgorithmIdentifier
		Signature       []byte
	}
	issuerAndSerial struct {
		Issuer asn1.RawValue
		Serial *big.Int
	}
	attribute struct {
		Type   asn1.ObjectIdentifier
		Values asn1.RawValue `asn1:"set"`
	}
	algorithmProtection struct {
		Digest    pkix.AlgorithmIdentifier
		Signature pkix.AlgorithmIdentifier `asn1:"tag:1"`
	}
)

// openEnvelope parses base64 PKCS#7 in the shape of one cloud: AWS has signed attributes and may write
// BER, Azure has none and writes DER. The signature is not checked yet.
func openEnvelope(text string, aws bool) (*pkcs7.PKCS7, error) {
	raw, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("not base64: %w", err)
	}
	return parseEnvelope(raw, aws)
}

func parseEnvelope(raw []byte, aws bool) (*pkcs7.PKCS7, error) {
	der, rest, err := toDER(raw, 0)
	switch {
	case err != nil:
		return nil, err
	case len(rest) > 0:
		return nil, errors.New("data after the envelope")
	case !aws && !bytes.Equal(der, raw):
		return nil, errors.New("not DER")
	}
	var info contentInfo
	if _, err := asn1.Unmarshal(der, &info); err != nil {
		return nil, fmt.Errorf("not PKCS#7 in the shape of this cloud: %w", err)
	}
	// What was skipped is missing now, and what could be written otherwise is.
	if again, err := asn1.Marshal(info); err != nil || !bytes.Equal(again, der) {
		return nil, errors.New("not PKCS#7 in the one encoding of the shape of this cloud")
	}
	if err := info.check(aws); err != nil {
		return nil, err
	}
	p7, err := pkcs7.Parse(der)
	if err != nil {
		return nil, err
	}
	if len(p7.Signers) != 1 || !bytes.Equal(p7.Content, info.Content.Content.Content) {
		return nil, errors.New("read in two ways")
	}
	return p7, nil
}

func (info contentInfo) check(aws bool) error {
	data := info.Content
	if len(data.Signers) != 1 || len(data.Digests) != 1 {
		return fmt.Errorf("%d signers and %d digests, where there must be one of each", len(data.Signers), len(data.Digests))
	}
	signer := data.Signers[0]
	// Azure names the algorithm of the signature where that of the digest belongs.
	digests, algorithms := []asn1.ObjectIdentifier{oidSHA256, oidSHA256WithRSA}, []asn1.ObjectIdentifier{oidRSA}
	if aws {
		if err := signer.checkAttributes(); err != nil {
			return err
		}
		digests, algorithms = digests[:1], append(algorithms, oidSHA256WithRSA)
	} else if len(signer.Attributes) > 0 {
		return errors.New("signed attributes, which this cloud does not use")
	}
	switch {
	case !info.Type.Equal(pkcs7.OIDSignedData), !data.Content.Type.Equal(pkcs7.OIDData):
		return errors.New("not signed data")
	case data.Version != 1, signer.Version != 1:
		return errors.New("not version 1")
	case len(data.Content.Content) == 0:
		return errors.New("nothing inside")
	case !sameAlgorithm(data.Digests[0], signer.Digest), !isAlgorithm(signer.Digest, digests), !isAlgorithm(signer.Algorithm, algorithms):
		return fmt.Errorf("signed by algorithms %v, %v and %v, not RSA with SHA-256",
			data.Digests[0].Algorithm, signer.Digest.Algorithm, signer.Algorithm.Algorithm)
	}
	return nil
}

// checkAttributes checks what the library does not: the type of the content, and, if it is there, the
// attribute that keeps the names of algorithms from being exchanged.
func (s signerInfo) checkAttributes() error {
	seen := map[string]bool{}
	protected := false
	for _, a := range s.Attributes {
		if seen[a.Type.String()] {
			return fmt.Errorf("attribute %v twice", a.Type)
		}
		seen[a.Type.String()] = true
		switch {
		case a.Type.Equal(pkcs7.OIDAttributeContentType):
			var content asn1.ObjectIdentifier
			if rest, err := asn1.Unmarshal(a.Values.Bytes, &content); err != nil || len(rest) > 0 || !content.Equal(pkcs7.OIDData) {
				return errors.New("the signed type of the content is not data")
			}
		case a.Type.Equal(oidAlgorithmProtection):
			var meant algorithmProtection
			if rest, err := asn1.Unmarshal(a.Values.Bytes, &meant); err != nil || len(rest) > 0 ||
				!sameAlgorithm(meant.Digest, s.Digest) || !sameAlgorithm(meant.Signature, s.Algorithm) {
				return errors.New("other algorithms than were signed")
			}
			protected = true
		}
	}
	for _, needed := range []asn1.ObjectIdentifier{pkcs7.OIDAttributeContentType, pkcs7.OIDAttributeMessageDigest} {
		if !seen[needed.String()] {
			return fmt.Errorf("no signed attribute %v", needed)
		}
	}
	// Two names fit the algorithm of the signature; without protection only the plain one is taken.
	if !protected && !isAlgorithm(s.Algorithm, []asn1.ObjectIdentifier{oidRSA}) {
		return errors.New("no signed attribute says which algorithm is meant")
	}
	return nil
}

// isAlgorithm tells whether an algorithm is one of those, without parameters.
func isAlgorithm(a pkix.AlgorithmIdentifier, oids []asn1.ObjectIdentifier) bool {
	return slices.ContainsFunc(oids, a.Algorithm.Equal) &&
		(len(a.Parameters.FullBytes) == 0 || bytes.Equal(a.Parameters.FullBytes, asn1.NullBytes))
}

func sameAlgorithm(a, b pkix.AlgorithmIdentifier) bool {
	return a.Algorithm.Equal(b.Algorithm) && bytes.Equal(a.Parameters.FullBytes, b.Parameters.FullBytes)
}

// maxDepth bounds how deep elements of ASN.1 may be nested; a certificate in its envelope has 12.
const maxDepth = 24

// Tags of ASN.1 that need care.
const (
	tagOctets       = 0x04
	tagOctetsPieces = 0x24
	tagConstructed  = 0x20
	tagLong         = 0x1f
)

// toDER rewrites the first element of BER as DER: indefinite lengths become definite, and octet
// strings in pieces whole. All else must be DER as it is.
func toDER(in []byte, depth int) (der, rest []byte, err error) {
	if depth > maxDepth {
		return nil, nil, fmt.Errorf("elements nested deeper than %d", maxDepth)
	}
	if len(in) < 2 {
		return nil, nil, errors.New("an element is cut off")
	}
	tag := in[0]
	if tag&tagLong == tagLong || tag == 0 {
		return nil, nil, fmt.Errorf("an element with tag %#02x", tag)
	}
	constructed := tag&tagConstructed != 0
	if in[1] == 0x80 {
		if !constructed {
			return nil, nil, errors.New("a primitive element without a length")
		}
		content, rest, err := contentDER(in[2:], tag, depth, true)
		if err != nil {
			return nil, nil, err
		}
		return element(tag, content), rest, nil
	}
	head, length, err := definiteLength(in)
	if err != nil {
		return nil, nil, err
	}
	content, rest := in[head:head+length], in[head+length:]
	if constructed {
		if content, _, err = contentDER(content, tag, depth, false); err != nil {
			return nil, nil, err
		}
	}
	return element(tag, content), rest, nil
}

// contentDER rewrites what is inside a constructed element: all of in, or all until the end mark.
func contentDER(in []byte, tag byte, depth int, marked bool) (der, rest []byte, err error) {
	for {
		switch {
		case marked && len(in) >= 2 && in[0] == 0 && in[1] == 0:
			return der, in[2:], nil
		case !marked && len(in) == 0:
			return der, nil, nil
		}
		var inner []byte
		first := in
		if inner, in, err = toDER(in, depth+1); err != nil {
			return nil, nil, err
		}
		if tag == tagOctetsPieces {
			if first[0] != tagOctets {
				return nil, nil, errors.New("a piece of an octet string is none itself")
			}
			head, _, err := definiteLength(inner)
			if err != nil {
				return nil, nil, err
			}
			inner = inner[head:]
		}
		der = append(der, inner...)
	}
}

// definiteLength reads the length of an element in the one way DER allows, and checks that all of the
// element is there.
func definiteLength(in []byte) (head, length int, err error) {
	head, length = 2, int(in[1])
	if length >= 0x80 {
		count := length & 0x7f
		// Three bytes of length are far more than any limit here.
		if count == 0 || count > 3 || len(in) < 2+count {
			return 0, 0, errors.New("the length of an element is cut off or absurd")
		}
		length = 0
		for _, b := range in[2 : 2+count] {
			length = length<<8 | int(b)
		}
		head = 2 + count
		if length < 0x80 || length>>(8*(count-1)) == 0 {
			return 0, 0, errors.New("the length of an element is not written in the shortest way")
		}
	}
	if length > len(in)-head {
		return 0, 0, errors.New("an element is cut off")
	}
	return head, length, nil
}

// element puts tag and length before content.
func element(tag byte, content []byte) []byte {
	if tag == tagOctetsPieces {
		tag = tagOctets
	}
	head := []byte{tag}
	switch n := len(content); {
	case n < 0x80:
		head = append(head, byte(n))
	case n < 1<<8:
		head = append(head, 0x81, byte(n))
	case n < 1<<16:
		head = append(head, 0x82, byte(n>>8), byte(n))
	default:
		head = append(head, 0x83, byte(n>>16), byte(n>>8), byte(n))
	}
	return append(head, content...)
}
