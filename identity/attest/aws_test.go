package attest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"math/big"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// vector A1: captured from a machine in us-east-1 in 2022, published.
func vector(t testing.TB) (signature, document string) {
	t.Helper()
	read := func(name string) string {
		b, err := os.ReadFile("testdata/A1-useast1-2022." + name)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	return read("signature"), read("doc")
}

func verifier(t testing.TB, extra ...*x509.Certificate) *AWS {
	t.Helper()
	a, err := NewAWS(extra...)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestVerifyCaptured(t *testing.T) {
	signature, document := vector(t)
	want := Instance{
		Provider: "aws", ID: "i-076e9b91f7c420782", Account: "628783029487", Region: "us-east-1",
		Started: time.Date(2022, 3, 25, 20, 7, 16, 0, time.UTC),
	}
	for name, signature := range map[string]string{
		"as read": signature, "one line": strings.ReplaceAll(signature, "\n", ""), "CRLF": strings.ReplaceAll(signature, "\n", "\r\n"),
	} {
		got, err := verifier(t).Verify(signature, document)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestVerifyFlippedByte(t *testing.T) {
	a := verifier(t)
	signature, document := vector(t)
	raw, err := base64.StdEncoding.DecodeString(signature)
	if err != nil {
		t.Fatal(err)
	}
	tried := 0
	refuse := func(what string, at int, signature, document string) {
		tried++
		if got, err := a.Verify(signature, document); err == nil {
			t.Errorf("%s with byte %d changed was accepted: %+v", what, at, got)
		}
	}
	flips := []byte{0x01, 0x20, 0x80, 0xff} // 0x20 is the case of a letter
	for i := range len(document) {
		for _, flip := range flips {
			b := []byte(document)
			b[i] ^= flip
			refuse("document", i, signature, string(b))
		}
		refuse("document cut", i, signature, document[:i])
	}
	for i := range len(raw) {
		for _, flip := range flips {
			b := []byte(string(raw))
			b[i] ^= flip
			refuse("signature", i, base64.StdEncoding.EncodeToString(b), document)
		}
	}
	for i := range len(signature) {
		b := []byte(signature)
		b[i] ^= 0x01
		refuse("base64", i, string(b), document)
	}
	refuse("newline appended", len(document), signature, document+"\n")
	if want := len(document)*5 + len(raw)*4 + len(signature) + 1; tried != want {
		t.Errorf("tried %d, want %d", tried, want)
	}
}

func TestEveryRegionHasItsKey(t *testing.T) {
	a := verifier(t)
	if len(a.regions) != 39 {
		t.Errorf("%d regions, want 39", len(a.regions))
	}
	distinct := map[string]bool{}
	for _, key := range a.regions {
		distinct[key.N.String()] = true
	}
	if len(distinct) != 21 {
		t.Errorf("%d distinct keys, want 21", len(distinct))
	}
	// The certificate of 2014 ran out in 2024; the one of today has the same key.
	text, err := os.ReadFile("testdata/aws-2014.pem")
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	old, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if !a.regions["us-east-1"].Equal(old.PublicKey) {
		t.Error("the key of us-east-1 is not the one of 2014")
	}
}

// signer stands in for AWS with a key of its own.
type signer struct {
	key  *rsa.PrivateKey
	cert *x509.Certificate
}

func newSigner(t testing.TB) signer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return signer{key, selfSigned(t, key)}
}

func selfSigned(t testing.TB, key crypto.Signer) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{Organization: []string{"Not AWS"}},
		// Long over: dates must not matter.
		NotBefore: time.Date(2001, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2002, 1, 1, 0, 0, 0, 0, time.UTC),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func (s signer) sign(t testing.TB, document string) string {
	t.Helper()
	sum := sha256.Sum256([]byte(document))
	sig, err := rsa.SignPKCS1v15(rand.Reader, s.key, crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return base64.StdEncoding.EncodeToString(sig)
}

func TestVerifySigned(t *testing.T) {
	s := newSigner(t)
	doc := func(region, id string) string {
		return `{"accountId":"111122223333","instanceId":"` + id + `","pendingTime":"2026-11-23T10:00:00Z","region":"` + region + `"}`
	}
	tests := []struct {
		name, document string
		signature      func(valid string) string
		want           string // in the error; empty means accepted
	}{
		{name: "region without a published key", document: doc("berth-fake-1", "i-0123456789abcdef0")},
		{name: "old id", document: doc("berth-fake-1", "i-01234567")},
		{name: "region with a published key", document: doc("us-east-1", "i-0123456789abcdef0"), want: `key of region "us-east-1"`},
		{name: "another partition", document: doc("cn-north-1", "i-0123456789abcdef0"), want: `key of region "cn-north-1"`},
		{name: "empty id", document: doc("berth-fake-1", ""), want: `instanceId "" is not one`},
		{name: "id with a newline", document: doc("berth-fake-1", `i-0123456789abcdef0\n`), want: "is not one"},
		{name: "id missing", document: `{"region":"berth-fake-1","pendingTime":"2026-11-23T10:00:00Z"}`, want: `instanceId "" is not one`},
		{name: "no pendingTime", document: `{"region":"berth-fake-1","instanceId":"i-01234567"}`, want: "pendingTime"},
		{name: "duplicate id", document: `{"instanceId":"i-00000000","region":"berth-fake-1","instanceId":"i-11111111"}`, want: `"instanceId" twice`},
		{name: "duplicate id in other letters", document: `{"instanceId":"i-00000000","region":"berth-fake-1","InstanceID":"i-11111111"}`, want: `"InstanceID" twice`},
		{name: "id of another type", document: `{"instanceId":7,"region":"berth-fake-1"}`, want: `member "instanceId"`},
		{name: "two objects", document: doc("berth-fake-1", "i-01234567") + `{}`, want: "goes on after"},
		{name: "array", document: `[]`, want: "not a JSON object"},
		{name: "empty", document: ``, want: "not a JSON object"},
		{name: "unfinished", document: `{"region":"berth-fake-1"`, want: "not JSON"},
		{name: "deep", document: `{"region":` + strings.Repeat("[", 12000), want: "region"},
		{name: "long document", document: doc("berth-fake-1", "i-01234567") + strings.Repeat(" ", maxAWSDocument), want: "limit"},
		{name: "no signature", document: doc("berth-fake-1", "i-01234567"), signature: func(string) string { return "" }, want: "does not fit"},
		{name: "long signature", document: doc("berth-fake-1", "i-01234567"), signature: func(s string) string { return s + strings.Repeat("\n", maxAWSSignature) }, want: "limit"},
		{name: "signature with a space", document: doc("berth-fake-1", "i-01234567"), signature: func(s string) string { return " " + s }, want: "not base64"},
		{name: "signature without padding", document: doc("berth-fake-1", "i-01234567"), signature: func(s string) string { return strings.TrimRight(s, "=") }, want: "not base64"},
	}
	a := verifier(t, s.cert)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			signature := s.sign(t, test.document)
			if test.signature != nil {
				signature = test.signature(signature)
			}
			got, err := a.Verify(signature, test.document)
			switch {
			case test.want == "" && err != nil:
				t.Fatal(err)
			case test.want != "" && err == nil:
				t.Fatalf("accepted as %+v", got)
			case test.want != "" && !strings.Contains(err.Error(), test.want):
				t.Errorf("error %q lacks %q", err, test.want)
			}
		})
	}
	if _, err := verifier(t).Verify(s.sign(t, doc("berth-fake-1", "i-01234567")), doc("berth-fake-1", "i-01234567")); err == nil ||
		!strings.Contains(err.Error(), `no certificate for region "berth-fake-1"`) {
		t.Errorf("without the extra certificate: %v", err)
	}
}

func TestNewAWSRefusesOtherKeys(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewAWS(selfSigned(t, key)); err == nil || !strings.Contains(err.Error(), "ECDSA, not RSA") {
		t.Errorf("NewAWS with an ECDSA certificate: %v", err)
	}
}

func FuzzVerifyAWS(f *testing.F) {
	a := verifier(f)
	signature, document := vector(f)
	f.Add(signature, document)
	f.Add("", `{"region":"us-east-1","region":"eu-west-1"}`)
	f.Add("AAAA", `{"instanceId":{"a":[1,2,{"b":null}]},"region":"us-east-1"}`)
	f.Fuzz(func(t *testing.T, sig, doc string) {
		got, err := a.Verify(sig, doc)
		if err == nil && doc != document {
			t.Errorf("accepted %q as %+v", doc, got)
		}
		if err != nil && got != (Instance{}) {
			t.Errorf("an error came with %+v", got)
		}
	})
}
