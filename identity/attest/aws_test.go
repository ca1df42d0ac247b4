package attest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/berthd/berth/internal/testnet"
)

// a1 is vector A1: captured from a machine in us-east-1 in 2022, published.
func a1(t testing.TB) AWSProof {
	t.Helper()
	return AWSProof{Document: file(t, "A1-useast1-2022.doc"), Signature: file(t, "A1-useast1-2022.signature")}
}

// a2 is vector A2: PKCS#7 of a machine in us-west-2 in 2021, published. The document is what is inside.
func a2(t testing.TB) (envelope []byte, document string) {
	t.Helper()
	block, _ := pem.Decode([]byte(file(t, "A2-uswest2-2021.rsa2048.p7.pem")))
	begin := bytes.IndexByte(block.Bytes, '{')
	return block.Bytes, string(block.Bytes[begin : begin+475])
}

func newAWS(t testing.TB, region string, certs ...*x509.Certificate) *AWS {
	t.Helper()
	a, err := NewAWS(AWSConfig{Certificates: map[string][]*x509.Certificate{region: certs}})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestAWSCaptured(t *testing.T) {
	a := newAWS(t, "")
	proof := a1(t)
	want := Instance{
		Provider: "aws", ID: "i-076e9b91f7c420782", Account: "628783029487", Region: "us-east-1", Zone: "us-east-1b", Partition: "aws",
		Issued:  time.Date(2022, 3, 25, 20, 7, 16, 0, time.UTC),
		Payload: payloadHash([]byte(proof.Document)),
	}
	for name, signature := range map[string]string{
		"as read": proof.Signature, "one line": strings.ReplaceAll(proof.Signature, "\n", ""), "CRLF": strings.ReplaceAll(proof.Signature, "\n", "\r\n"),
	} {
		got, err := a.Verify(t.Context(), AWSProof{Document: proof.Document, Signature: signature})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	envelope, document := a2(t)
	got, err := a.Verify(t.Context(), AWSProof{Document: document, Signature: base64.StdEncoding.EncodeToString(envelope)})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Instance{
		Provider: "aws", ID: "i-078517ca8a70a1dde", Account: "278576220453", Region: "us-west-2", Zone: "us-west-2a", Partition: "aws",
		Issued: time.Date(2021, 9, 3, 21, 25, 44, 0, time.UTC), Payload: payloadHash([]byte(document)),
	}, got); diff != "" {
		t.Errorf("A2 (-want +got):\n%s", diff)
	}
}

// Every byte of what AWS signed and of the signatures is changed in turn.
func TestAWSFlippedByte(t *testing.T) {
	a := newAWS(t, "")
	proof := a1(t)
	raw, err := base64.StdEncoding.DecodeString(proof.Signature)
	if err != nil {
		t.Fatal(err)
	}
	refuse := func(what string, at int, proof AWSProof) {
		t.Helper()
		if got, err := a.Verify(t.Context(), proof); err == nil {
			t.Errorf("%s with byte %d changed was accepted: %+v", what, at, got)
		}
	}
	tried := flip([]byte(proof.Document), func(at int, b []byte) {
		refuse("A1's document", at, AWSProof{Document: string(b), Signature: proof.Signature})
	})
	tried += flip(raw, func(at int, b []byte) {
		refuse("A1's signature", at, AWSProof{Document: proof.Document, Signature: base64.StdEncoding.EncodeToString(b)})
	})
	for i := range len(proof.Document) {
		refuse("A1's document, cut", i, AWSProof{Document: proof.Document[:i], Signature: proof.Signature})
	}
	refuse("A1's document and a newline", len(proof.Document), AWSProof{Document: proof.Document + "\n", Signature: proof.Signature})
	for i := range len(proof.Signature) {
		b := []byte(proof.Signature)
		b[i] ^= 0x01
		refuse("A1's base64", i, AWSProof{Document: proof.Document, Signature: string(b)})
	}
	envelope, document := a2(t)
	good := base64.StdEncoding.EncodeToString(envelope)
	tried += flip(envelope, func(at int, b []byte) {
		refuse("A2", at, AWSProof{Document: document, Signature: base64.StdEncoding.EncodeToString(b)})
		// The document that came with it may be the altered one, too.
		if begin := bytes.IndexByte(envelope, '{'); at >= begin && at < begin+len(document) {
			refuse("A2 with its document", at, AWSProof{Document: string(b[begin : begin+len(document)]), Signature: base64.StdEncoding.EncodeToString(b)})
		}
	})
	tried += flip([]byte(document), func(at int, b []byte) {
		refuse("A2's document", at, AWSProof{Document: string(b), Signature: good})
	})
	if want := flips() * (477 + 128 + len(envelope) + 475); tried != want {
		t.Errorf("tried %d, want %d", tried, want)
	}
	t.Logf("%d changes, none accepted", tried)
}

// A byte too many, anywhere, is refused as well.
func TestAWSAddedByte(t *testing.T) {
	a := newAWS(t, "")
	envelope, document := a2(t)
	for i := range len(envelope) + 1 {
		for _, extra := range []byte{0, 4, 0x30, 0xff} {
			b := append(append(bytes.Clone(envelope[:i]), extra), envelope[i:]...)
			if _, err := a.Verify(t.Context(), AWSProof{Document: document, Signature: base64.StdEncoding.EncodeToString(b)}); err == nil {
				t.Errorf("A2 with %#02x added at %d was accepted", extra, i)
			}
		}
	}
}

func TestEveryRegionHasItsKeys(t *testing.T) {
	a := newAWS(t, "")
	if len(a.regions) != 39 {
		t.Errorf("%d regions, want 39", len(a.regions))
	}
	short, long := map[string]bool{}, map[string]bool{}
	for region, certs := range a.regions {
		for i, cert := range certs {
			key, err := rsaKey(cert)
			if err != nil {
				t.Fatal(err)
			}
			bits := key.N.BitLen()
			if want := []int{1024, 2048}[i]; len(certs) != 2 || bits != want {
				t.Errorf("%s: certificate %d of %d has a key of %d bits, want %d", region, i, len(certs), bits, want)
			}
			if bits == 1024 {
				short[key.N.String()] = true
			} else {
				long[key.N.String()] = true
			}
		}
	}
	if len(short) != 21 || len(long) != 39 {
		t.Errorf("%d and %d distinct keys, want 21 and 39", len(short), len(long))
	}
	// The certificate of 2014 ran out in 2024; the one of today has the same key.
	old, err := ParseCertificates([]byte(file(t, "aws-2014.pem")))
	if err != nil {
		t.Fatal(err)
	}
	now, _ := rsaKey(a.regions["us-east-1"][0])
	if !now.Equal(old[0].PublicKey) {
		t.Error("the key of us-east-1 is not the one of 2014")
	}
}

func TestAWSSigned(t *testing.T) {
	const fake = "berth-fake-1"
	s, err := testnet.NewAWSSigner()
	if err != nil {
		t.Fatal(err)
	}
	other, err := testnet.NewAWSSigner()
	if err != nil {
		t.Fatal(err)
	}
	sign := func(s *testnet.AWSSigner, document string) AWSProof {
		short, long, err := s.Sign(document)
		if err != nil {
			t.Fatal(err)
		}
		return AWSProof{document, short, long}
	}
	doc := func(region, id string) string {
		return `{"accountId":"111122223333","instanceId":"` + id + `","pendingTime":"2026-11-23T10:00:00Z","region":"` + region + `"}`
	}
	good := doc(fake, "i-0123456789abcdef0")
	envelope, inside := a2(t)
	genuine := base64.StdEncoding.EncodeToString(envelope)
	long := sign(s, good).RSA2048
	tests := []struct {
		name, document string
		change         func(p *AWSProof)
		want           string // in the error; empty means accepted
	}{
		{name: "own certificates", document: good},
		{name: "RSA-1024 only", document: good, change: func(p *AWSProof) { p.RSA2048 = "" }},
		{name: "RSA-2048 in place of the signature", document: good, change: func(p *AWSProof) { p.Signature, p.RSA2048 = p.RSA2048, "" }},
		{name: "old id", document: doc(fake, "i-01234567")},
		{name: "region with a published key", document: doc("us-east-1", "i-0123456789abcdef0"), want: `keys of region "us-east-1"`},
		{name: "another partition", document: doc("cn-north-1", "i-0123456789abcdef0"), want: `keys of region "cn-north-1"`},
		{name: "region not known", document: doc("mars-1", "i-0123456789abcdef0"), want: `no certificate for region "mars-1"`},
		{name: "no region", document: `{"instanceId":"i-01234567"}`, want: `no certificate for region ""`},
		{name: "empty id", document: doc(fake, ""), want: `instanceId "" is not one`},
		{name: "id with a newline", document: doc(fake, `i-0123456789abcdef0\n`), want: "is not one"},
		{name: "id missing", document: `{"region":"berth-fake-1","pendingTime":"2026-11-23T10:00:00Z"}`, want: `instanceId "" is not one`},
		{name: "id null", document: `{"region":"berth-fake-1","instanceId":null}`, want: `member "instanceId"`},
		{name: "no pendingTime", document: `{"region":"berth-fake-1","instanceId":"i-01234567"}`, want: "pendingTime"},
		{name: "from the future", document: strings.Replace(good, "2026", "2099", 1), want: "in the future"},
		{name: "duplicate id", document: `{"instanceId":"i-00000000","region":"berth-fake-1","instanceId":"i-11111111"}`, want: `"instanceId" twice`},
		{name: "duplicate id in other letters", document: `{"instanceId":"i-00000000","region":"berth-fake-1","InstanceID":"i-11111111"}`, want: `"InstanceID" twice`},
		{name: "id of another type", document: `{"instanceId":7,"region":"berth-fake-1"}`, want: `member "instanceId"`},
		{name: "two objects", document: good + `{}`, want: "goes on after"},
		{name: "array", document: `[]`, want: "not a JSON object"},
		{name: "empty", document: ``, want: "not a JSON object"},
		{name: "unfinished", document: `{"region":"berth-fake-1"`, want: "not JSON"},
		{name: "deep", document: `{"region":` + strings.Repeat("[", 12000), change: func(p *AWSProof) { p.RSA2048 = "" }, want: "region"},
		{name: "long document", document: good + strings.Repeat(" ", maxAWSDocument), want: "limit"},
		{name: "no signature", document: good, change: func(p *AWSProof) { p.Signature = "" }, want: "does not fit"},
		{name: "long signature", document: good, change: func(p *AWSProof) { p.Signature += strings.Repeat("\n", maxAWSSignature) }, want: "limit"},
		{name: "signature with a space", document: good, change: func(p *AWSProof) { p.Signature = " " + p.Signature }, want: "not base64"},
		{name: "signature without padding", document: good, change: func(p *AWSProof) { p.Signature = strings.TrimRight(p.Signature, "=") }, want: "not base64"},
		{name: "both needed", document: good, change: func(p *AWSProof) { p.Signature = sign(other, good).Signature }, want: "does not fit"},
		{name: "a stranger's rsa2048", document: good, change: func(p *AWSProof) { p.RSA2048 = sign(other, good).RSA2048 }, want: "No certificate for signer"},
		{name: "rsa2048 of another document", document: good, change: func(p *AWSProof) { p.RSA2048 = sign(s, doc(fake, "i-01234567")).RSA2048 }, want: "signs another document"},
		// SPIRE <= 1.14.5: the envelope was verified, and the id read from a document beside it.
		{name: "A2's envelope around another document", document: strings.Replace(inside, "i-078517ca8a70a1dde", "i-0123456789abcdef0", 1),
			change: func(p *AWSProof) { p.Signature, p.RSA2048 = genuine, "" }, want: "signs another document"},
		{name: "A2's envelope for another region", document: strings.ReplaceAll(inside, "us-west-2", "us-east-1"),
			change: func(p *AWSProof) { p.Signature, p.RSA2048 = genuine, "" }, want: "No certificate for signer"},
		{name: "a certificate inside", document: good, change: func(p *AWSProof) { p.RSA2048 = withCertificate(t, p.RSA2048, s.Certificates()[1]) }, want: "certificates inside"},
		// The bytes of the signed attributes are signed: as content without attributes they would fit.
		{name: "attributes as content", document: good, change: func(p *AWSProof) { p.Signature, p.RSA2048 = attributesAsContent(t, long), "" }, want: "no signed attribute"},
	}
	a := newAWS(t, fake, s.Certificates()...)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			proof := sign(s, test.document)
			if test.change != nil {
				test.change(&proof)
			}
			got, err := a.Verify(t.Context(), proof)
			switch {
			case test.want == "" && err != nil:
				t.Fatal(err)
			case test.want == "" && (got.Region != fake || got.Payload != payloadHash([]byte(test.document))):
				t.Errorf("verified as %+v", got)
			case test.want != "" && err == nil:
				t.Fatalf("accepted as %+v", got)
			case test.want != "" && !strings.Contains(err.Error(), test.want):
				t.Errorf("error %q lacks %q", err, test.want)
			}
		})
	}
}

