package sshd

import (
	"bufio"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/berthd/berth/shell"
)

type x11Payload struct {
	Single           bool
	Protocol, Cookie string
	Screen           uint32
}

const (
	magic  = "MIT-MAGIC-COOKIE-1"
	cookie = "00112233445566778899aabbccddeeff"
)

func TestParseX11(t *testing.T) {
	for name, tt := range map[string]struct {
		payload []byte
		ok      bool
	}{
		"usual":          {ssh.Marshal(x11Payload{true, magic, cookie, 1}), true},
		"short":          {[]byte{1, 0, 0}, false},
		"no protocol":    {ssh.Marshal(x11Payload{false, "", cookie, 0}), false},
		"an option":      {ssh.Marshal(x11Payload{false, "-f", cookie, 0}), false},
		"two commands":   {ssh.Marshal(x11Payload{false, "A " + cookie + "\nquit", cookie, 0}), false},
		"no cookie":      {ssh.Marshal(x11Payload{false, magic, "", 0}), false},
		"no hex":         {ssh.Marshal(x11Payload{false, magic, "xyz", 0}), false},
		"a long cookie":  {ssh.Marshal(x11Payload{false, magic, strings.Repeat("ab", 200), 0}), false},
		"no such screen": {ssh.Marshal(x11Payload{false, magic, cookie, 1 << 31}), false},
	} {
		if got, err := parseX11(tt.payload); (err == nil) != tt.ok || tt.ok && *got != (x11Request{true, magic, cookie, 1}) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}

func FuzzParseX11(f *testing.F) {
	f.Add(ssh.Marshal(x11Payload{true, magic, cookie, 1}))
	f.Add([]byte("\x00\x00\x00\x00\x01-\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, payload []byte) {
		if req, err := parseX11(payload); err == nil && strings.ContainsAny(req.protocol+req.cookie, " \t\r\n\"'\\") {
			t.Errorf("xauth is to read %+v", req)
		}
	})
}

// xServer is a real X server that lets in who has a cookie. It returns what its clients have in their environment.
func xServer(t *testing.T) []string {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "authority")
	xauth := func(display string) {
		if out, err := exec.Command("xauth", "-q", "-f", file, "add", display, ".", cookie).CombinedOutput(); err != nil {
			t.Fatalf("xauth (xauth must be installed): %v: %s", err, out)
		}
	}
	xauth(":0") // the server takes the cookies of any display
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	// ssh -X asks it for a cookie of clients that are not trusted.
	cmd := exec.Command("Xvfb", "-displayfd", "3", "-auth", file, "-nolisten", "tcp", "-screen", "0", "320x200x24", "+extension", "SECURITY")
	cmd.ExtraFiles = []*os.File{w}
	if err := cmd.Start(); err != nil {
		t.Fatalf("cannot run Xvfb (xvfb must be installed): %v", err)
	}
	w.Close()
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil {
		t.Fatalf("Xvfb does not come up: %v", err)
	}
	display := ":" + strings.TrimSpace(line)
	xauth(display)
	return []string{"DISPLAY=" + display, "XAUTHORITY=" + file}
}

// Two sessions of OpenSSH's client reach a real X server from real X clients, at displays of their own that are gone afterwards.
func TestX11(t *testing.T) {
	desktop := xServer(t)
	file := filepath.Join(t.TempDir(), "authority")
	t.Setenv("XAUTHORITY", file) // the workspace's
	f := serve(t, nil)
	type window struct {
		cmd     *exec.Cmd
		in      io.WriteCloser
		out     *bufio.Reader
		display string
	}
	open := func() *window {
		cmd := f.command(t, "ssh", "-X", "ws", "echo $DISPLAY; exec sh")
		cmd.Env = append(os.Environ(), desktop...)
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		w := &window{cmd: cmd, in: in, out: bufio.NewReader(out)}
		line, err := w.out.ReadString('\n')
		if err != nil || !strings.HasPrefix(line, "localhost:") {
			t.Fatalf("DISPLAY is %q, %v", line, err)
		}
		w.display = strings.TrimSpace(line)
		return w
	}
	ask := func(w *window, line string) string {
		t.Helper()
		io.WriteString(w.in, line+"\necho; echo end\n")
		var said strings.Builder
		for {
			got, err := w.out.ReadString('\n')
			if err != nil {
				t.Fatalf("%s: %q, %v", line, said.String(), err)
			}
			if got == "end\n" {
				return strings.TrimSpace(said.String())
			}
			said.WriteString(got)
		}
	}
	first := open()
	if got := ask(first, "xdpyinfo"); !strings.Contains(got, "320x200 pixels") || !strings.Contains(got, "name of display:    "+first.display) {
		t.Errorf("through the first: %s", got)
	}
	second := open()
	if first.display == second.display {
		t.Fatalf("both have display %s", first.display)
	}
	for _, w := range []*window{second, first} {
		if got := ask(w, "xdpyinfo | grep dimensions; XAUTHORITY=/dev/null xdpyinfo 2>&1 | grep -c dimensions"); !strings.Contains(got, "320x200 pixels") || !strings.HasSuffix(got, "\n0") {
			t.Errorf("%s: %s; want a screen for those who have the cookie alone", w.display, got)
		}
	}
	number := func(w *window) int {
		n, err := strconv.Atoi(strings.TrimSuffix(strings.TrimPrefix(w.display, "localhost:"), ".0"))
		if err != nil || n < firstDisplay {
			t.Fatalf("display %s: %v", w.display, err)
		}
		return n
	}
	listening := func(w *window) string {
		out, err := exec.Command("ss", "-Hltn", "sport", "=", ":"+strconv.Itoa(firstX11Port+number(w))).Output()
		if err != nil {
			t.Fatalf("ss (iproute2 must be installed): %v", err)
		}
		return string(out)
	}
	for line := range strings.Lines(listening(first)) {
		if at := strings.Fields(line)[3]; !strings.HasPrefix(at, "127.0.0.1:") && !strings.HasPrefix(at, "[::1]:") {
			t.Errorf("it listens on %s", at)
		}
	}
	// What an earlier session left behind is replaced, and the rest stays as it is.
	entries := func() string { // without the lock, which the server must get
		out, err := exec.Command("xauth", "-i", "-f", file, "list").CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	if out, err := exec.Command("xauth", "-q", "-f", file, "add", "10.1.2.3:7", ".", cookie).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if got := entries(); strings.Count(got, "unix:") != 2 {
		t.Errorf("the workspace's cookies are\n%s", got)
	}
	for _, w := range []*window{first, second} {
		w.in.Close()
		if err := w.cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
	eventually(t, "cookies are taken back", func() bool { return strings.Count(entries(), "unix:") == 0 })
	if got := entries(); !strings.Contains(got, "10.1.2.3:7") {
		t.Errorf("afterwards the workspace's cookies are\n%s", got)
	}
	if got := listening(first) + listening(second); got != "" {
		t.Errorf("afterwards there listens\n%s", got)
	}
}

// x11Session asks for X11 by Go's client, and returns where its display listens.
func x11Session(t *testing.T, c *ssh.Client, single bool) string {
	t.Helper()
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	if ok, err := s.SendRequest("x11-req", true, ssh.Marshal(x11Payload{single, magic, cookie, 0})); !ok || err != nil {
		t.Fatalf("x11-req: %v, %v", ok, err)
	}
	out, err := s.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start("echo $DISPLAY; sleep 1000"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Signal(ssh.SIGKILL) })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSuffix(strings.TrimPrefix(line, "localhost:"), ".0\n"))
	if err != nil {
		t.Fatalf("DISPLAY is %q", line)
	}
	return "127.0.0.1:" + strconv.Itoa(firstX11Port+n)
}

