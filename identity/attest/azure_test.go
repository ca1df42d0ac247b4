package attest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/berthd/berth/internal/testnet"
)

// Vectors Z1 and Z3: captured in the public cloud in 2026, and in the US Government's in 2023, published.
const (
	z1 = "Z1-new_regular.p7.b64"
	z3 = "Z3-new_govcloud.p7.b64"
)

var (
	z1Time = time.Date(2026, 6, 25, 19, 0, 0, 0, time.UTC)
	z3Time = time.Date(2023, 3, 8, 18, 0, 0, 0, time.UTC)
)

func at(now time.Time) func() time.Time { return func() time.Time { return now } }

// newAzure returns a verifier that cannot reach the network.
func newAzure(t testing.TB, config AzureConfig) *Azure {
	t.Helper()
	a, err := NewAzure(config)
	if err != nil {
		t.Fatal(err)
	}
	a.issuers.lookup = func(_ context.Context, host string) ([]netip.Addr, error) {
		return nil, fmt.Errorf("no network in tests: %s", host)
	}
	return a
}

func pkcs7Proof(text string) AzureProof { return AzureProof{Signature: text, Encoding: "pkcs7"} }

func TestAzureCaptured(t *testing.T) {
	for _, test := range []struct {
		file string
		at   time.Time
		want Instance
	}{
		{z1, z1Time, Instance{
			Provider: "azure", ID: "dc18de58-292f-4794-9a5d-a4192bad0039", Account: "05e8b285-4ce1-46a3-b4c9-f51ba67d6acc",
			Region: "eastus", Partition: "metadata.azure.com",
			Issued: time.Date(2026, 6, 25, 18, 56, 45, 0, time.UTC), Expires: time.Date(2026, 6, 26, 0, 56, 45, 0, time.UTC),
		}},
		{z3, z3Time, Instance{
			Provider: "azure", ID: "990878d4-068a-4ac4-9ee9-1231d2218ef2", Account: "0afbfffa-5df9-4a3b-987e-fe7577624272",
			Region: "usgovvirginia", Partition: "metadata.azure.us",
			Issued: time.Date(2023, 3, 8, 17, 9, 33, 0, time.UTC), Expires: time.Date(2023, 3, 8, 23, 9, 33, 0, time.UTC),
		}},
	} {
		got, err := newAzure(t, AzureConfig{Now: at(test.at)}).Verify(t.Context(), pkcs7Proof(file(t, test.file)))
		if err != nil {
			t.Fatalf("%s: %v", test.file, err)
		}
		if len(got.Payload) != 64 {
			t.Errorf("payload %q", got.Payload)
		}
		got.Payload = ""
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.file, diff)
		}
	}
}

func TestAzureTimes(t *testing.T) {
	for name, test := range map[string]struct {
		file string
		at   time.Time
		want string // empty means accepted
	}{
		"Z1 at its first second":  {z1, time.Date(2026, 6, 25, 18, 56, 45, 0, time.UTC), ""},
		"Z1 by a clock behind":    {z1, time.Date(2026, 6, 25, 18, 52, 0, 0, time.UTC), ""},
		"Z1 too early":            {z1, time.Date(2026, 6, 25, 18, 51, 44, 0, time.UTC), "in the future"},
		"Z1 at its last second":   {z1, time.Date(2026, 6, 26, 0, 56, 44, 0, time.UTC), ""},
		"Z1 by a clock ahead":     {z1, time.Date(2026, 6, 26, 0, 57, 44, 0, time.UTC), ""},
		"Z1 over":                 {z1, time.Date(2026, 6, 26, 0, 57, 45, 0, time.UTC), "over since"},
		"Z3 with its chain good":  {z3, time.Date(2023, 4, 1, 0, 0, 0, 0, time.UTC), "over since"},
		"Z3 today":                {z3, time.Date(2026, 11, 26, 0, 0, 0, 0, time.UTC), "certificate has expired"},
		"Z1 before its leaf":      {z1, time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC), "certificate has expired or is not yet valid"},
		"Z1 after its leaf ended": {z1, time.Date(2026, 11, 12, 0, 0, 0, 0, time.UTC), "certificate has expired"},
	} {
		_, err := newAzure(t, AzureConfig{Now: at(test.at)}).Verify(t.Context(), pkcs7Proof(file(t, test.file)))
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
	}
}

