package sshd

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/berthd/berth/shell"
)

const (
	firstDisplay = 10   // as sshd: what is below belongs to X servers of the machine
	firstX11Port = 6000 // display N listens on this and N
	// maxDisplays bounds the displays of all clients together, as the stock agent does: they end at port 6199. Beyond, the one used longest ago ends.
	maxDisplays = 190
	// xauth waits for others that hold its file, two seconds at a time.
	xauthTimeout = 10 * time.Second
)

var errNoXauth = errors.New("cannot forward X11: there is no xauth in the workspace; install it (the package xauth of most systems) and log in again")

// x11Request is what a client says of its X server (RFC 4254, section 6.3.1). The cookie is not the server's own: the client makes one up
// for each connection, and puts the right one in its place.
type x11Request struct {
	single           bool
	protocol, cookie string
	screen           uint32
}

// parseX11 decodes an x11-req. Its texts are for xauth, which takes them as words of commands, so they hold nothing that is not in such words.
func parseX11(payload []byte) (*x11Request, error) {
	var p struct {
		Single           bool
		Protocol, Cookie string
		Screen           uint32
	}
	if err := ssh.Unmarshal(payload, &p); err != nil {
		return nil, fmt.Errorf("cannot read an x11-req: %w", err)
	}
	odd := func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-'
	}
	// MIT-MAGIC-COOKIE-1 has 18 letters, its cookies have 16 bytes. No X server has had more than 16 screens.
	if n := len(p.Protocol); n == 0 || n > 64 || strings.ContainsFunc(p.Protocol, odd) || p.Protocol[0] == '-' {
		return nil, fmt.Errorf("cannot use an X11 authentication of %d bytes", n)
	}
	if raw, err := hex.DecodeString(p.Cookie); err != nil || len(raw) == 0 || len(raw) > 128 {
		return nil, fmt.Errorf("cannot use an X11 cookie of %d bytes", len(p.Cookie))
	}
	if p.Screen > 255 {
		return nil, fmt.Errorf("cannot use screen %d", p.Screen)
	}
	return &x11Request{p.Single, p.Protocol, p.Cookie, p.Screen}, nil
}

// displays are those of all clients of a server, by number.
type displays struct {
	mu    sync.Mutex
	most  int
	open  map[int]*display
	xauth sync.Mutex // held while xauth runs: it waits for others in steps of two seconds
}

// display is an X display that leads to a client's X server. It listens on loopback alone.
type display struct {
	number    int
	req       *x11Request
	listeners []net.Listener

	used    time.Time                  // the lock of displays guards it
	granted atomic.Pointer[shell.Spec] // how xauth is run to let programs in, nil before
}

func (d *display) close() {
	for _, l := range d.listeners {
		l.Close()
	}
}

// add opens a display with the lowest number that is free. If there is none, the one that was used longest ago ends.
func (ds *displays) add(req *x11Request) (*display, error) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	for n := firstDisplay; n < firstDisplay+ds.most; n++ {
		if ds.open[n] == nil {
			if d := ds.listen(n, req); d != nil {
				return d, nil
			}
		}
	}
	var oldest *display
	for _, d := range ds.open {
		if oldest == nil || d.used.Before(oldest.used) {
			oldest = d
		}
	}
	if oldest != nil {
		oldest.close()
		delete(ds.open, oldest.number)
		if d := ds.listen(oldest.number, req); d != nil {
			return d, nil
		}
	}
	return nil, fmt.Errorf("cannot forward X11: other programs listen on every port from %d on", firstX11Port+firstDisplay)
}

// listen opens display n, or returns nil if that is somebody else's, be it at one address only. The lock is held.
func (ds *displays) listen(n int, req *x11Request) *display {
	if _, err := os.Lstat("/tmp/.X11-unix/X" + strconv.Itoa(n)); err == nil {
		return nil // of an X server that takes no TCP; its cookie would be lost
	}
	d := &display{number: n, req: req, used: time.Now()}
	for _, host := range []string{"127.0.0.1", "::1"} {
		l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(firstX11Port+n)))
		switch {
		case err == nil:
			d.listeners = append(d.listeners, l)
		case host == "127.0.0.1" || errors.Is(err, syscall.EADDRINUSE):
			d.close()
			return nil
		}
	}
	ds.open[n] = d
	return d
}

