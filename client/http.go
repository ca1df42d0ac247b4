package client

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	// The public roots, for where the system has none: an image made from scratch, a bare container.
	_ "golang.org/x/crypto/x509roots/fallback"
)

// HTTPConfig says how the server is reached. It holds for API calls, the RPC link and the relay alike.
type HTTPConfig struct {
	// CAFile names PEM certificates that are trusted beside the system's; empty means none.
	CAFile string
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
