package tailnet

import (
	"bufio"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	"github.com/berthd/berth/internal/netlab"
	"github.com/berthd/berth/tailnet/relay"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/tailnetpb"
)

// This file tests the change of paths on a real, if small, network:
//
//	          relay (namespace R)
//	        10.x.1.1     10.x.2.1
//	            |            |
//	        10.x.1.2     10.x.2.2
//	node A (namespace A) -- node B (namespace B)
//	        10.x.3.1     10.x.3.2    only while the direct path is given
//
// The nodes run in processes of their own, which are this test binary again
// inside `ip netns exec`, and coordinate over their standard streams.

// childVar tells the test binary to be a node or the relay.
const childVar = "BERTH_TAILNET_TEST_CHILD"

func child() int {
	var err error
	switch role := os.Getenv(childVar); role {
	case "relay":
		err = childRelay()
	case "node":
		err = childNode()
	default:
		err = fmt.Errorf("unknown role %q", role)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func childRelay() error {
	r := relay.New(nil, nil)
	defer r.Close()
	l, err := net.Listen("tcp", ":8080")
	if err != nil {
		return err
	}
	if _, err := r.ListenSTUN(":3478"); err != nil {
		return err
	}
	go http.Serve(l, r.Handler())
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin) // until the parent goes away
	return nil
}

// lines carries coordination over a stream of lines, one base64 message each
// after a letter. A parent passes each side's requests to the hub.
type lines struct {
	in  *bufio.Scanner
	out io.Writer
}

func newLines(r io.Reader, w io.Writer) *lines {
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	return &lines{in: s, out: w}
}

func (l *lines) write(m proto.Message) error {
	b, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(l.out, "m %s\n", base64.StdEncoding.EncodeToString(b))
	return err
}

func decodeLine(line string, m proto.Message) error {
	b, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(line, "m "))
	if err != nil {
		return err
	}
	return proto.Unmarshal(b, m)
}

// lineStream is the child's coordination stream; lines that are no message are
// commands.
type lineStream struct {
	*lines
	commands chan string
}

func (s *lineStream) Send(r *tailnetpb.CoordinateRequest) error { return s.write(r) }
func (s *lineStream) CloseSend() error                          { return nil }
func (s *lineStream) Close() error                              { return os.Stdin.Close() }

func (s *lineStream) Recv() (*tailnetpb.CoordinateResponse, error) {
	for s.in.Scan() {
		if line := s.in.Text(); strings.HasPrefix(line, "m ") {
			m := new(tailnetpb.CoordinateResponse)
			return m, decodeLine(line, m)
		} else {
			s.commands <- line
		}
	}
	return nil, io.EOF
}

// childNode is a node that echoes on port 1 or, given a peer, keeps one stream
// to it open and pings it on command.
func childNode() error {
	id := uuid.MustParse(os.Getenv("NODE_ID"))
	n, err := New(Config{Prefixes: wire.AgentPrefixes(id)})
	if err != nil {
		return err
	}
	region := &tailnetpb.DERPMap_Region{RegionId: 1, Nodes: []*tailnetpb.DERPMap_Region_Node{
		{HostName: os.Getenv("RELAY_IP"), DerpPort: 8080, ForceHttp: true},
	}}
	if err := n.SetDERPMap(mapOf(region)); err != nil {
		return err
	}
	s := &lineStream{lines: newLines(os.Stdin, os.Stdout), commands: make(chan string, 16)}
	ended := make(chan error, 1)
	peer := os.Getenv("PEER_ID")
	if peer == "" {
		l, err := n.Listen(1)
		if err != nil {
			return err
		}
		go echo(l)
		n.CoordinateAgent(context.Background(), s) // until the parent closes our input
		return s.in.Err()
	}
	go func() { ended <- n.CoordinateClient(context.Background(), s, uuid.MustParse(peer)) }()
	to := wire.AgentAddr(uuid.MustParse(peer))
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := n.AwaitReachable(ctx, to); err != nil {
		return err
	}
	c, err := n.DialTCP(ctx, netip.AddrPortFrom(to, 1))
	if err != nil {
		return err
	}
	for {
		select {
		case err := <-ended:
			return err
		case cmd := <-s.commands:
			fmt.Println(nodeCommand(n, c, to, cmd))
		}
	}
}