// touch notes that a display is used.
func (ds *displays) touch(d *display) {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	d.used = time.Now()
}

// remove closes a display and reports whether its number was still its own.
func (ds *displays) remove(d *display) bool {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	d.close()
	own := ds.open[d.number] == d
	if own {
		delete(ds.open, d.number)
	}
	return own
}

// x11Listener is where one address of a display listens.
type x11Listener struct {
	net.Listener
	ds *displays
	d  *display
}

func (l x11Listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.ds.touch(l.d)
	if l.d.req.single {
		l.d.close()
	}
	return conn, nil
}

// forwardX11 opens a display that leads to the client's X server.
func (s *session) forwardX11(payload []byte) error {
	srv := s.conn.srv
	req, err := parseX11(payload)
	if err != nil {
		return err
	}
	if srv.cfg.Block.RemoteForward {
		return errors.New("cannot forward X11: forwarding to clients is switched off here (--block-reverse-port-forwarding)")
	}
	xauth, err := s.xauth()
	if err != nil {
		return err
	}
	if !xauth.Installed() {
		return errNoXauth
	}
	d, err := srv.displays.add(req)
	if err != nil {
		return err
	}
	for _, l := range d.listeners {
		ok := s.conn.run("x11", func() {
			s.conn.accept(s.ssh, x11Listener{l, &srv.displays, d}, "x11", func(peer net.Addr) []byte {
				origin, _ := peer.(*net.TCPAddr)
				return ssh.Marshal(struct {
					Origin string
					Port   uint32
				}{origin.IP.String(), uint32(origin.Port)})
			})
		})
		if !ok {
			srv.displays.remove(d)
			return net.ErrClosed
		}
	}
	s.display = d
	return nil
}

// xauth is how xauth is started in this session's environment, to take commands from its standard input: a cookie among its arguments could be read
// by every user of the machine.
func (s *session) xauth() (shell.Spec, error) {
	spec, err := s.conn.srv.cfg.Command("", s.env.vars)
	spec.Argv = []string{"xauth", "-q", "-"}
	return spec, err
}

// grant lets programs that the session starts use its display, and returns the value of their DISPLAY.
func (s *session) grant() (string, error) {
	d := s.display
	xauth, err := s.xauth()
	if err != nil {
		return "", err
	}
	d.granted.Store(&xauth)
	// As with sshd, clients look for the cookie of a display on loopback under this name, and an entry of before is replaced.
	entry := fmt.Sprintf("unix:%d.%d", d.number, d.req.screen)
	if err := s.conn.srv.displays.run(s.ctx, xauth, fmt.Sprintf("remove %s\nadd %s %s %s\n", entry, entry, d.req.protocol, d.req.cookie)); err != nil {
		return "", fmt.Errorf("cannot forward X11: %w", err)
	}
	return fmt.Sprintf("localhost:%d.%d", d.number, d.req.screen), nil
}

// endX11 closes the session's display and takes its cookie back. The session's context is done, so no xauth is started to grant anything any more.
func (s *session) endX11() {
	d := s.display
	if d == nil || !s.conn.srv.displays.remove(d) || d.granted.Load() == nil {
		return
	}
	err := s.conn.srv.displays.run(context.WithoutCancel(s.ctx), *d.granted.Load(), fmt.Sprintf("remove unix:%d.%d\n", d.number, d.req.screen))
	if err != nil {
		s.conn.srv.cfg.Log.Debug("cannot take an X11 cookie back", "remote", s.conn.remote, "err", err)
	}
}

// run runs xauth.
func (ds *displays) run(ctx context.Context, xauth shell.Spec, commands string) error {
	ds.xauth.Lock()
	defer ds.xauth.Unlock()
	ctx, cancel := context.WithTimeout(ctx, xauthTimeout)
	defer cancel()
	cmd := xauth.Cmd(ctx)
	cmd.WaitDelay = time.Second
	cmd.Stdin = strings.NewReader(commands)
	var said bytes.Buffer // some lines at most
	cmd.Stderr = &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("xauth failed: %w: %.200s", err, strings.TrimSpace(said.String()))
	}
	return nil
}
