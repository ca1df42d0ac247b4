package conformance

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/crypto/ssh"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// secondAgent is a second agent of the protocol, from the pages alone: the RPC socket, manifest, startup,
// lifecycle, stats and coordination, a node, and the services that the command line and the server use.
type secondAgent struct {
	t        testing.TB
	session  *session
	manifest m
	node     *node
	id       []byte
	interval float64 // of stats, in seconds, as the server wants it

	mu        sync.Mutex
	terminals map[string]*terminal
	inits     []ptyInit        // as they came
	answer    http.HandlerFunc // in place of the HTTP API, when set
}

// ptyInit is what the length of a terminal's init says, and what one read gave.
type ptyInit struct {
	size int
	body []byte
}

// runAgent takes an agent through everything that a session begins with, to READY.
func (w *world) runAgent(t testing.TB, a identity) *secondAgent {
	t.Helper()
	url := w.url + "/api/v2/workspaceagents/me/rpc?version=2.10&role=agent"
	s, resp, err := dial(t, url, http.Header{"Coder-Session-Token": {a.token}})
	if err != nil {
		t.Fatalf("me/rpc: %v%s", err, answer(resp))
	}
	g := &secondAgent{t: t, session: s, terminals: map[string]*terminal{}}
	g.manifest = s.must("GetManifest", m{})
	g.id = blob(g.manifest, "agent_id")
	s.must("GetAnnouncementBanners", m{})
	s.must("UpdateStartup", m{"startup": m{"version": "v9.8.7+second", "expanded_directory": "/tmp"}})
	g.lifecycle("STARTING")
	g.node = newNode(t, w.url, sub(g.manifest, "derp_map"), nodeID(g.id), agentAddresses(g.id)...)
	g.serve()
	g.join()
	stats := s.must("UpdateStats", m{})
	if g.interval = seconds(sub(stats, "report_interval")); g.interval <= 0 {
		t.Fatalf("the server wants stats every %v s", g.interval)
	}
	s.must("UpdateStats", m{"stats": m{"connections_by_proto": map[string]int64{"TCP": 1}, "connection_median_latency_ms": -0.001}})
	g.lifecycle("READY")
	return g
}

// nodeID is the absolute value of the last eight bytes of the agent's id.
func nodeID(id []byte) int64 {
	n := int64(binary.BigEndian.Uint64(id[8:]))
	if n < 0 {
		n = -n
	}
	return n
}

func (g *secondAgent) lifecycle(state string) {
	g.t.Helper()
	g.session.must("UpdateLifecycle", m{"lifecycle": m{"state": state, "changed_at": time.Now()}})
}

// join publishes the node, and installs and acknowledges every peer.
func (g *secondAgent) join() {
	g.t.Helper()
	coord := g.session.stream("Coordinate", nil)
	coord.SetDeadline(time.Time{})
	if err := coord.say(m{"update_self": m{"node": g.node.wire()}}); err != nil {
		g.t.Fatal(err)
	}
	maps := g.session.stream("StreamDERPMaps", m{})
	if first, err := maps.hear(); err != nil || !has(first, "home_params") {
		g.t.Fatalf("StreamDERPMaps: %v %v", first, err)
	}
	go func() {
		for {
			update, err := coord.hear()
			if err != nil || g.node.alive.Err() != nil {
				return
			}
			var ready []m
			for _, x := range list(update, "peer_updates") {
				u := x.(m)
				id := blob(u, "id")
				switch num(u, "kind") {
				case 1:
					if err := g.node.setPeer(uuidText(id), sub(u, "node")); err != nil {
						g.t.Errorf("a client's node: %v", err)
					}
					ready = append(ready, m{"id": id})
				case 2, 3:
					g.node.removePeer(uuidText(id))
				}
			}
			if len(ready) > 0 {
				coord.say(m{"ready_for_handshake": ready})
			}
		}
	}()
}