// nodeCommand answers one command with one line.
func nodeCommand(n *Node, c net.Conn, to netip.Addr, cmd string) string {
	switch cmd {
	case "path": // how a ping finds its way
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		p, err := n.Ping(ctx, to)
		switch {
		case err != nil:
			return "none " + err.Error()
		case p.Direct.IsValid():
			return "direct " + p.Direct.String()
		default:
			return "relay"
		}
	case "echo": // whether the one stream still carries bytes both ways
		sent, got := make([]byte, 256<<10), make([]byte, 256<<10)
		for i := range sent {
			sent[i] = byte(i >> 8)
		}
		c.SetDeadline(time.Now().Add(15 * time.Second))
		go c.Write(sent)
		start := time.Now()
		if _, err := io.ReadFull(c, got); err != nil {
			return "broken " + err.Error()
		}
		if !slices.Equal(sent, got) {
			return "broken wrong bytes"
		}
		return "alive " + time.Since(start).String()
	}
	return "unknown command"
}

// process is a child of the lab.
type process struct {
	t   *testing.T
	out *lines
}

func start(t *testing.T, l *netlab.Lab, ns string, env ...string) *process {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := l.Command(ns, self)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		cmd.Process.Kill()
		cmd.Wait()
	})
	return &process{t: t, out: newLines(stdout, stdin)}
}

// coordinate passes a child's messages to and from the hub, and returns what
// else it prints.
func (p *process) coordinate(h *hub, id uuid.UUID) <-chan string {
	s := h.join(id)
	said := make(chan string, 64)
	p.t.Cleanup(func() { s.Close() })
	go func() {
		defer close(said)
		for p.out.in.Scan() {
			line := p.out.in.Text()
			if !strings.HasPrefix(line, "m ") {
				said <- line
				continue
			}
			m := new(tailnetpb.CoordinateRequest)
			if err := decodeLine(line, m); err != nil || s.Send(m) != nil {
				return
			}
		}
	}()
	go func() {
		for {
			m, err := s.Recv()
			if err != nil || p.out.write(m) != nil {
				return
			}
		}
	}()
	return said
}

func (p *process) ask(said <-chan string, cmd string) string {
	p.t.Helper()
	fmt.Fprintln(p.out.out, cmd)
	select {
	case line, ok := <-said:
		if !ok {
			p.t.Fatalf("the node ended before it answered %q", cmd)
		}
		return line
	case <-time.After(40 * time.Second):
		p.t.Fatalf("no answer to %q", cmd)
		return ""
	}
}

// awaitAnswer asks until the answer begins as wanted, and returns how long that took.
func (p *process) awaitAnswer(said <-chan string, cmd, want string, limit time.Duration) time.Duration {
	p.t.Helper()
	start := time.Now()
	var last string
	for time.Since(start) < limit {
		if last = p.ask(said, cmd); strings.HasPrefix(last, want) {
			return time.Since(start)
		}
	}
	p.t.Fatalf("%q is %q after %v, want %q", cmd, last, limit, want)
	return 0
}

// TestPathsInNamespaces: two nodes with no route but to the relay reach each
// other; given a direct path they move to it within 10 s; with the path cut they
// return to the relay within 15 s. One TCP stream lives through all of it.
func TestPathsInNamespaces(t *testing.T) {
	l := netlab.New(t, "bt", "r", "a", "b")
	l.Wire("r", "a", 1)
	l.Wire("r", "b", 2)
	r := start(t, l, "r", childVar+"=relay")
	if !r.out.in.Scan() || r.out.in.Text() != "ready" {
		t.Fatal("the relay did not start")
	}
	h := newHub()
	a, b := uuid.New(), uuid.New()
	agent := start(t, l, "a", childVar+"=node", "NODE_ID="+a.String(), "RELAY_IP="+l.Addr(1, 1))
	agent.coordinate(h, a)
	client := start(t, l, "b", childVar+"=node", "NODE_ID="+b.String(), "PEER_ID="+a.String(), "RELAY_IP="+l.Addr(2, 1))
	said := client.coordinate(h, b)

	client.awaitAnswer(said, "path", "relay", 10*time.Second)
	client.awaitAnswer(said, "echo", "alive", time.Second)

	l.Wire("a", "b", 3)
	took := client.awaitAnswer(said, "path", "direct "+l.Addr(3, 1), 10*time.Second)
	t.Logf("direct %v after the path was given", took)
	client.awaitAnswer(said, "echo", "alive", time.Second)

	// Both links stay up and packets vanish, as they do beyond the first hop.
	start := time.Now()
	for _, ns := range []string{"a", "b"} {
		l.In(ns, "tc", "qdisc", "add", "dev", ns+"3", "root", "pfifo", "limit", "0")
	}
	answer := client.ask(said, "echo")
	if !strings.HasPrefix(answer, "alive") {
		t.Fatalf("the stream after the path was cut: %s", answer)
	}
	client.awaitAnswer(said, "path", "relay", 15*time.Second-time.Since(start))
	t.Logf("relayed %v after the path was cut; first echo %s", time.Since(start), answer)
	client.awaitAnswer(said, "echo", "alive", time.Second)
}
