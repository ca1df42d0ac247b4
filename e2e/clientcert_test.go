package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestClientCertificate: the way to the server leads by a proxy that takes no client without a certificate and a header. API, link
// and relay go that way, for berthd and for berth.
func TestClientCertificate(t *testing.T) {
	m := newMachine(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{ // the proxy's, the client's, and who issued both
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "all"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	ca, pair := filepath.Join(m.home, "ca.pem"), filepath.Join(m.home, "me.pem")
	public := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	for path, text := range map[string][]byte{ca: public, pair: append(public, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})...)} {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(public) {
		t.Fatal("no certificate")
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
	})
	if err != nil {
		t.Fatal(err)
	}
	front := "https://" + l.Addr().String()

	r := newRoadOn(m, "agents:\n  - name: box\n", "--access-url", front, "--relay-only")
	var relayed atomic.Int64
	proxy := &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: &httputil.ReverseProxy{Rewrite: func(p *httputil.ProxyRequest) {
		p.Out.URL.Scheme, p.Out.URL.Host = "http", r.addr
		if p.In.URL.Path == "/derp" {
			relayed.Add(1)
		}
	}}}
	go proxy.Serve(l)
	defer proxy.Close()

	newMachine(t).trouble(front, "takes no client without a certificate", 20*time.Second, "BERTH_CA_FILE="+ca)
	r.agent = r.start("berthd", []string{"BERTH_URL=" + front, "BERTH_TOKEN=" + r.token, "BERTH_CA_FILE=" + ca, "BERTH_CLIENT_CERT=" + pair},
		"run", "--state-dir", filepath.Join(r.home, "state"))
	r.waitConnected(20 * time.Second)
	cmd := r.client("--url", front, "--ca-file", ca, "--client-cert", pair, "ssh", "box", "echo arrived; berthd stat mem >/dev/null && echo asked")
	cmd.Stderr = t.Output()
	out, err := cmd.Output()
	if err != nil || strings.TrimSpace(string(out)) != "arrived\nasked" {
		t.Errorf("%v: %q", err, out)
	}
	if n := relayed.Load(); n < 2 {
		t.Errorf("%d connections to the relay came by way of the proxy, want those of both sides", n)
	}
}
