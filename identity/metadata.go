package identity

import (
	"net"
	"net/http"
	"time"
)

// Limits of a metadata service. It is on the same host and answers within milliseconds, except
// while a machine is starting.
const (
	metadataDialTimeout   = time.Second
	metadataHeaderTimeout = 2 * time.Second
	metadataMaxBody       = 64 << 10 // bytes; what clouds sign has 0.5 to 6 KiB
)

// metadataTransport carries the requests of one attempt to a link-local metadata service of any
// cloud: not through a proxy, which would carry another machine's identity or leak this one's, and
// with every body bounded, wherever it is read. It remembers how the last request went, since not
// every SDK passes that on.
type metadataTransport struct {
	http    http.Transport
	status  int   // of the last answer, 0 when there was none
	failure error // of the last request, nil when it was answered
}

func newMetadataTransport() *metadataTransport {
	return &metadataTransport{http: http.Transport{
		Proxy:                 nil,
		DialContext:           (&net.Dialer{Timeout: metadataDialTimeout}).DialContext,
		ResponseHeaderTimeout: metadataHeaderTimeout,
	}}
}

// client follows no redirect.
func (m *metadataTransport) client() *http.Client {
	return &http.Client{
		Transport:     m,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// RoundTrip implements [http.RoundTripper]. It is not for concurrent use.
func (m *metadataTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := m.http.RoundTrip(req)
	m.status, m.failure = 0, err
	if err == nil {
		m.status = resp.StatusCode
		resp.Body = http.MaxBytesReader(nil, resp.Body, metadataMaxBody)
	}
	return resp, err
}

func (m *metadataTransport) CloseIdleConnections() { m.http.CloseIdleConnections() }