func refused(t *testing.T, addr string) bool {
	conn, err := net.Dial("tcp", addr)
	if err == nil {
		conn.Close()
	}
	return err != nil
}

// A client that wants one connection gets one, and is told where it came from.
func TestX11Single(t *testing.T) {
	t.Setenv("XAUTHORITY", filepath.Join(t.TempDir(), "authority"))
	f := serve(t, nil)
	c := f.dial(t)
	channels := c.HandleChannelOpen("x11")
	addr := x11Session(t, c, true)
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	nc := <-channels
	var origin struct {
		Host string
		Port uint32
	}
	if err := ssh.Unmarshal(nc.ExtraData(), &origin); err != nil || net.JoinHostPort(origin.Host, strconv.Itoa(int(origin.Port))) != conn.LocalAddr().String() {
		t.Errorf("told of %+v, %v; it is %v", origin, err, conn.LocalAddr())
	}
	ch, reqs, err := nc.Accept()
	if err != nil {
		t.Fatal(err)
	}
	go ssh.DiscardRequests(reqs)
	io.WriteString(ch, "hi")
	got := make([]byte, 2)
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hi" {
		t.Errorf("got %q", got)
	}
	if !refused(t, addr) {
		t.Error("a second connection was taken")
	}
}

// Displays are bounded; the one that was used longest ago makes room.
func TestX11Cap(t *testing.T) {
	t.Setenv("XAUTHORITY", filepath.Join(t.TempDir(), "authority"))
	f := serve(t, nil)
	c := f.dial(t)
	// Others on this machine may have displays too, so the cap is put where the second ends.
	first := x11Session(t, c, false)
	second := x11Session(t, c, false)
	f.displays.mu.Lock()
	f.displays.most = 0
	for n := range f.displays.open {
		f.displays.most = max(f.displays.most, n-firstDisplay+1)
	}
	f.displays.mu.Unlock()
	third := x11Session(t, c, false)
	if third != first || refused(t, second) || refused(t, third) {
		t.Errorf("displays %s, %s and then %s; want the first one's again", first, second, third)
	}
}

func TestX11Refused(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"no xauth": {func(c *Config) {
			command := c.Command
			c.Command = func(line string, env []string) (shell.Spec, error) {
				spec, err := command(line, env)
				spec.Env = setVar(spec.Env, "PATH", "/nowhere")
				return spec, err
			}
		}, "there is no xauth in the workspace; install it"},
		"blocked": {func(c *Config) { c.Block.RemoteForward = true }, "switched off"},
	} {
		t.Run(name, func(t *testing.T) {
			f := serve(t, func(c *Config) {
				withTerminals(t)(c)
				tt.change(c)
			})
			c := f.dial(t)
			s, err := c.NewSession()
			if err != nil {
				t.Fatal(err)
			}
			if ok, err := s.SendRequest("x11-req", true, ssh.Marshal(x11Payload{false, magic, cookie, 0})); ok || err != nil {
				t.Errorf("x11-req: %v, %v", ok, err)
			}
			if err := s.RequestPty("xterm", 24, 80, nil); err != nil {
				t.Fatal(err)
			}
			said, err := s.StderrPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Shell(); err != nil {
				t.Fatal(err)
			}
			if line, err := bufio.NewReader(said).ReadString('\n'); err != nil || !strings.Contains(line, tt.want) {
				t.Errorf("told %q, %v", line, err)
			}
			if err := s.Close(); err != nil && err != io.EOF {
				t.Error(err)
			}
		})
	}
}
