package testnet

import (
	"crypto/x509"
	"net/http"
	"sync"
)

// FakeAIA serves the certificates of issuers, as the places do that a certificate names for its
// issuer's (authority information access). It is an [http.Handler] that may be used by many at once.
type FakeAIA struct {
	mu    sync.Mutex
	certs map[string][]byte
	asked []string
}

// Publish has a certificate served at path, in DER.
func (f *FakeAIA) Publish(path string, cert *x509.Certificate) { f.PublishBytes(path, cert.Raw) }

// PublishBytes has anything served at path as if it were a certificate.
func (f *FakeAIA) PublishBytes(path string, body []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.certs == nil {
		f.certs = map[string][]byte{}
	}
	f.certs[path] = body
}

// Asked lists the paths that were asked for, one a request.
func (f *FakeAIA) Asked() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.asked...)
}

// ServeHTTP implements [http.Handler].
func (f *FakeAIA) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	body, ok := f.certs[r.URL.Path]
	f.asked = append(f.asked, r.URL.Path)
	f.mu.Unlock()
	if !ok {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/pkix-cert")
	_, _ = w.Write(body) // a caller that left misses it
}
