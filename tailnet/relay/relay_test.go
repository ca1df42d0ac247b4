package relay

import (
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/goleak"
	"tailscale.com/net/stun"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestHandler(t *testing.T) {
	s := New(nil, nil)
	defer s.Close()
	ts := httptest.NewServer(s.Handler())
	defer ts.Close()
	for _, tt := range []struct {
		method, path, upgrade string
		want                  int
	}{
		{"GET", "/derp", "", http.StatusUpgradeRequired},
		{"GET", "/derp", "something", http.StatusUpgradeRequired},
		{"GET", "/derp", "DERP", http.StatusSwitchingProtocols},
		{"GET", "/derp/latency-check", "", http.StatusOK},
		{"HEAD", "/derp/probe", "", http.StatusOK},
		{"POST", "/derp/latency-check", "", http.StatusMethodNotAllowed},
		{"GET", "/other", "", http.StatusNotFound},
	} {
		req, err := http.NewRequest(tt.method, ts.URL+tt.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if tt.upgrade != "" {
			req.Header.Set("Upgrade", tt.upgrade)
			req.Header.Set("Connection", "Upgrade")
		}
		resp, err := ts.Client().Transport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != tt.want {
			t.Errorf("%s %s, upgrade %q: %s, want %d", tt.method, tt.path, tt.upgrade, resp.Status, tt.want)
		}
	}
}

func TestSTUN(t *testing.T) {
	s := New(nil, nil)
	addr, err := s.ListenSTUN("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("udp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	tx := stun.NewTxID()
	c.Write([]byte("not STUN"))
	c.Write(stun.Request(tx))
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	buf := make([]byte, 1500)
	size, err := c.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	got, seen, err := stun.ParseResponse(buf[:size])
	if err != nil || got != tx || seen != c.LocalAddr().(*net.UDPAddr).AddrPort() {
		t.Errorf("answer %v, %v, %v", got, seen, err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := s.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second close: %v", err)
	}
	if _, err := s.ListenSTUN("127.0.0.1:0"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("listening after close: %v", err)
	}
}

func FuzzSTUN(f *testing.F) {
	f.Add(stun.Request(stun.NewTxID()))
	f.Add([]byte{})
	f.Add(make([]byte, 20))
	from := netip.MustParseAddrPort("192.0.2.1:7")
	f.Fuzz(func(t *testing.T, b []byte) {
		reply := stunReply(b, from)
		if reply == nil {
			return
		}
		if _, seen, err := stun.ParseResponse(reply); err != nil || seen != from {
			t.Errorf("answer %v, %v", seen, err)
		}
	})
}