// Every byte of the envelopes is changed in turn, also those that nobody signed.
func TestAzureFlippedByte(t *testing.T) {
	for name, now := range map[string]time.Time{z1: z1Time, z3: z3Time} {
		a := newAzure(t, AzureConfig{Now: at(now)})
		raw, err := base64.StdEncoding.DecodeString(file(t, name))
		if err != nil {
			t.Fatal(err)
		}
		tried := flip(raw, func(at int, b []byte) {
			if got, err := a.Verify(t.Context(), pkcs7Proof(base64.StdEncoding.EncodeToString(b))); err == nil {
				t.Errorf("%s with byte %d changed from %#02x to %#02x was accepted: %+v", name, at, raw[at], b[at], got)
			}
		})
		if tried != flips()*len(raw) {
			t.Errorf("tried %d", tried)
		}
		t.Logf("%s: %d changes, none accepted", name, tried)
		for i := range len(raw) + 1 {
			for _, extra := range []byte{0, 0x30} {
				b := append(append(bytes.Clone(raw[:i]), extra), raw[i:]...)
				if _, err := a.Verify(t.Context(), pkcs7Proof(base64.StdEncoding.EncodeToString(b))); err == nil {
					t.Errorf("%s with %#02x added at %d was accepted", name, extra, i)
				}
			}
		}
		if _, err := a.Verify(t.Context(), pkcs7Proof(file(t, name))); err != nil {
			t.Errorf("%s after all that: %v", name, err)
		}
	}
}

const vmID = "dc18de58-292f-4794-9a5d-a4192bad0039"

// azureNow is a document of this moment.
func azureNow() testnet.AzureDocument {
	now := time.Now()
	return testnet.AzureDocument{VMID: vmID, SubscriptionID: "05e8b285-0000-46a3-b4c9-f51ba67d6acc", Created: now, Expires: now.Add(6 * time.Hour)}
}

