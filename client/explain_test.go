package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/berthd/berth/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// answer serves one fixed response.
func answer(status int, contentType, body string, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", contentType)
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(status)
		fmt.Fprint(w, body)
	}
}

// Each row is a server that misbehaves for real; both a plain call and a WebSocket must be explained.
func TestExplain(t *testing.T) {
	const secret = wire.Secret("2f6c0a4e-planted-secret")
	plain := func(h http.HandlerFunc) func(*testing.T) string {
		return func(t *testing.T) string {
			s := httptest.NewServer(h)
			t.Cleanup(s.Close)
			return s.URL
		}
	}
	encrypted := func(t *testing.T) *httptest.Server {
		s := httptest.NewUnstartedServer(answer(200, "application/json", "{}"))
		s.Config.ErrorLog = nil
		s.StartTLS()
		t.Cleanup(s.Close)
		return s
	}
	for _, tt := range []struct {
		name  string
		url   func(*testing.T) string
		kind  Kind
		words []string
	}{
		{"https to an http server", func(t *testing.T) string {
			return strings.Replace(plain(answer(200, "application/json", "{}"))(t), "http:", "https:", 1)
		}, KindAddress, []string{"speaks plain http"}},
		{"http to an https server", func(t *testing.T) string {
			return strings.Replace(encrypted(t).URL, "https:", "http:", 1)
		}, KindAddress, []string{"speaks https"}},
		{"unknown authority", func(t *testing.T) string { return encrypted(t).URL }, KindTrust, []string{"does not trust", "BERTH_CA_FILE"}},
		{"html page", plain(answer(200, "text/html; charset=utf-8", "<html>log in</html>")), KindAddress, []string{"HTML page"}},
		{"redirect", plain(answer(302, "text/html", "", "Location", "https://login.example/")), KindAddress, []string{"redirects to https://login.example/"}},
		{"upgrade stripped", plain(answer(426, "text/plain", "upgrade required")), KindAddress, []string{"Upgrade header"}},
		{"nothing listens", func(t *testing.T) string {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			return "http://" + l.Addr().String()
		}, KindUnreachable, []string{"refused", "127.0.0.1:"}},
		{"connection closed", func(t *testing.T) string {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					// It closes once it has seen the request, so that the client waits for an answer.
					_, _ = c.Read(make([]byte, 1))
					c.Close()
				}
			}()
			return "http://" + l.Addr().String()
		}, KindUnreachable, []string{"closed the connection"}},
		{"401", plain(answer(401, "application/json", `{"message":"Workspace agent not authorized."}`)), KindRefused, []string{"not authorized", "token"}},
		{"404", plain(answer(404, "application/json", `{"message":"Instance with id \"i-1\" not found."}`)), KindUnknown, []string{"i-1", "declared"}},
		{"409", plain(answer(409, "application/json", `{"message":"Multiple agents found with instance ID \"i-1\". Set CODER_AGENT_NAME to one of: a, b"}`)), KindAmbiguous, []string{"a, b", "BERTH_AGENT_NAME"}},
		{"401 with another clock", plain(answer(401, "application/json", `{"message":"Invalid GCP identity."}`, "Date", "Thu, 01 Jan 1970 00:00:00 GMT")), KindRefused, []string{"clock differs", "set the clocks"}},
		{"403", plain(answer(403, "application/json", `{"message":"Forbidden."}`)), KindRefused, []string{"Forbidden", "right to do this"}},
		{"an older build", plain(answer(400, "application/json", `{"message":"Resource found for id \"i-1\", but isn't registered on the latest history."}`)), KindUnknown, []string{"i-1", "new build"}},
		{"409 for another key", plain(answer(409, "application/json", `{"message":"Another key.","validations":[{"field":"proof_key","detail":"differs"}]}`)), KindAmbiguous, []string{"Another key", "forget its key"}},
		{"407", plain(answer(407, "text/plain", "log in")), KindAddress, []string{"proxy wants a login", "NO_PROXY"}},
		{"425", plain(answer(425, "application/json", `{"message":"The build still runs."}`)), KindEarly, []string{"still runs", "build is done"}},
		{"429", plain(answer(429, "application/json", `{"message":"Slow down."}`)), KindOften, []string{"Slow down", "less often"}},
		{"429 of a proxy", plain(answer(429, "text/html", "<html>slow down")), KindOften, []string{"proxy", "less often"}},
		{"503", plain(answer(503, "application/json", `{"message":"Starting."}`)), KindBusy, []string{"Starting", "wait"}},
		{"500", plain(answer(500, "application/json", `{"message":"An internal server error occurred.","detail":"disk full"}`)), KindServer, []string{"disk full"}},
		{"502 of a proxy", plain(answer(502, "text/html", "<html>bad gateway")), KindBusy, []string{"proxy"}},
		{"unknown name", func(*testing.T) string { return "http://no-such-host.invalid" }, KindUnreachable, []string{"no-such-host.invalid"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			u, err := url.Parse(tt.url(t))
			if err != nil {
				t.Fatal(err)
			}
			h, err := NewHTTP(HTTPConfig{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(h.CloseIdleConnections)
			c, err := New(Config{URL: u, HTTP: h, Token: func() wire.Secret { return secret }})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			_, callErr := c.Agents(ctx)
			_, linkErr := c.ConnectAgent(ctx)
			for what, err := range map[string]error{"call": callErr, "link": linkErr} {
				p := Explain(err)
				if p == nil {
					t.Fatalf("%s succeeded", what)
				}
				if p.Kind != tt.kind {
					t.Errorf("%s: kind %s, want %s (%v)", what, p.Kind, tt.kind, err)
				}
				for _, w := range tt.words {
					if !strings.Contains(p.Error(), w) {
						t.Errorf("%s: %q lacks %q", what, p, w)
					}
				}
				if strings.Contains(fmt.Sprintf("%+v %v", err, p), secret.Reveal()) {
					t.Errorf("%s: the token shows in %v", what, err)
				}
			}
		})
	}
}