// serve listens on the agent's ports. Every other port is forwarded to loopback, dialed before the
// handshake completes.
func (g *secondAgent) serve() {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		g.t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		g.t.Fatal(err)
	}
	config := &ssh.ServerConfig{NoClientAuth: true}
	config.AddHostKey(signer)
	accept := func(port uint16, handle func(net.Conn)) {
		l := g.node.listen(port)
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go handle(c)
			}
		}()
		context := g.node.alive
		go func() { <-context.Done(); l.Close() }()
	}
	for _, port := range []uint16{1, 22} {
		accept(port, func(c net.Conn) { serveSSH(c, config) })
	}
	accept(2, g.servePTY)
	accept(3, serveSpeed)
	api := http.NewServeMux()
	api.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, `{"message":"Hello from the agent!"}`)
	})
	api.HandleFunc("GET /api/v0/listening-ports", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		io.WriteString(w, `{"ports":[{"process_name":"second","network":"tcp","port":4321},{"process_name":"sshd","network":"tcp","port":22}]}`)
	})
	api.HandleFunc("GET /api/v0/containers", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		w.WriteHeader(403)
		io.WriteString(w, `{"message":"Dev Container feature not enabled."}`)
	})
	l := g.node.listen(4)
	go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g.mu.Lock()
		answer := g.answer
		g.mu.Unlock()
		if answer == nil {
			answer = api.ServeHTTP
		}
		answer(w, r)
	}))
	forward := tcp.NewForwarder(g.node.stack, 0, 1024, func(r *tcp.ForwarderRequest) {
		out, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(r.ID().LocalPort))))
		if err != nil {
			r.Complete(true)
			return
		}
		var wq waiter.Queue
		ep, failed := r.CreateEndpoint(&wq)
		if failed != nil {
			out.Close()
			r.Complete(true)
			return
		}
		r.Complete(false)
		splice(gonet.NewTCPConn(&wq, ep), out)
	})
	g.node.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, forward.HandlePacket)
}

// api replaces the HTTP API.
func (g *secondAgent) api(answer http.HandlerFunc) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.answer = answer
}

// splice copies both ways until either ends.
func splice(a, b net.Conn) {
	done := make(chan struct{}, 2)
	go func() { io.Copy(a, b); done <- struct{}{} }()
	go func() { io.Copy(b, a); done <- struct{}{} }()
	<-done
	a.Close()
	b.Close()
}

// serveSSH serves commands and shells.
func serveSSH(c net.Conn, config *ssh.ServerConfig) {
	conn, chans, reqs, err := ssh.NewServerConn(c, config)
	if err != nil {
		return
	}
	defer conn.Close()
	go ssh.DiscardRequests(reqs)
	for nc := range chans {
		if nc.ChannelType() != "session" {
			nc.Reject(ssh.UnknownChannelType, "only sessions")
			continue
		}
		channel, requests, err := nc.Accept()
		if err != nil {
			return
		}
		go serveSession(channel, requests)
	}
}

func serveSession(channel ssh.Channel, requests <-chan *ssh.Request) {
	for r := range requests {
		switch r.Type {
		case "exec", "shell":
			cmd := exec.Command("/bin/sh")
			var command struct{ Text string }
			if r.Type == "exec" {
				ssh.Unmarshal(r.Payload, &command)
				cmd.Args = append(cmd.Args, "-c", command.Text)
			}
			in, err := cmd.StdinPipe()
			cmd.Stdout, cmd.Stderr = channel, channel.Stderr()
			if err == nil {
				err = cmd.Start()
			}
			r.Reply(err == nil, nil)
			if err != nil {
				channel.Close()
				return
			}
			go func() { io.Copy(in, channel); in.Close() }()
			go func() {
				cmd.Wait()
				channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Code uint32 }{uint32(cmd.ProcessState.ExitCode())}))
				channel.Close()
			}()
		default:
			r.Reply(r.Type == "env" || r.Type == "pty-req" || r.Type == "window-change", nil)
		}
	}
}

