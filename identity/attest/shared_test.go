package attest

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"flag"
	"os"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func file(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

var allFlips = flag.Bool("all-flips", false, "change every byte to every other value, which takes an hour, instead of to three")

// flips is how many ways a byte is changed.
func flips() int {
	if *allFlips {
		return 255
	}
	return 3
}

// flip calls try with every byte changed in turn, and returns how often it did.
func flip(good []byte, try func(at int, b []byte)) (tried int) {
	b := bytes.Clone(good)
	for i := range b {
		for mask := 1; mask < 256; mask++ {
			if !*allFlips && mask != 0x01 && mask != 0x80 && mask != 0xff {
				continue
			}
			b[i] = good[i] ^ byte(mask)
			try(i, b)
			tried++
		}
		b[i] = good[i]
	}
	return tried
}

// stillGood checks that an error comes with nothing, that no parser failed, and that the next good
// login works.
func stillGood(t *testing.T, got Instance, err error, good func() error) {
	t.Helper()
	if err != nil && got != (Instance{}) {
		t.Errorf("an error came with %+v", got)
	}
	if err != nil && strings.Contains(err.Error(), "a parser failed") {
		t.Error(err)
	}
	if err := good(); err != nil {
		t.Errorf("the next good login: %v", err)
	}
}

// rebuilt changes an envelope in base64 and encodes it again.
func rebuilt(t testing.TB, text string, change func(*contentInfo)) string {
	t.Helper()
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	var info contentInfo
	if _, err := asn1.Unmarshal(raw, &info); err != nil {
		t.Fatal(err)
	}
	change(&info)
	der, err := asn1.Marshal(info)
	if err != nil {
		t.Fatal(err)
	}
	return base64.StdEncoding.EncodeToString(der)
}

func setCertificates(info *contentInfo, certs ...*x509.Certificate) {
	var all []byte
	for _, cert := range certs {
		all = append(all, cert.Raw...)
	}
	der, err := asn1.Marshal(asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: all})
	if err != nil {
		panic(err)
	}
	info.Content.Certificates = asn1.RawValue{FullBytes: der}
}

func withCertificate(t testing.TB, text string, cert *x509.Certificate) string {
	return rebuilt(t, text, func(info *contentInfo) { setCertificates(info, cert) })
}

func attributesAsContent(t testing.TB, text string) string {
	return rebuilt(t, text, func(info *contentInfo) {
		signer := &info.Content.Signers[0]
		set, err := asn1.MarshalWithParams(signer.Attributes, "set")
		if err != nil {
			t.Fatal(err)
		}
		info.Content.Content.Content, signer.Attributes = set, nil
	})
}
