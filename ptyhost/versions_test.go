package ptyhost

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/berthd/berth/internal/golden"
)

// The host outlives upgrades of berthd run, and run may be older than a host that a newer one left. What builds of version 1 of the protocol
// said is recorded in golden files; here each side of today meets it.

// playOldHost answers connections as a host of version 1 did.
func playOldHost(t *testing.T) *Client {
	t.Helper()
	socket := filepath.Join(socketDir(t), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				r := bufio.NewReader(conn)
				for {
					f, payload, err := readFrame(r, nil)
					if errors.Is(err, io.EOF) { // it only wanted to know whether we live
						hello := golden.Bytes(t, "ptyhost-v1-kill-host")
						conn.Write(hello[:headerLen+int(hello[4])])
						return
					}
					if err != nil {
						t.Errorf("an old host cannot read this: %v", err)
						return
					}
					name := map[frameType]string{
						frameAttach: "ptyhost-v1-attach-host", frameList: "ptyhost-v1-list-host", frameKill: "ptyhost-v1-kill-host",
					}[f]
					if f == frameAttach && !bytes.Contains(payload, []byte(`"create"`)) {
						name = "ptyhost-v1-missing-host"
					}
					if name == "" {
						continue // hello, and what it does not know
					}
					conn.Write(golden.Bytes(t, name))
					io.Copy(io.Discard, r)
					return
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		serving.Wait()
	})
	return Dial(socket)
}

// TestOldHost: a client of today works with a host of version 1, and says so where that cannot do what it is asked.
func TestOldHost(t *testing.T) {
	const id = "7e571d00-0000-4000-8000-000000000001"
	c := playOldHost(t)
	if err := c.Ensure(testContext(t), func() error { return errors.New("another host was started") }); err != nil {
		t.Fatal(err)
	}
	a := attach(t, c, AttachRequest{ID: id, Create: shell("true")})
	if !a.Created() || a.Info().ID != id || a.Info().Name != "work" || a.Info().PID == 0 || a.Info().Size != (Size{24, 80}) || a.Info().Bound {
		t.Errorf("attached to %+v", a.Info())
	}
	if _, err := a.Write([]byte("hello\r")); err != nil {
		t.Error(err)
	}
	if out := readAll(t, a); out != "ready\r\ngot hello\r\n30 100\r\n" {
		t.Errorf("read %q", out)
	}
	wantExit(t, a, ExitStatus{Code: 7})
	infos, err := c.List(testContext(t))
	if err != nil || len(infos) != 1 || infos[0].ID != id || infos[0].Viewers != 1 || infos[0].LastActive.IsZero() || !infos[0].EndsAt.IsZero() {
		t.Errorf("listed %+v, %v", infos, err)
	}
	if err := c.Kill(testContext(t), id, ""); err != nil {
		t.Error(err)
	}
	if _, err := c.Attach(testContext(t), AttachRequest{ID: id}); !errors.Is(err, ErrNoSession) {
		t.Errorf("without the terminal: %v", err)
	}
	if err := c.Rename(testContext(t), id, "play", 0); !errors.Is(err, ErrHostOld) {
		t.Errorf("rename: %v", err)
	}
	if err := c.Watch(testContext(t)); !errors.Is(err, ErrHostOld) {
		t.Errorf("watch: %v", err)
	}
}

// oldClient is a connection of a client of version 1.
type oldClient struct {
	t    *testing.T
	conn net.Conn
	r    *bufio.Reader
	send []byte // recorded, and not sent yet
}

func playOldClient(t *testing.T, c *Client, name string) *oldClient {
	t.Helper()
	conn, err := net.Dial("unix", c.socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(within))
	return &oldClient{t, conn, bufio.NewReader(conn), golden.Bytes(t, name)}
}

// next sends the next frames.
func (c *oldClient) next(frames int) {
	c.t.Helper()
	for range frames {
		r := bufio.NewReader(bytes.NewReader(c.send))
		_, n, err := readHeader(r)
		if err != nil {
			c.t.Fatal(err)
		}
		if _, err := c.conn.Write(c.send[:headerLen+n]); err != nil {
			c.t.Fatal(err)
		}
		c.send = c.send[headerLen+n:]
	}
}

