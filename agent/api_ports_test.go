package agent

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/berthd/berth/ports"
	"github.com/berthd/berth/wire"
)

// portsAPI serves an agent's API on loopback until the test ends.
func portsAPI(t *testing.T, cfg ports.Config) (url string, stop func() error) {
	t.Helper()
	a := testAPI()
	a.ports = ports.New(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	l := listenLoopback(t)
	served := make(chan error, 1)
	go func() { served <- a.serve(ctx, l) }()
	stop = func() error { cancel(); return <-served }
	t.Cleanup(func() {
		cancel()
		http.DefaultClient.CloseIdleConnections()
	})
	return "http://" + l.Addr().String(), stop
}

func getPorts(t *testing.T, url string) wire.ListeningPorts {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var list wire.ListeningPorts
	if err := json.NewDecoder(resp.Body).Decode(&list); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("status %d: %v", resp.StatusCode, err)
	}
	return list
}

func portOf(list wire.ListeningPorts, network string, port int) *wire.ListeningPort {
	for i, p := range list.Ports {
		if p.Network == network && int(p.Port) == port && p.Namespace == 0 {
			return &list.Ports[i]
		}
	}
	return nil
}

// TestListeningPorts: TCP for stock servers; UDP, and what is hidden, for those who ask.
func TestListeningPorts(t *testing.T) {
	url, stop := portsAPI(t, ports.Config{})
	hiding, stopHiding := portsAPI(t, ports.Config{HidePIDs: []int{os.Getpid()}})
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	tcp := listenLoopback(t)
	defer tcp.Close()
	u, p := udp.LocalAddr().(*net.UDPAddr).Port, tcp.Addr().(*net.TCPAddr).Port
	for query, want := range map[string][2]bool{"": {true, false}, "?network=all": {true, true}, "?network=udp": {true, false}} {
		list := getPorts(t, url+wire.PathAgentPorts+query)
		if got := [2]bool{portOf(list, "tcp", p) != nil, portOf(list, "udp", u) != nil}; got != want || list.Source == "" {
			t.Errorf("%q: TCP and UDP %v, want %v, from %q", query, got, want, list.Source)
		}
	}
	if got := portOf(getPorts(t, hiding+wire.PathAgentPorts), "tcp", p); got != nil {
		t.Errorf("a hidden port: %+v", got)
	}
	if got := portOf(getPorts(t, hiding+wire.PathAgentPorts+"?hidden=true"), "tcp", p); got == nil || got.Hidden != ports.Berthd {
		t.Errorf("a hidden port that is asked for: %+v", got)
	}
	if err := errors.Join(stop(), stopHiding()); err != nil {
		t.Error(err)
	}
}

// TestWatchPorts: the list at once, then each change within a second, and a goodbye.
func TestWatchPorts(t *testing.T) {
	url, stop := portsAPI(t, ports.Config{})
	conn, resp, err := websocket.Dial(t.Context(), url+wire.PathAgentPorts+"/watch?network=all", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.CloseNow()
	if resp.StatusCode != http.StatusSwitchingProtocols {
		t.Errorf("status %d", resp.StatusCode)
	}
	conn.SetReadLimit(4 << 20)
	// next reads messages until one is as wanted, and says how long that took.
	next := func(what string, ok func(wire.ListeningPorts) bool) time.Duration {
		t.Helper()
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		for {
			kind, message, err := conn.Read(ctx)
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			var list wire.ListeningPorts
			if err := json.Unmarshal(message, &list); err != nil || kind != websocket.MessageText || !strings.HasSuffix(string(message), "\n") {
				t.Fatalf("%s: %v in %q", what, err, message)
			}
			if ok(list) {
				return time.Since(began)
			}
		}
	}
	next("the list at once", func(list wire.ListeningPorts) bool { return list.Source != "" })
	for _, network := range []string{"tcp", "udp"} {
		var port int
		var l interface{ Close() error }
		if network == "tcp" {
			tcp := listenLoopback(t)
			l, port = tcp, tcp.Addr().(*net.TCPAddr).Port
		} else {
			udp, err := net.ListenPacket("udp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			l, port = udp, udp.LocalAddr().(*net.UDPAddr).Port
		}
		opened := next(network+" opened", func(list wire.ListeningPorts) bool {
			p := portOf(list, network, port)
			return p != nil && p.PID == os.Getpid()
		})
		l.Close()
		closed := next(network+" closed", func(list wire.ListeningPorts) bool { return portOf(list, network, port) == nil })
		t.Logf("%s: told after %v and %v", network, opened, closed)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if _, _, err := conn.Read(t.Context()); websocket.CloseStatus(err) != websocket.StatusGoingAway {
		t.Errorf("closed with %v, want 1001", err)
	}
}

func TestWatchPortsRefusals(t *testing.T) {
	a := testAPI()
	a.portWatchers.Store(maxWatchers)
	w := httptest.NewRecorder()
	a.handler().ServeHTTP(w, request("GET", wire.PathAgentPorts+"/watch", ""))
	if w.Code != 503 || !strings.Contains(w.Body.String(), "Too many watch this already.") {
		t.Errorf("too many: %d %s", w.Code, w.Body)
	}
}

// TestWhoAsksEngines: for names, where a list shows ports of containers, and for nobody else.
func TestWhoAsksEngines(t *testing.T) {
	here, inside, onHost := wire.ListeningPort{Port: 80}, wire.ListeningPort{Port: 80, Namespace: 7}, wire.ListeningPort{Port: 80, Container: "1a1a1a1a1a1a"}
	all := wire.PathAgentPorts + "?network=all"
	for _, tt := range []struct {
		path, refusal string
		list          []wire.ListeningPort
		want          bool
	}{
		{all, "", []wire.ListeningPort{here, inside}, true},
		{all, "", []wire.ListeningPort{here, onHost}, true},
		{all, "", []wire.ListeningPort{here}, false},
		{all, "switched off", []wire.ListeningPort{here, inside}, false},
		{wire.PathAgentPorts, "", []wire.ListeningPort{here, inside}, false},
	} {
		a := testAPI()
		a.containers.refusal = tt.refusal
		if got := a.unnamed(request("GET", tt.path, ""), tt.list); got != tt.want {
			t.Errorf("%s, %q, %+v: %v", tt.path, tt.refusal, tt.list, got)
		}
	}
}
