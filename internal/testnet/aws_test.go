package testnet

import (
	"context"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/berthd/berth/identity/attest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newFake(t *testing.T) (*FakeAWS, string) {
	t.Helper()
	f, err := NewFakeAWS()
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(f)
	t.Cleanup(srv.Close)
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	return f, srv.URL
}

func do(t *testing.T, method, url string, header ...string) (status int, body string, h http.Header) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b), resp.Header
}

func TestFakeAWSToken(t *testing.T) {
	_, url := newFake(t)
	const ttl = "X-aws-ec2-metadata-token-ttl-seconds"
	for _, test := range []struct {
		name, method string
		header       []string
		want         int
	}{
		{"good", "PUT", []string{ttl, "60"}, 200},
		{"longest", "PUT", []string{ttl, "21600"}, 200},
		{"no TTL", "PUT", nil, 400},
		{"TTL 0", "PUT", []string{ttl, "0"}, 400},
		{"TTL too long", "PUT", []string{ttl, "21601"}, 400},
		{"TTL no number", "PUT", []string{ttl, "1h"}, 400},
		{"through a proxy", "PUT", []string{ttl, "60", "X-Forwarded-For", "10.0.0.1"}, 403},
		{"GET", "GET", []string{ttl, "60"}, 405},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, body, h := do(t, test.method, url+"/latest/api/token", test.header...)
			if got != test.want {
				t.Fatalf("status %d, want %d: %s", got, test.want, body)
			}
			if got == 200 && h.Get(ttl) != test.header[1] {
				t.Errorf("TTL %q in the answer", h.Get(ttl))
			}
		})
	}
}

func TestFakeAWSReads(t *testing.T) {
	f, url := newFake(t)
	_, token, _ := do(t, "PUT", url+"/latest/api/token", awsTTLHeader, "60")
	get := func(path string, header ...string) (int, string) {
		status, body, _ := do(t, "GET", url+path, header...)
		return status, body
	}
	const id = "/latest/meta-data/instance-id"
	for name, token := range map[string]string{
		"none": "", "forged": token[:len(token)-4] + "AAAA", "short": "AAAA",
		"expired": f.token(time.Now().Add(-time.Second)),
	} {
		if status, _ := get(id, awsTokenHeader, token); status != 401 {
			t.Errorf("token %s: status %d, want 401", name, status)
		}
	}
	if status, body := get(id, awsTokenHeader, token); status != 200 || body != f.InstanceID() {
		t.Errorf("instance id: %d %q", status, body)
	}
	if status, _ := get("/latest/dynamic/instance-identity/nothing", awsTokenHeader, token); status != 404 {
		t.Errorf("unknown path: %d", status)
	}
	_, document := get("/latest/dynamic/instance-identity/document", awsTokenHeader, token)
	_, signature := get("/latest/dynamic/instance-identity/signature", awsTokenHeader, token)
	_, rsa2048 := get("/latest/dynamic/instance-identity/rsa2048", awsTokenHeader, token)
	if !strings.Contains(signature, "\n") || len(signature) != 174 {
		t.Errorf("signature of %d bytes is not base64 of 128 in lines of 76", len(signature))
	}
	verifier, err := attest.NewAWS(attest.AWSConfig{Certificates: map[string][]*x509.Certificate{FakeAWSRegion: f.Certificates()}})
	if err != nil {
		t.Fatal(err)
	}
	instance, err := verifier.Verify(t.Context(), attest.AWSProof{Document: document, Signature: signature, RSA2048: rsa2048})
	if err != nil {
		t.Fatal(err)
	}
	if instance.ID != f.InstanceID() || instance.Region != FakeAWSRegion {
		t.Errorf("verified as %+v", instance)
	}
}

func TestFakeAWSModes(t *testing.T) {
	f, url := newFake(t)
	f.SetMode(AWSOff)
	if status, _, _ := do(t, "PUT", url+"/latest/api/token", awsTTLHeader, "60"); status != 403 {
		t.Errorf("off: %d, want 403", status)
	}
	f.SetMode(AWSHopLimit)
	if status, _, _ := do(t, "GET", url+"/latest/meta-data/"); status != 401 {
		t.Errorf("hop limit, GET: %d, want 401", status)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "PUT", url+"/latest/api/token", nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := http.DefaultClient.Do(req); err == nil {
		resp.Body.Close()
		t.Errorf("hop limit, PUT: %s, want no answer", resp.Status)
	}
}

func TestServe(t *testing.T) {
	f, _ := newFake(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- Serve(ctx, ln, f) }()
	if status, _, _ := do(t, "GET", "http://"+ln.Addr().String()+"/"); status != 401 {
		t.Errorf("status %d, want 401", status)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