func TestAWSPartitions(t *testing.T) {
	for region, want := range map[string]string{
		"eu-central-1": "aws", "cn-north-1": "aws-cn", "us-gov-west-1": "aws-us-gov", "eusc-de-east-1": "aws-eusc", "us-isob-east-1": "aws-iso",
	} {
		if got := awsPartition(region); got != want {
			t.Errorf("%s: %s, want %s", region, got, want)
		}
	}
}

func TestNewAWSRefusesOtherKeys(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewAWS(AWSConfig{Certificates: map[string][]*x509.Certificate{"x": {cert}}}); err == nil || !strings.Contains(err.Error(), "ECDSA, not RSA") {
		t.Errorf("NewAWS with an ECDSA certificate: %v", err)
	}
}

func FuzzAWS(f *testing.F) {
	a := newAWS(f, "")
	short := a1(f)
	envelope, document := a2(f)
	f.Add(short.Signature, short.Document, "")
	f.Add(base64.StdEncoding.EncodeToString(envelope), document, "")
	f.Add(short.Signature, short.Document, base64.StdEncoding.EncodeToString(envelope))
	f.Add("", `{"region":"us-east-1","region":"eu-west-1"}`, "")
	f.Add("AAAA", `{"instanceId":{"a":[1,2,{"b":null}]},"region":"us-east-1"}`, "")
	f.Fuzz(func(t *testing.T, signature, doc, rsa2048 string) {
		got, err := a.Verify(t.Context(), AWSProof{doc, signature, rsa2048})
		if err == nil && doc != document && (doc != short.Document || rsa2048 != "") {
			t.Errorf("accepted %q as %+v", doc, got)
		}
		stillGood(t, got, err, func() error { _, err := a.Verify(t.Context(), short); return err })
	})
}