func newSigner(t testing.TB, leaf testnet.AzureLeaf) *testnet.AzureSigner {
	t.Helper()
	s, err := testnet.NewAzureSigner(leaf)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func signed(t testing.TB, s *testnet.AzureSigner, document string) AzureProof {
	t.Helper()
	text, err := s.Sign(document)
	if err != nil {
		t.Fatal(err)
	}
	return pkcs7Proof(text)
}

func TestAzureSigned(t *testing.T) {
	s := newSigner(t, testnet.AzureLeaf{})
	stranger := newSigner(t, testnet.AzureLeaf{})
	a := newAzure(t, AzureConfig{Certificates: []*x509.Certificate{s.Root(), s.Issuing()}})
	document := azureNow().String()
	altered := func(old, new string) string {
		if !strings.Contains(document, old) {
			t.Fatalf("no %q in the document", old)
		}
		return strings.Replace(document, old, new, 1)
	}
	plain := func() AzureProof { return signed(t, s, document) }
	change := func(f func(*contentInfo)) AzureProof {
		p := plain()
		p.Signature = rebuilt(t, p.Signature, f)
		return p
	}
	genuine, err := base64.StdEncoding.DecodeString(file(t, z1))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	leaf := func(l testnet.AzureLeaf) AzureProof {
		t.Helper()
		defer func(old testnet.AzureSigner) { *s = old }(*s)
		if err := s.Renew(l); err != nil {
			t.Fatal(err)
		}
		return signed(t, s, document)
	}
	tests := []struct {
		name  string
		proof AzureProof
		want  string // in the error; empty means accepted
	}{
		{"good", plain(), ""},
		{"encoding in capitals", AzureProof{Signature: plain().Signature, Encoding: "PKCS7"}, ""},
		{"its issuer sent, too", change(func(i *contentInfo) { setCertificates(i, s.Leaf(), s.Issuing()) }), ""},
		{"id in upper case", signed(t, s, altered(vmID, strings.ToUpper(vmID))), ""},

		// Coder, CVE-2026-46354: the chain of the certificate was checked, the signature over the content never.
		{"another id under a genuine signature", change(func(i *contentInfo) {
			c := i.Content.Content.Content
			i.Content.Content.Content = bytes.Replace(c, []byte(vmID), []byte("11111111-1111-1111-1111-111111111111"), 1)
		}), "verification error"},
		{"Z1 with another id", pkcs7Proof(base64.StdEncoding.EncodeToString(
			bytes.Replace(genuine, []byte(vmID), []byte("11111111-1111-1111-1111-111111111111"), 1))), "verification error"},
		// SPIRE 1.15.0, azure_imds: the first certificate was anchored, another one had signed.
		{"a genuine leaf first, a stranger's signature", func() AzureProof {
			p := signed(t, stranger, document)
			p.Signature = rebuilt(t, p.Signature, func(i *contentInfo) { setCertificates(i, s.Leaf(), stranger.Leaf()) })
			return p
		}(), "unknown authority"},
		{"a stranger", signed(t, stranger, document), "unknown authority"},
		{"a stranger that sends his root", func() AzureProof {
			p := signed(t, stranger, document)
			p.Signature = rebuilt(t, p.Signature, func(i *contentInfo) {
				setCertificates(i, stranger.Leaf(), stranger.Issuing(), stranger.Root())
			})
			return p
		}(), "unknown authority"},
		{"the issuer and serial number of another key's", twin(t, s, document), "certificate"},
		{"a certificate of nobody's use", change(func(i *contentInfo) { setCertificates(i, s.Leaf(), stranger.Issuing()) }), "no part of the signer's chain"},
		{"the same certificate twice", change(func(i *contentInfo) { setCertificates(i, s.Leaf(), s.Leaf()) }), "no part of the signer's chain"},
		{"no certificate", change(func(i *contentInfo) { i.Content.Certificates = asn1.RawValue{} }), "is not there"},

		{"two signers", change(func(i *contentInfo) { i.Content.Signers = append(i.Content.Signers, i.Content.Signers[0]) }), "2 signers"},
		{"no signer", change(func(i *contentInfo) { i.Content.Signers = nil }), "0 signers"},
		{"two digests", change(func(i *contentInfo) { i.Content.Digests = append(i.Content.Digests, i.Content.Digests[0]) }), "2 digests"},
		{"no content", change(func(i *contentInfo) { i.Content.Content.Content = nil }), ""},
		{"signed attributes", func() AzureProof {
			aws, err := testnet.NewAWSSigner()
			if err != nil {
				t.Fatal(err)
			}
			_, text, err := aws.Sign(document)
			if err != nil {
				t.Fatal(err)
			}
			return pkcs7Proof(text)
		}(), "signed attributes"},
		{"MD5", change(func(i *contentInfo) {
			i.Content.Signers[0].Digest.Algorithm = asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 5}
			i.Content.Digests[0] = i.Content.Signers[0].Digest
		}), "not RSA with SHA-256"},

		{"metadata.azure.com.evil.example", leaf(testnet.AzureLeaf{Names: []string{"metadata.azure.com.evil.example"}}), "not Azure's metadata service"},
		{"xmetadata.azure.com", leaf(testnet.AzureLeaf{Names: []string{"xmetadata.azure.com"}}), "not Azure's metadata service"},
		{"azure.com", leaf(testnet.AzureLeaf{Names: []string{"azure.com", ".metadata.azure.com"}}), "not Azure's metadata service"},
		{"only the common name", leaf(testnet.AzureLeaf{CommonName: "metadata.azure.com", Names: []string{"www.example.org"}}), "not Azure's metadata service"},
		{"another common name", leaf(testnet.AzureLeaf{CommonName: "www.example.org"}), ""},
		{"capitals", leaf(testnet.AzureLeaf{Names: []string{"EastUS.Metadata.Azure.COM"}}), ""},
		{"US Government", leaf(testnet.AzureLeaf{Names: []string{"usgovvirginia.metadata.azure.us"}}), ""},
		{"China", leaf(testnet.AzureLeaf{Names: []string{"metadata.azure.cn"}}), ""},
		{"Germany", leaf(testnet.AzureLeaf{Names: []string{"x.metadata.microsoftazure.de"}}), ""},
		{"leaf over", leaf(testnet.AzureLeaf{NotBefore: now.AddDate(0, 0, -9), NotAfter: now.AddDate(0, 0, -1)}), "expired"},
		{"leaf to come", leaf(testnet.AzureLeaf{NotBefore: now.AddDate(0, 0, 1)}), "not yet valid"},
		{"leaf of a client", leaf(testnet.AzureLeaf{Usage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}), "not one of a server"},
		{"leaf for nothing", leaf(testnet.AzureLeaf{Usage: []x509.ExtKeyUsage{}}), "not one of a server"},

		{"document over", signed(t, s, func() string { d := azureNow(); d.Expires = now.Add(-2 * time.Minute); return d.String() }()), "over since"},
		{"document to come", signed(t, s, func() string { d := azureNow(); d.Created = now.Add(time.Hour); return d.String() }()), "in the future"},
		{"empty id", signed(t, s, altered(vmID, "")), `vmId "" is not one`},
		{"no id", signed(t, s, altered("vmId", "other")), `vmId "" is not one`},
		{"id with a line break", signed(t, s, altered(vmID, vmID+`\n`)), "is not one"},
		{"two ids", signed(t, s, altered(`"vmId":`, `"vmId":"11111111-1111-1111-1111-111111111111","vmId":`)), `"vmId" twice`},
		{"two ids in other letters", signed(t, s, altered(`"vmId":`, `"VMID":"11111111-1111-1111-1111-111111111111","vmId":`)), `"vmId" twice`},
		{"two times", signed(t, s, altered(`"expiresOn":`, `"expiresOn":"01/01/99 00:00:00 -0000","expiresOn":`)), `"expiresOn" twice`},
		{"no times", signed(t, s, altered("timeStamp", "other")), "createdOn"},
		{"not JSON", signed(t, s, "hello"), "not a JSON object"},

		{"nothing", pkcs7Proof(""), "cut off"},
		{"not base64", pkcs7Proof("%"), "not base64"},
		{"another encoding", AzureProof{Signature: plain().Signature, Encoding: "jws"}, "not pkcs7"},
		{"long", pkcs7Proof(strings.Repeat("A", maxAzureSignature+4)), "limit"},
		{"A2", pkcs7Proof(func() string { b, _ := a2(t); return base64.StdEncoding.EncodeToString(b) }()), "not DER"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := a.Verify(t.Context(), test.proof)
			switch {
			case test.name == "no content":
				if err == nil {
					t.Fatal("accepted")
				}
			case test.want == "" && err != nil:
				t.Fatal(err)
			case test.want == "" && got.ID != vmID:
				t.Errorf("verified as %+v", got)
			case test.want != "" && err == nil:
				t.Fatalf("accepted as %+v", got)
			case test.want != "" && !strings.Contains(err.Error(), test.want):
				t.Errorf("error %q lacks %q", err, test.want)
			}
			stillGood(t, got, err, func() error { _, err := a.Verify(t.Context(), tests[0].proof); return err })
		})
	}
	narrow := newAzure(t, AzureConfig{Domains: []string{"metadata.azure.us"}, Certificates: []*x509.Certificate{s.Root(), s.Issuing()}})
	if _, err := narrow.Verify(t.Context(), tests[0].proof); err == nil || !strings.Contains(err.Error(), "not Azure's metadata service") {
		t.Errorf("a domain that is not allowed: %v", err)
	}
}

