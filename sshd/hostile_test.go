package sshd

import (
	"io"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/berthd/berth/ptyhost"
)

// stalling is a connection that its owner can stop using at one point or another.
type stalling struct {
	net.Conn
	writes int           // how many more go through; negative means all
	deaf   chan struct{} // closed when nothing is read any more; may be nil
	gone   chan struct{} // closed with the connection
	once   sync.Once
}

func (f *fixture) stall(t *testing.T, writes int) *stalling {
	t.Helper()
	c, err := net.Dial("tcp", f.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	s := &stalling{Conn: c, writes: writes, deaf: make(chan struct{}), gone: make(chan struct{})}
	t.Cleanup(func() { s.Close() })
	return s
}

func (s *stalling) Write(p []byte) (int, error) {
	if s.writes == 0 {
		<-s.gone
		return 0, net.ErrClosed
	}
	s.writes--
	return s.Conn.Write(p)
}

func (s *stalling) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	select {
	case <-s.deaf:
		<-s.gone
		return 0, net.ErrClosed
	default:
		return n, err
	}
}

func (s *stalling) Close() error {
	s.once.Do(func() { close(s.gone) })
	return s.Conn.Close()
}

// login is SSH on the connection, as far as it gets.
func (f *fixture) login(c net.Conn) (*ssh.Client, error) {
	conn, channels, requests, err := ssh.NewClientConn(c, "", &ssh.ClientConfig{User: "x", HostKeyCallback: ssh.FixedHostKey(f.cfg.HostKey.PublicKey())})
	if err != nil {
		return nil, err
	}
	return ssh.NewClient(conn, channels, requests), nil
}

// othersWork logs in anew and runs a command, and says how long that took: a figure that a busy machine must not fail on.
func (f *fixture) othersWork(t *testing.T) {
	t.Helper()
	begun := time.Now()
	if got := f.ssh(t, "", "ws", "echo in"); got.Stdout != "in\n" {
		t.Errorf("another client: %+v", got)
	}
	t.Logf("another client logged in, ran a command and left in %v", time.Since(begun).Round(time.Millisecond))
}

// memoryInUse is what this process, which is both sides, uses after a collection.
func memoryInUse() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse + m.StackInuse
}

// within fails the test if more memory is in use than was before and the budget.
func within(t *testing.T, before, budget uint64) {
	t.Helper()
	if now := memoryInUse(); now > before+budget {
		t.Errorf("%d kB more are in use, want at most %d", (now-before)/1024, budget/1024)
	} else {
		t.Logf("%d kB more are in use", (int64(now)-int64(before))/1024)
	}
}

// TestStalledKeyExchange: clients that stop between any two steps of the key exchange keep nobody out.
func TestStalledKeyExchange(t *testing.T) {
	f := serve(t, nil)
	before := memoryInUse()
	var all sync.WaitGroup
	defer all.Wait() // behind the ends of the connections
	for i := range 200 {
		// The client writes its version, its proposal, its half of the key, and that it uses the new one.
		c := f.stall(t, 1+i%3)
		defer c.Close()
		all.Go(func() {
			if client, err := f.login(c); err == nil {
				client.Close()
				t.Error("a client that stopped in its key exchange was let in")
			}
		})
	}
	eventually(t, "all of them are connected", func() bool { return f.Counts().Connections == 200 })
	f.othersWork(t)
	// Both sides of each connection are here; an idle one with a session takes 125 kB of the server's.
	within(t, before, 200*250<<10)
}

// TestFloodOfChannels: a client that opens channels as fast as it can gets no more than there are, and the others go on.
func TestFloodOfChannels(t *testing.T) {
	f := serve(t, nil)
	client := f.dial(t)
	before := memoryInUse()
	stop := make(chan struct{})
	var flood sync.WaitGroup
	for range 50 {
		flood.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				_, requests, err := client.OpenChannel("session", nil)
				if err == nil {
					flood.Go(func() { ssh.DiscardRequests(requests) })
				}
			}
		})
	}
	eventually(t, "the places are taken", func() bool {
		_, _, err := client.OpenChannel("session", nil)
		return err != nil
	})
	f.othersWork(t)
	// 1,024 channels with both ends here; a channel has goroutines and queues, and nothing that the client can make grow.
	within(t, before, 64<<20)
	close(stop)
	client.Close()
	flood.Wait()
}

// TestNeverReads: a client that takes in nothing of what its commands write costs a window, and the others go on.
func TestNeverReads(t *testing.T) {
	f := serve(t, nil)
	c := f.stall(t, -1)
	client, err := f.login(c)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	before := memoryInUse()
	for range 20 {
		session, err := client.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		out, err := session.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := session.Start("exec yes"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, 2)); err != nil {
			t.Fatal(err)
		}
	}
	close(c.deaf)
	f.othersWork(t)
	// What the client had read before it went deaf is in its own buffers: a window of 2 MB a channel.
	within(t, before, 20*(2<<20)+16<<20)
}

// FuzzRequests: what a client may ask of a session neither breaks it nor passes its limits.
func FuzzRequests(f *testing.F) {
	kinds := []string{"pty-req", "env", "shell", "exec", "subsystem", "window-change", "signal", "keepalive@openssh.com", "no such request"}
	f.Add(uint8(0), ssh.Marshal(ptyPayload{"xterm", 80, 24, 0, 0, "\x00"}), uint8(5), ssh.Marshal(struct{ A, B, C, D uint32 }{1, 2, 3, 4}))
	f.Add(uint8(1), ssh.Marshal(struct{ Name, Value string }{"LANG", "C.UTF-8"}), uint8(3), ssh.Marshal(struct{ Line string }{"true"}))
	f.Add(uint8(4), ssh.Marshal(struct{ Name string }{"sftp"}), uint8(6), ssh.Marshal(struct{ Name string }{"TERM"}))
	f.Add(uint8(1), []byte("\xff\xff\xff\xff"), uint8(2), []byte(nil))
	f.Fuzz(func(t *testing.T, first uint8, one []byte, second uint8, other []byte) {
		s := &session{env: clientEnv{kind: SessionSSH}, sizes: make(chan ptyhost.Size, 1), signals: make(chan string, 16)}
		starts := 0
		for _, req := range []*ssh.Request{{Type: kinds[int(first)%len(kinds)], Payload: one}, {Type: kinds[int(second)%len(kinds)], Payload: other}} {
			start, ok := s.handle(req)
			if start != nil {
				starts++
			}
			if start != nil && !ok {
				t.Errorf("%s is refused and begins something", req.Type)
			}
		}
		if starts > 1 {
			t.Error("two commands on one channel")
		}
		if len(s.env.vars) > maxEnvVars || s.env.bytes > maxEnvBytes {
			t.Errorf("%d variables of %d bytes", len(s.env.vars), s.env.bytes)
		}
	})
}