// want reads frames until one of the type, and decodes it as version 1 did.
func (c *oldClient) want(f frameType, v any) {
	c.t.Helper()
	for {
		got, payload, err := readFrame(c.r, nil)
		if err != nil {
			c.t.Fatalf("no frame of type %d: %v", f, err)
		}
		if got != f {
			continue // it skips what it does not know
		}
		if err := json.Unmarshal(payload, v); err != nil {
			c.t.Fatal(err)
		}
		return
	}
}

// shows reads output until it ends with want.
func (c *oldClient) shows(want string) {
	c.t.Helper()
	for out := ""; !strings.HasSuffix(out, want); {
		f, payload, err := readFrame(c.r, nil)
		if err != nil {
			c.t.Fatalf("%q, then %v, want %q", out, err, want)
		}
		if f == frameOutput {
			out += string(payload)
		}
	}
}

// sleeps reports whether a process waits for something.
func sleeps(t *testing.T, pid int) bool {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(stat), ") S ")
}

// TestOldClient: a client of version 1 works with the host of today.
func TestOldClient(t *testing.T) {
	c := startTestHost(t)
	const id = "7e571d00-0000-4000-8000-000000000001"
	type size struct {
		Rows uint16 `json:"rows"`
		Cols uint16 `json:"cols"`
	}
	type info struct {
		ID      string    `json:"id"`
		Name    string    `json:"name"`
		Command string    `json:"command"`
		PID     int       `json:"pid"`
		Created time.Time `json:"created"`
		Active  time.Time `json:"last_active"`
		Viewers int       `json:"viewers"`
		Size    size      `json:"size"`
	}
	var hello struct {
		Version int `json:"version"`
		PID     int `json:"pid"`
	}
	var attached struct {
		Info    info `json:"info"`
		Created bool `json:"created"`
	}
	a := playOldClient(t, c, "ptyhost-v1-attach-client")
	a.next(2)
	a.want(frameHello, &hello)
	if a.want(frameAttached, &attached); hello.Version < 1 || hello.PID == 0 || !attached.Created || attached.Info.ID != id || attached.Info.Size != (size{24, 80}) {
		t.Errorf("hello %+v, attached %+v", hello, attached)
	}
	a.shows("ready\r\n")
	a.next(1)
	a.shows("got hello\r\n")

	var list []info
	l := playOldClient(t, c, "ptyhost-v1-list-client")
	l.next(2)
	l.want(frameHello, &hello)
	if l.want(frameSessions, &list); len(list) != 1 || list[0].ID != id || list[0].Name != "work" || list[0].PID == 0 || list[0].Viewers != 1 || list[0].Active.Before(list[0].Created) {
		t.Errorf("listed %+v", list)
	}
	// It says that it got the line, then catches SIGINT, then waits for the next.
	eventually(t, "the program waits", func() bool { return sleeps(t, list[0].PID) })
	a.next(2)
	a.shows("30 100\r\n")
	var exit struct {
		Code int `json:"code"`
	}
	if a.want(frameExit, &exit); exit.Code != 7 {
		t.Errorf("exit %+v", exit)
	}

	var refusal struct{ Code, Message string }
	m := playOldClient(t, c, "ptyhost-v1-missing-client")
	m.next(2)
	m.want(frameHello, &hello)
	if m.want(frameError, &refusal); refusal.Code != "no-session" || refusal.Message == "" {
		t.Errorf("refused with %+v", refusal)
	}
	b := attach(t, c, AttachRequest{ID: "work", Create: shell("read x")})
	k := playOldClient(t, c, "ptyhost-v1-kill-client")
	k.next(2)
	k.want(frameHello, &hello)
	if f, _, err := readFrame(k.r, nil); f != frameDone || err != nil {
		t.Errorf("kill is answered by frame %d, %v", f, err)
	}
	readAll(t, b)
	wantExit(t, b, ExitStatus{Code: 129, Signal: "HUP", Reason: "closed on request"})
}