// twin signs with a certificate that has issuer and serial number of a genuine one, but another key.
func twin(t *testing.T, s *testnet.AzureSigner, document string) AzureProof {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	issuer := &x509.Certificate{RawSubject: s.Leaf().RawIssuer}
	copied := *s.Leaf()
	copied.SignatureAlgorithm = x509.UnknownSignatureAlgorithm
	der, err := x509.CreateCertificate(rand.Reader, &copied, issuer, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	p := signed(t, s, document)
	sum := sha256.Sum256([]byte(document))
	signature, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	p.Signature = rebuilt(t, p.Signature, func(i *contentInfo) {
		setCertificates(i, cert)
		i.Content.Signers[0].Signature = signature
	})
	return p
}

func TestAzureNonce(t *testing.T) {
	s := newSigner(t, testnet.AzureLeaf{})
	a := newAzure(t, AzureConfig{Certificates: []*x509.Certificate{s.Root(), s.Issuing()}})
	document := azureNow()
	document.Nonce = "k7f3n1x9k7f3n1x9k7f3n1x9k7f3n1x9"
	proof := signed(t, s, document.String())
	for nonce, want := range map[string]bool{"": true, document.Nonce: true, document.Nonce[1:]: false, "0123456789": false} {
		proof.Nonce = nonce
		if _, err := a.Verify(t.Context(), proof); (err == nil) != want {
			t.Errorf("nonce %q: %v", nonce, err)
		}
	}
}

// What made PKCS#7 readers of others fail or hang is an error here, and the next good login works.
func TestAzureCrashers(t *testing.T) {
	a := newAzure(t, AzureConfig{Now: at(z1Time)})
	raw, err := base64.StdEncoding.DecodeString(file(t, z1))
	if err != nil {
		t.Fatal(err)
	}
	crashers := [][]byte{
		{}, {0x30}, {0x1f, 0x80}, {0x1f, 0x05}, {0x30, 0x81}, {0x30, 0x84, 0x01}, {0x30, 0x80}, {0x30, 0x80, 0, 0}, {0x24, 0x80, 0x24, 0x80},
		{0x30, 0x84, 0xff, 0xff, 0xff, 0xff}, {0x30, 0x82, 0xff, 0xff}, {0x3f, 0xff, 0xff, 0xff}, {0x00, 0x00}, {0x04, 0x80},
		bytes.Repeat([]byte{0x30, 0x80}, 8<<10), bytes.Repeat([]byte{0x24, 0x80}, 8<<10), bytes.Repeat([]byte{0xff}, 8<<10),
	}
	for i := range raw {
		crashers = append(crashers, raw[:i])
	}
	for _, b := range crashers {
		got, err := a.Verify(t.Context(), pkcs7Proof(base64.StdEncoding.EncodeToString(b)))
		if err == nil {
			t.Errorf("%x was accepted", b)
		}
		if len(b) < 10 || len(b)%500 == 0 {
			stillGood(t, got, err, func() error { _, err := a.Verify(t.Context(), pkcs7Proof(file(t, z1))); return err })
		}
	}
}

// A parser that panics all the same refuses, and holds nothing up.
func TestRecovered(t *testing.T) {
	fails := func() (instance Instance, err error) {
		defer recovered(&instance, &err)
		instance.ID = "half"
		var none []byte
		_ = none[len(instance.ID)]
		return instance, nil
	}
	if got, err := fails(); err == nil || got != (Instance{}) || !strings.Contains(err.Error(), "a parser failed: runtime error: index out of range") {
		t.Errorf("%+v, %v", got, err)
	}
}

// publisher serves certificates as the hosts on the list do, on loopback.
type publisher struct {
	*Azure
	mu    sync.Mutex
	asked []string
}

// publish makes a verifier whose way to the network ends at h, whatever the address.
func publish(t *testing.T, root *x509.Certificate, h http.HandlerFunc) *publisher {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &publisher{Azure: newAzure(t, AzureConfig{Certificates: []*x509.Certificate{root}})}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		p.asked = append(p.asked, r.Host+r.URL.Path)
		p.mu.Unlock()
		h(w, r)
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close(); <-done })
	p.issuers.lookup = func(context.Context, string) ([]netip.Addr, error) {
		return []netip.Addr{netip.MustParseAddr("20.42.0.1")}, nil
	}
	p.issuers.dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, l.Addr().String())
	}
	return p
}