func TestExplainNoAnswer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := New(Config{URL: &url.URL{Scheme: "http", Host: l.Addr().String()}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = c.BuildInfo(ctx)
	if p := Explain(err); p.Kind != KindUnreachable || !strings.Contains(p.Error(), "firewall") {
		t.Errorf("explained as %s: %v", p.Kind, p)
	}
}

func TestExplainClock(t *testing.T) {
	cert := &x509.Certificate{NotBefore: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC)}
	for _, tt := range []struct {
		now  time.Time
		kind Kind
		want string
	}{
		{time.Unix(0, 0), KindClock, "clock says 1970-01-01"},
		{time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC), KindTrust, "expired on 2026-12-01"},
	} {
		if p := explainExpired(cert, tt.now); !strings.Contains(p.Error(), tt.want) || p.Kind != tt.kind {
			t.Errorf("%v: %s", tt.now, p)
		}
	}
	// The error arrives wrapped by the TLS layer.
	err := fmt.Errorf("dial: %w", &tls.CertificateVerificationError{Err: x509.CertificateInvalidError{Cert: cert, Reason: x509.Expired}})
	if p := Explain(err); p.Kind != KindTrust {
		t.Errorf("kind %s", p.Kind)
	}
}

func TestExplainDeadProxy(t *testing.T) {
	h, err := NewHTTP(HTTPConfig{})
	if err != nil {
		t.Fatal(err)
	}
	h.Transport.(*http.Transport).Proxy = http.ProxyURL(&url.URL{Scheme: "http", Host: "127.0.0.1:1"})
	c, err := New(Config{URL: &url.URL{Scheme: "http", Host: "berth.example.com"}, HTTP: h})
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Agents(t.Context())
	p := Explain(err)
	for _, word := range []string{"the proxy", "nothing listens at 127.0.0.1:1", "NO_PROXY"} {
		if p.Kind != KindUnreachable || !strings.Contains(p.Error(), word) {
			t.Errorf("%s: %q lacks %q", p.Kind, p, word)
		}
	}
}

func TestExplainRetryAfter(t *testing.T) {
	for _, tt := range []struct {
		status int
		header []string
		want   time.Duration
	}{
		{503, nil, 0},
		{503, []string{"Retry-After", "7"}, 7 * time.Second},
		{425, []string{"Retry-After", "2"}, 2 * time.Second},
		{429, []string{"Retry-After", "99999999999999999999"}, 0},
		{429, []string{"Retry-After", "4000000000"}, wire.MaxRetryAfter},
		{503, []string{"Retry-After", "-1"}, 0},
		{503, []string{"Date", "Thu, 26 Nov 2026 10:00:00 GMT", "Retry-After", "Thu, 26 Nov 2026 09:00:00 GMT"}, 0},
	} {
		for _, contentType := range []string{"application/json", "text/html"} {
			s := httptest.NewServer(answer(tt.status, contentType, `{"message":"wait"}`, tt.header...))
			u, err := url.Parse(s.URL)
			if err != nil {
				t.Fatal(err)
			}
			c, err := New(Config{URL: u, HTTP: s.Client()})
			if err != nil {
				t.Fatal(err)
			}
			_, err = c.Agents(t.Context())
			s.Close()
			if p := Explain(err); p.RetryAfter != tt.want && (contentType == "application/json" || tt.status != 425) {
				t.Errorf("%d %v %s: wait %v, want %v", tt.status, tt.header, contentType, p.RetryAfter, tt.want)
			}
		}
	}
}