// terminal is a reconnectable terminal: the last 64 KiB are shown again to whoever comes back.
type terminal struct {
	pty  io.ReadWriteCloser
	size func(height, width uint16)

	mu       sync.Mutex
	recent   bytes.Buffer
	attached map[net.Conn]bool
}

func (g *secondAgent) servePTY(c net.Conn) {
	defer c.Close()
	// One read for the length and one for the body, as a stock agent does.
	size := make([]byte, 2)
	if n, err := c.Read(size); n != 2 {
		g.t.Errorf("the first read gave %d bytes of the length, %v", n, err)
		return
	}
	body := make([]byte, binary.LittleEndian.Uint16(size))
	n, err := c.Read(body)
	g.mu.Lock()
	g.inits = append(g.inits, ptyInit{len(body), body[:n]})
	g.mu.Unlock()
	if n != len(body) {
		g.t.Errorf("one read gave %d of %d bytes of the init, %v", n, len(body), err)
		return
	}
	for _, key := range []string{`"ID"`, `"Height"`, `"Width"`, `"Command"`} {
		if !bytes.Contains(body, []byte(key)) {
			g.t.Errorf("the terminal's init has no key %s: %s", key, body)
		}
	}
	var init struct {
		ID, Command   string
		Height, Width uint16
	}
	if err := json.Unmarshal(body, &init); err != nil {
		g.t.Errorf("the terminal's init: %v: %s", err, body)
		return
	}
	term, err := g.terminal(init.ID, init.Command)
	if err != nil {
		g.t.Error(err)
		return
	}
	term.size(init.Height, init.Width)
	term.mu.Lock()
	c.Write(term.recent.Bytes())
	term.attached[c] = true
	term.mu.Unlock()
	defer func() {
		term.mu.Lock()
		delete(term.attached, c)
		term.mu.Unlock()
	}()
	for d := json.NewDecoder(c); ; {
		var input struct {
			Data          string
			Height, Width uint16
		}
		if d.Decode(&input) != nil {
			return
		}
		io.WriteString(term.pty, input.Data)
		if input.Height != 0 && input.Width != 0 {
			term.size(input.Height, input.Width)
		}
	}
}

func (g *secondAgent) terminal(id, command string) (*terminal, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if term := g.terminals[id]; term != nil {
		return term, nil
	}
	cmd := exec.Command("/bin/sh")
	if command != "" {
		cmd.Args = append(cmd.Args, "-c", command)
	}
	file, err := pty.Start(cmd)
	if err != nil {
		return nil, fmt.Errorf("no terminal: %w", err)
	}
	term := &terminal{pty: file, attached: map[net.Conn]bool{}, size: func(height, width uint16) {
		pty.Setsize(file, &pty.Winsize{Rows: height, Cols: width})
	}}
	g.terminals[id] = term
	g.t.Cleanup(func() { file.Close(); cmd.Process.Kill(); cmd.Wait() })
	go func() {
		b := make([]byte, 1024)
		for {
			n, err := file.Read(b)
			term.mu.Lock()
			term.recent.Write(b[:n])
			term.recent.Next(max(0, term.recent.Len()-64<<10))
			for c := range term.attached {
				c.Write(b[:n])
				if err != nil {
					c.Close()
				}
			}
			term.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return term, nil
}

// serveSpeed measures one stream: the client's direction 0 is a download, which this side sends.
func serveSpeed(c net.Conn) {
	defer c.Close()
	d := json.NewDecoder(c)
	var config struct {
		Version   int
		Time      time.Duration
		Direction int
	}
	if d.Decode(&config) != nil || config.Version != 2 {
		io.WriteString(c, `{"error":"bad config"}`+"\n")
		return
	}
	io.WriteString(c, "{}\n")
	block := make([]byte, 2<<20)
	end := time.Now().Add(config.Time)
	if config.Direction == 0 {
		for time.Now().Before(end) {
			if _, err := c.Write(block); err != nil {
				return
			}
		}
		return
	}
	c.SetReadDeadline(time.Now().Add(4 * config.Time))
	io.Copy(io.Discard, io.MultiReader(d.Buffered(), c))
}
