package client

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// authority issues certificates for tests.
type authority struct {
	t    *testing.T
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{t: t, key: key, cert: &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "tests"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}}
	der, err := x509.CreateCertificate(rand.Reader, a.cert, a.cert, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return a
}

// issue returns a client's certificate and key in PEM.
func (a *authority) issue(name string) (cert, key []byte) {
	a.t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, a.cert, &private.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		a.t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw})
}

func write(t *testing.T, path string, parts ...[]byte) string {
	t.Helper()
	var all []byte
	for _, p := range parts {
		all = append(all, p...)
	}
	if err := os.WriteFile(path, all, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestClientCertificate: a server that takes no client without a certificate takes ours, and what it does not take is explained.
func TestClientCertificate(t *testing.T) {
	trusted, other := newAuthority(t), newAuthority(t)
	pool := x509.NewCertPool()
	pool.AddCert(trusted.cert)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.TLS.PeerCertificates[0].Subject.CommonName)
	}))
	server.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
	server.Config.ErrorLog = nil
	server.StartTLS()
	t.Cleanup(server.Close)
	dir := t.TempDir()
	ca := write(t, filepath.Join(dir, "ca"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
	address, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}

	ask := func(t *testing.T, h *http.Client) (string, error) {
		t.Helper()
		h.CloseIdleConnections() // a connection of its own, and a handshake
		resp, err := h.Get(address.String())
		if err != nil {
			return "", Explain(err)
		}
		defer resp.Body.Close()
		var who string
		_, err = fmt.Fscan(resp.Body, &who)
		return who, err
	}
	reach := func(t *testing.T, config HTTPConfig) *http.Client {
		t.Helper()
		config.CAFile = ca
		h, err := NewHTTP(config)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(h.CloseIdleConnections)
		return h
	}

	cert, key := trusted.issue("one")
	certFile, keyFile := write(t, filepath.Join(dir, "cert"), cert), write(t, filepath.Join(dir, "key"), key)
	both := reach(t, HTTPConfig{CertFile: certFile, KeyFile: keyFile})
	if who, err := ask(t, both); err != nil || who != "one" {
		t.Errorf("%q, %v", who, err)
	}
	if who, err := ask(t, reach(t, HTTPConfig{CertFile: write(t, filepath.Join(dir, "pair"), cert, key)})); err != nil || who != "one" {
		t.Errorf("in one file: %q, %v", who, err)
	}

	// A renewed one is used as soon as both files are there.
	cert, key = trusted.issue("two")
	write(t, certFile, cert)
	if who, err := ask(t, both); err != nil || who != "one" {
		t.Errorf("half renewed: %q, %v", who, err)
	}
	write(t, keyFile, key)
	if who, err := ask(t, both); err != nil || who != "two" {
		t.Errorf("renewed: %q, %v", who, err)
	}

	foreignCert, foreignKey := other.issue("three")
	for name, config := range map[string]HTTPConfig{
		"none":         {},
		"another's":    {CertFile: write(t, filepath.Join(dir, "foreign"), foreignCert, foreignKey)},
		"not to trust": {CertFile: certFile, KeyFile: keyFile},
	} {
		if name == "not to trust" {
			write(t, certFile, foreignCert)
			write(t, keyFile, foreignKey)
		}
		if who, err := ask(t, reach(t, config)); err == nil || !strings.Contains(err.Error(), "takes no client without a certificate that it trusts; give one with BERTH_CLIENT_CERT") {
			t.Errorf("%s: %q, %v", name, who, err)
		}
	}
	for name, config := range map[string]HTTPConfig{
		"no file":           {CertFile: filepath.Join(dir, "none")},
		"no key":            {CertFile: write(t, filepath.Join(dir, "half"), cert)},
		"a key alone":       {KeyFile: keyFile},
		"another's key":     {CertFile: write(t, filepath.Join(dir, "mixed"), cert), KeyFile: keyFile},
		"no PEM in it":      {CertFile: write(t, filepath.Join(dir, "text"), []byte("hello"))},
		"a key in its room": {CertFile: write(t, filepath.Join(dir, "turned"), key), KeyFile: keyFile},
	} {
		if _, err := NewHTTP(config); err == nil || !strings.Contains(err.Error(), "client") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
