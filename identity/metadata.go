package identity

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// linkLocal is where every cloud has its metadata service.
const linkLocal = "http://169.254.169.254"

// Limits of a metadata service. It is on the same host and answers within milliseconds, except
// while a machine is starting.
const (
	metadataDialTimeout   = time.Second
	metadataHeaderTimeout = 2 * time.Second
	metadataProbeTimeout  = time.Second
	metadataMaxBody       = 64 << 10 // bytes; what clouds sign has 0.5 to 6 KiB
)

// metadata carries the requests of one attempt to the metadata service at one endpoint: not through a
// proxy, which would carry another machine's identity or leak this one's, following no redirect, and
// with every body bounded, wherever it is read. It remembers how the last request went, since not
// every SDK passes that on.
type metadata struct {
	endpoint string // scheme and host, without a final slash
	http     http.Transport
	status   int         // of the last answer, 0 when there was none
	header   http.Header // of the last answer
	failure  error       // of the last request, nil when it was answered
}

func newMetadata(endpoint string) *metadata {
	return &metadata{
		endpoint: strings.TrimRight(endpoint, "/"),
		http: http.Transport{
			Proxy:                 nil,
			DialContext:           (&net.Dialer{Timeout: metadataDialTimeout}).DialContext,
			ResponseHeaderTimeout: metadataHeaderTimeout,
		},
	}
}

func (m *metadata) client() *http.Client {
	return &http.Client{
		Transport:     m,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// RoundTrip implements [http.RoundTripper]. It is not for concurrent use.
func (m *metadata) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := m.http.RoundTrip(req)
	m.status, m.header, m.failure = 0, nil, err
	if err == nil {
		m.status, m.header = resp.StatusCode, resp.Header
		resp.Body = http.MaxBytesReader(nil, resp.Body, metadataMaxBody)
	}
	return resp, err
}

func (m *metadata) close() { m.http.CloseIdleConnections() }

// ask makes a request with headers given by name and value, and returns the whole body of an answer
// of any status.
func (m *metadata) ask(ctx context.Context, method, path string, header ...string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, method, m.endpoint+path, nil)
	if err != nil {
		return "", err
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := m.client().Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

// reachable returns the first of the endpoints of one service that takes a connection; when none does,
// the first in the list.
func reachable(ctx context.Context, endpoints []string) string {
	if len(endpoints) == 1 {
		return endpoints[0]
	}
	ctx, cancel := context.WithTimeout(ctx, metadataDialTimeout)
	defer cancel()
	taken := make(chan string, len(endpoints))
	for _, endpoint := range endpoints {
		go func() {
			if !connects(ctx, endpoint) {
				endpoint = ""
			}
			taken <- endpoint
		}()
	}
	found := ""
	for range endpoints {
		if endpoint := <-taken; endpoint != "" && found == "" {
			found = endpoint
			cancel()
		}
	}
	if found == "" {
		found = endpoints[0]
	}
	return found
}

func connects(ctx context.Context, endpoint string) bool {
	u, err := url.Parse(endpoint)
	if err != nil {
		return false
	}
	host := u.Host
	if u.Port() == "" {
		host += ":80"
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", host)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// instead is the end of many a fix.
const instead = "or use a token file (--auth token --token-file)"

// explain says why the metadata service of a cloud gave nothing, and what to do about it.
func (m *metadata) explain(ctx context.Context, c cloud, err error) error {
	if known := new(Failure); errors.As(err, &known) {
		return err
	}
	if f := c.explain(ctx, m); f != nil {
		f.err = err
		return f
	}
	f := &Failure{err: err}
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case m.header.Get("Via") != "" || m.status == http.StatusProxyAuthRequired:
		f.Cause = fmt.Sprintf("a proxy answers in place of %s's metadata service at %s (status %d)", c.title(), m.endpoint, m.status)
		f.Fix = "exempt that address from the proxy or the redirection to it"
	case m.status >= 400 && m.status < 500 && m.status != http.StatusTooManyRequests:
		switch whose := m.whose(ctx, c); whose {
		case nil:
			f.Cause = fmt.Sprintf("what answers at %s is not %s's metadata service (status %d)", m.endpoint, c.title(), m.status)
			f.Fix = "choose the cloud that this machine is on, or --auth auto to find it, " + instead
		case c:
			f.Cause = fmt.Sprintf("%s's metadata service at %s refuses to say who this machine is (status %d)", c.title(), m.endpoint, m.status)
			f.Fix = "see what on this machine or in its cloud restricts the service, " + instead
		default:
			f.Cause = fmt.Sprintf("this machine is not on %s but on %s", c.title(), whose.title())
			f.Fix = "choose --auth " + authOf(whose)
		}
	case m.status != 0 && m.failure == nil:
		f.Cause = fmt.Sprintf("%s's metadata service at %s gave a strange answer (status %d): %v", c.title(), m.endpoint, m.status, err)
		f.Fix = "see whether something else answers there, " + instead
	case isDial(m.failure):
		f.Cause = fmt.Sprintf("there is no metadata service at %s (%v)", m.endpoint, m.failure)
		f.Fix = fmt.Sprintf("if this machine is on %s, let it through the firewall or network policy; else choose another --auth, %s", c.title(), instead)
	default:
		f.Cause = fmt.Sprintf("%s's metadata service at %s does not answer: %v", c.title(), m.endpoint, err)
		f.Fix = "see that no firewall, network policy or hypervisor keeps the answer back, " + instead
	}
	return f
}

// whose returns the cloud whose service it really is at the endpoint, nil if none's is known to be. c's is
// asked last.
func (m *metadata) whose(ctx context.Context, c cloud) cloud {
	ctx, cancel := context.WithTimeout(ctx, metadataProbeTimeout)
	defer cancel()
	for _, other := range clouds {
		if other != c && answersAs(ctx, other, m.endpoint) {
			return other
		}
	}
	if answersAs(ctx, c, m.endpoint) {
		return c
	}
	return nil
}

// isDial tells whether a request failed before there was a connection.
func isDial(err error) bool {
	var dial *net.OpError
	return errors.As(err, &dial) && dial.Op == "dial"
}