func (p *publisher) requests() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.asked, " ")
}

func TestAzureFetchesIssuers(t *testing.T) {
	s := newSigner(t, testnet.AzureLeaf{IssuerURLs: []string{
		"http://evil.example/int.crt", "http://www.microsoft.com/pkiops/certs/gone.crt", "http://caissuers.microsoft.com/pkiops/certs/int.crt"}})
	p := publish(t, s.Root(), func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "gone.crt") {
			http.NotFound(w, r)
			return
		}
		w.Write(s.Issuing().Raw)
	})
	document := azureNow().String()
	for range 3 {
		if _, err := p.Verify(t.Context(), signed(t, s, document)); err != nil {
			t.Fatal(err)
		}
	}
	// The URL off the list was skipped, and both others were asked once.
	if got, want := p.requests(), "www.microsoft.com/pkiops/certs/gone.crt caissuers.microsoft.com/pkiops/certs/int.crt"; got != want {
		t.Errorf("asked for %q, want %q", got, want)
	}
}

// Where fetches take their time, those beyond a few do not wait, and are not refused for good.
func TestAzureDoesNotWaitToFetch(t *testing.T) {
	arrived, release := make(chan struct{}), make(chan struct{})
	first := newSigner(t, testnet.AzureLeaf{IssuerURLs: []string{"http://www.microsoft.com/int.crt"}})
	p := publish(t, first.Root(), func(w http.ResponseWriter, r *http.Request) {
		arrived <- struct{}{}
		<-release
		w.Write(first.Issuing().Raw)
	})
	proof := signed(t, first, azureNow().String())
	done := make(chan error)
	for range fetchers {
		go func() { _, err := p.Verify(t.Context(), proof); done <- err }()
		<-arrived
	}
	if _, err := p.Verify(t.Context(), proof); !errors.Is(err, ErrUnavailable) {
		t.Errorf("one more: %v, want ErrUnavailable", err)
	}
	close(release)
	for range fetchers {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if _, err := p.Verify(t.Context(), proof); err != nil {
		t.Errorf("after that: %v", err)
	}
}

func TestAzureFetchesRecursively(t *testing.T) {
	for _, test := range []struct {
		hops int
		want string // in the error; empty means accepted
	}{{1, ""}, {2, ""}, {3, ""}, {4, "unknown authority"}} {
		chain := longChain(t, test.hops)
		p := publish(t, chain.root, chain.serve)
		_, err := p.Verify(t.Context(), pkcs7Proof(chain.sign(t, azureNow().String())))
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%d hops: %v, want %q", test.hops, err, test.want)
		}
		if n := len(strings.Fields(p.requests())); n > maxFetched {
			t.Errorf("%d hops: %d requests", test.hops, n)
		}
	}
}

