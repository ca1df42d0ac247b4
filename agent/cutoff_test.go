package agent

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/crypto/ssh"

	"github.com/berthd/berth/sshd"
	"github.com/berthd/berth/wire"
)

// serveSSH serves SSH sessions in the terminals of p, and returns how to open one with a connection that can be broken.
func (p *ptyTest) serveSSH(t *testing.T) (open func(command string) (out io.Reader, reset func())) {
	key, err := sshd.HostKey(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	server, err := sshd.New(sshd.Config{
		HostKey: key, Terminals: p.host, Keep: time.Minute, Command: p.server.command,
		Banner: func(w io.Writer) { p.host.tellCutOff(w, "demo") },
	})
	if err != nil {
		t.Fatal(err)
	}
	p.host.ssh = server
	l := listenLoopback(t)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return func(command string) (io.Reader, func()) {
		t.Helper()
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c, chans, reqs, err := ssh.NewClientConn(conn, "", &ssh.ClientConfig{HostKeyCallback: ssh.FixedHostKey(key.PublicKey())})
		if err != nil {
			t.Fatal(err)
		}
		client := ssh.NewClient(c, chans, reqs)
		t.Cleanup(func() { client.Close() })
		session, err := client.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		out, err := session.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := session.RequestPty("xterm", 24, 80, nil); err != nil {
			t.Fatal(err)
		}
		start := session.Shell
		if command != "" {
			start = func() error { return session.Start(command) }
		}
		if err := start(); err != nil {
			t.Fatal(err)
		}
		return out, func() {
			conn.(*net.TCPConn).SetLinger(0)
			conn.Close()
		}
	}
}

// TestCutOffSSH: the terminal of an SSH session that was cut off is listed, told of at the next login, and taken up by its name.
func TestCutOffSSH(t *testing.T) {
	p := servePTY(t)
	open := p.serveSSH(t)
	out, reset := open("echo up; read x; echo got $x")
	if _, err := io.ReadFull(out, make([]byte, 2)); err != nil {
		t.Fatal(err)
	}
	if all, err := p.host.list(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("listed while its client is there: %+v, %v", all, err)
	}
	reset()
	var found shownTerminal
	eventually(t, "it is listed", func() bool {
		all, err := p.host.list(t.Context())
		if err == nil && len(all) == 1 {
			found = all[0]
		}
		return !found.cutOff.IsZero()
	})
	described := describeTerminal(found)
	if described.Kind != "ssh" || time.Since(described.CutOffAt) > time.Minute || time.Until(described.EndsAt) > time.Minute || described.Exited != nil {
		t.Errorf("described as %+v", described)
	}
	if wide := describeTerminal(shownTerminal{}); !wide.CutOffAt.IsZero() {
		t.Errorf("others were cut off at %v", wide.CutOffAt)
	}

	// The fixture's login shell runs nothing and so ends at once.
	next, _ := open("")
	told, err := io.ReadAll(next)
	if want := fmt.Sprintf("is still running; take it up again with: berth shell demo %s\r\n", found.Name); err != nil || !strings.HasSuffix(string(told), want) || !strings.HasPrefix(string(told), "A terminal that was cut off ") {
		t.Errorf("the next login was told %q, %v", told, err)
	}

	conn := p.open(t, wire.PTYInit{ID: uuid.New(), Name: found.Name, Height: 24, Width: 80, Existing: true, Ending: true})
	readUntil(t, conn, "up")
	io.WriteString(conn, `{"data":"words\r"}`)
	text, end := ending(t, conn)
	if !strings.Contains(text, "got words") || end == nil || end.Code != 0 {
		t.Errorf("taken up it said %q and ended with %+v", text, end)
	}
	var nothing bytes.Buffer
	if p.host.tellCutOff(&nothing, "demo"); nothing.Len() != 0 {
		t.Errorf("told %q of one that ended", nothing.String())
	}
}
