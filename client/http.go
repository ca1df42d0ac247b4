package client

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"time"

	// The public roots, for where the system has none: an image made from scratch, a bare container.
	_ "golang.org/x/crypto/x509roots/fallback"
)

// HTTPConfig says how the server is reached. It holds for API calls, the RPC link and the relay alike.
type HTTPConfig struct {
	// CAFile names PEM certificates that are trusted beside the system's; empty means none.
	CAFile string
	// CertFile and KeyFile name the PEM certificate, with its chain, and key by which a proxy in front of the server knows this
	// machine; empty means none. They are read anew for each connection. KeyFile may be empty if both are in one file.
	CertFile, KeyFile string
}

// certificate returns what makes the client's certificate for a connection, nil if there is none. A pair that cannot be read any
// more, as while it is being replaced, is no reason to leave the last one.
func (c HTTPConfig) certificate() (func(*tls.CertificateRequestInfo) (*tls.Certificate, error), error) {
	if c.CertFile == "" {
		if c.KeyFile != "" {
			return nil, errors.New("cannot use a client key without its certificate")
		}
		return nil, nil
	}
	read := func() (*tls.Certificate, error) {
		pair, err := tls.LoadX509KeyPair(c.CertFile, cmp.Or(c.KeyFile, c.CertFile))
		if err != nil {
			return nil, fmt.Errorf("cannot use the client certificate: %w", err)
		}
		return &pair, nil
	}
	first, err := read()
	if err != nil {
		return nil, err
	}
	var last atomic.Pointer[tls.Certificate]
	last.Store(first)
	return func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		if now, err := read(); err == nil {
			last.Store(now)
		}
		return last.Load(), nil
	}, nil
}

// How long reaching the server may take. Dialling is short so that a filtered port is named soon;
// the answer may be slow, for it can wait for an agent.
const (
	dialTimeout   = 10 * time.Second
	answerTimeout = 45 * time.Second
)

// NewHTTP returns the HTTP client for everything that goes to the control server. It honours the
// proxy variables of the environment, follows no redirect, and speaks HTTP/1.1 only, which WebSockets
// need.
func NewHTTP(config HTTPConfig) (*http.Client, error) {
	tlsConfig := &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}
	if config.CAFile != "" {
		pem, err := os.ReadFile(config.CAFile)
		if err != nil {
			return nil, fmt.Errorf("cannot read the CA file: %w", err)
		}
		roots, err := x509.SystemCertPool()
		if err != nil {
			roots = x509.NewCertPool()
		}
		if !roots.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("cannot use CA file %s: it holds no PEM certificate", config.CAFile)
		}
		tlsConfig.RootCAs = roots
	}
	var err error
	if tlsConfig.GetClientCertificate, err = config.certificate(); err != nil {
		return nil, err
	}
	return &http.Client{
		Transport: &http.Transport{
			Proxy:                 http.ProxyFromEnvironment,
			DialContext:           (&net.Dialer{Timeout: dialTimeout}).DialContext,
			TLSClientConfig:       tlsConfig,
			TLSHandshakeTimeout:   dialTimeout,
			ResponseHeaderTimeout: answerTimeout,
			IdleConnTimeout:       time.Minute,
			MaxIdleConnsPerHost:   2,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}