// chain is a chain with any number of intermediates, each of which says where the next is.
type chain struct {
	root, leaf *x509.Certificate
	key        *rsa.PrivateKey
	published  map[string][]byte
}

func longChain(t *testing.T, hops int) chain {
	t.Helper()
	c := chain{published: map[string][]byte{}}
	var parent *x509.Certificate
	var parentKey *rsa.PrivateKey
	for i := hops + 1; i >= 0; i-- {
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: fmt.Sprintf("CA %d of %d", i, hops)},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true, IsCA: i > 0,
		}
		if i <= hops {
			template.IssuingCertificateURL = []string{fmt.Sprintf("http://www.microsoft.com/pkiops/certs/%d.crt", i+1)}
		}
		if i == 0 {
			template.DNSNames, template.ExtKeyUsage = []string{"metadata.azure.com"}, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}
		if parent == nil {
			parent, parentKey = template, key
		}
		der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		c.published[fmt.Sprintf("/pkiops/certs/%d.crt", i)] = der
		if i == hops+1 {
			c.root = cert
		}
		c.leaf, c.key, parent, parentKey = cert, key, cert, key
	}
	return c
}

func (c chain) serve(w http.ResponseWriter, r *http.Request) { w.Write(c.published[r.URL.Path]) }

func (c chain) sign(t *testing.T, document string) string {
	t.Helper()
	sum := sha256.Sum256([]byte(document))
	signature, err := rsa.SignPKCS1v15(nil, c.key, crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	sample := signed(t, newSigner(t, testnet.AzureLeaf{}), document)
	return rebuilt(t, sample.Signature, func(i *contentInfo) {
		setCertificates(i, c.leaf)
		i.Content.Signers[0].Signature = signature
		i.Content.Signers[0].IssuerAndSerial = issuerAndSerial{asn1.RawValue{FullBytes: c.leaf.RawIssuer}, c.leaf.SerialNumber}
	})
}

func TestAzureIssuerAnswers(t *testing.T) {
	s := newSigner(t, testnet.AzureLeaf{IssuerURLs: []string{"http://www.microsoft.com/int.crt"}})
	stranger := newSigner(t, testnet.AzureLeaf{})
	for name, test := range map[string]struct {
		answer http.HandlerFunc
		want   string
	}{
		"PEM": {func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintf(w, "-----BEGIN CERTIFICATE-----\n%s\n-----END CERTIFICATE-----\n", base64.StdEncoding.EncodeToString(s.Issuing().Raw))
		}, ""},
		"a long answer": {func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, maxIssuer+1)) }, "more than 65536 bytes"},
		"a page":        {func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") }, "malformed"},
		"another's":     {func(w http.ResponseWriter, _ *http.Request) { w.Write(stranger.Issuing().Raw) }, "did not sign it"},
		"an error":      {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", 500) }, "status 500"},
		"too many redirects": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://www.microsoft.com/x", http.StatusFound)
		}, "too many redirects"},
		"a redirect off the list": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://169.254.169.254/", http.StatusFound)
		}, "not one that publishes"},
	} {
		p := publish(t, s.Root(), test.answer)
		_, err := p.Verify(t.Context(), signed(t, s, azureNow().String()))
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
		asked := len(strings.Fields(p.requests()))
		if _, err := p.Verify(t.Context(), signed(t, s, azureNow().String())); test.want != "" && err == nil {
			t.Errorf("%s: accepted the second time", name)
		}
		if now := len(strings.Fields(p.requests())); now != asked {
			t.Errorf("%s: asked %d times more, though it was just asked", name, now-asked)
		}
	}
}

// TestAzureSSRF shows that a certificate of a stranger's making, sent by somebody who is not known yet,
// makes this server ask nobody: not on loopback, link-local or private addresses, by name, by number,
// by a name that leads there, or by a redirect. (CVE-2026-45796)
func TestAzureSSRF(t *testing.T) {
	var connections atomic.Int32
	trap := func(address string) string {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				connections.Add(1)
				conn.Close()
			}
		}()
		t.Cleanup(func() { l.Close(); <-done })
		return l.Addr().String()
	}
	here := trap("127.0.0.1:0")
	here6 := trap("[::1]:0")
	_, port, err := net.SplitHostPort(here)
	if err != nil {
		t.Fatal(err)
	}
	s := newSigner(t, testnet.AzureLeaf{})
	renew := func(leaf testnet.AzureLeaf) {
		t.Helper()
		if err := s.Renew(leaf); err != nil {
			t.Fatal(err)
		}
	}
	try := func(name string, lookup func(string) []netip.Addr, urls ...string) {
		t.Helper()
		renew(testnet.AzureLeaf{IssuerURLs: urls})
		a, err := NewAzure(AzureConfig{})
		if err != nil {
			t.Fatal(err)
		}
		dialled := false
		a.issuers.dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			dialled = true
			return new(net.Dialer).DialContext(ctx, network, address)
		}
		looked := false
		a.issuers.lookup = func(_ context.Context, host string) ([]netip.Addr, error) {
			looked = true
			if lookup == nil {
				return nil, errors.New("not expected")
			}
			return lookup(host), nil
		}
		if _, err := a.Verify(t.Context(), signed(t, s, azureNow().String())); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if dialled || lookup == nil && looked {
			t.Errorf("%s: dialled %v, looked up %v", name, dialled, looked)
		}
	}
	for _, u := range []string{
		"http://" + here + "/x", "http://" + here6 + "/x", "http://localhost:" + port + "/x", "https://" + here + "/x",
		"http://169.254.169.254/latest/meta-data/", "http://[fd00:ec2::254]/", "http://10.0.0.1/", "http://192.168.1.1/", "http://172.16.0.1/",
		"http://2130706433:" + port + "/", "http://0x7f.1:" + port + "/", "http://[::ffff:127.0.0.1]:" + port + "/", "http://0:" + port + "/",
		"http://www.microsoft.com:" + port + "/", "http://www.microsoft.com@" + here + "/", "http://" + here + "#www.microsoft.com",
		"http://www.microsoft.com." + here + "/", "http://www.microsoft.com.evil.example/", "http://evilwww.microsoft.com/",
		"ftp://www.microsoft.com/", "file:///etc/passwd", "ldap://www.microsoft.com/", "//www.microsoft.com/", "http:www.microsoft.com", ":", "",
	} {
		try(u, nil, u)
	}
	// A host of the list whose name leads somewhere else.
	for _, address := range []string{
		"127.0.0.1", "127.8.8.8", "::1", "169.254.169.254", "fe80::1", "10.1.2.3", "172.20.0.1", "192.168.0.1", "fd00:ec2::254", "100.64.0.1",
		"0.0.0.0", "::", "255.255.255.255", "224.0.0.1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::1", "2001::1",
		"192.0.0.1", "198.18.0.1", "240.0.0.1", "fec0::1",
	} {
		try("www.microsoft.com at "+address, func(string) []netip.Addr { return []netip.Addr{netip.MustParseAddr(address)} }, "http://www.microsoft.com/x")
	}
	// A host of the list that redirects: the first request goes out, the one it asks for does not.
	for _, to := range []string{"http://" + here + "/x", "http://localhost:" + port + "/", "http://169.254.169.254/", "https://evil.example/", "http://www.microsoft.com:" + port + "/"} {
		renew(testnet.AzureLeaf{IssuerURLs: []string{"http://www.microsoft.com/x"}})
		p := publish(t, s.Root(), func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, to, http.StatusFound) })
		if _, err := p.Verify(t.Context(), signed(t, s, azureNow().String())); err == nil {
			t.Errorf("a redirect to %s: accepted", to)
		}
		if got := p.requests(); got != "www.microsoft.com/x" {
			t.Errorf("a redirect to %s: asked for %q", to, got)
		}
	}
	// Nothing is fetched for one whose signature or name does not fit, whatever his URLs.
	issuerURLs := []string{"http://www.microsoft.com/x"}
	renew(testnet.AzureLeaf{Names: []string{"evil.example"}, IssuerURLs: issuerURLs})
	misnamed := signed(t, s, azureNow().String())
	renew(testnet.AzureLeaf{IssuerURLs: issuerURLs})
	forged := signed(t, s, azureNow().String())
	forged.Signature = rebuilt(t, forged.Signature, func(i *contentInfo) { i.Content.Signers[0].Signature[0] ^= 1 })
	for name, proof := range map[string]AzureProof{"a name that does not fit": misnamed, "a signature that does not fit": forged} {
		p := publish(t, s.Root(), http.NotFound)
		if _, err := p.Verify(t.Context(), proof); err == nil || p.requests() != "" {
			t.Errorf("%s: %v, asked for %q", name, err, p.requests())
		}
	}
	if n := connections.Load(); n != 0 {
		t.Errorf("%d connections were made", n)
	}
}

func TestPublic(t *testing.T) {
	for text, want := range map[string]bool{
		"20.42.0.1": true, "8.8.8.8": true, "2600:1f18::1": true, "2a01:111::1": true, "::ffff:8.8.8.8": true,
		"2001:db8::1": false, "3fff::1": false, "4000::1": false, "203.0.113.1": false, "fe80::1%eth0": false,
	} {
		if got := public(netip.MustParseAddr(text)); got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
	}
}

// What is remembered stays bounded, and what is good stays when failures pile up.
func TestIssuersForget(t *testing.T) {
	f := newIssuers()
	s := newSigner(t, testnet.AzureLeaf{})
	f.remember("good", s.Issuing(), nil)
	for i := range 3 * maxIssuers {
		f.remember(fmt.Sprint(i), nil, errors.New("gone"))
		if len(f.found) > maxIssuers {
			t.Fatalf("%d remembered", len(f.found))
		}
	}
	if r, ok := f.remembered("good"); !ok || r.cert == nil {
		t.Error("a good certificate was forgotten")
	}
}

func TestAzurePins(t *testing.T) {
	now := time.Date(2026, 11, 26, 0, 0, 0, 0, time.UTC)
	pins := newAzure(t, AzureConfig{Now: at(now)}).Pins()
	names := map[string]bool{}
	for _, p := range pins {
		names[p.Name] = true
		if p.Ends.Before(now) {
			t.Errorf("%s is over", p.Name)
		}
	}
	for i := 2; i <= 16; i += 2 {
		if name := fmt.Sprintf("Microsoft TLS G2 RSA CA OCSP %02d", i); !names[name] {
			t.Errorf("%s is not there", name)
		}
	}
	for _, root := range []string{"DigiCert Global Root G2", "DigiCert Global Root G3", "DigiCert Global Root CA", "Microsoft TLS RSA Root G2"} {
		if !names[root] {
			t.Errorf("%s is not there", root)
		}
	}
	if _, err := NewAzure(AzureConfig{Certificates: []*x509.Certificate{newSigner(t, testnet.AzureLeaf{}).Leaf()}}); err == nil || !strings.Contains(err.Error(), "it is no CA") {
		t.Errorf("a leaf as CA: %v", err)
	}
}

func FuzzAzure(f *testing.F) {
	a := newAzure(f, AzureConfig{Now: at(z1Time)})
	good, err := base64.StdEncoding.DecodeString(file(f, z1))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte{0x1f, 0x05})
	f.Add([]byte{0x30, 0x80, 0x24, 0x80, 0x04, 0x01, 0x41, 0, 0, 0, 0})
	if b, err := base64.StdEncoding.DecodeString(file(f, z3)); err == nil {
		f.Add(b)
	}
	if b, err := base64.StdEncoding.DecodeString(signed(f, newSigner(f, testnet.AzureLeaf{}), azureNow().String()).Signature); err == nil {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := a.Verify(t.Context(), pkcs7Proof(base64.StdEncoding.EncodeToString(b)))
		if err == nil && !bytes.Equal(b, good) {
			t.Errorf("accepted %x as %+v", b, got)
		}
		stillGood(t, got, err, func() error { _, err := a.Verify(t.Context(), pkcs7Proof(file(t, z1))); return err })
	})
}
