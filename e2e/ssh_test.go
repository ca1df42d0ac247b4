package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// openSSH is a road that OpenSSH's programs take, by what config-ssh wrote.
type openSSH struct {
	*road
	config string
}

// newOpenSSH starts a server and the agent "box"; more are the names of agents that the server shall know too.
func newOpenSSH(t *testing.T, more ...string) *openSSH {
	t.Helper()
	agents := oneBox
	for _, name := range more {
		agents += "  - name: " + name + "\n"
	}
	s := &openSSH{road: newRoad(t, agents)}
	s.run()
	s.waitConnected(20 * time.Second)
	s.must("berth", "--url", s.url(), "--token-file", filepath.Join(s.data, "admin-key"), "config-ssh", "--yes")
	s.config = filepath.Join(s.home, ".ssh", "config")
	return s
}

// outcome is what a command came to.
type outcome struct {
	Out, Err string
	Code     int
}

// program is one of OpenSSH's, or another that takes the same -F, for at most some minutes.
func (s *openSSH) program(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Duration(atLength(3, 12))*time.Minute)
	t.Cleanup(cancel)
	plain := s.command(name, append([]string{"-F", s.config, "-o", "BatchMode=yes"}, args...)...)
	cmd := exec.CommandContext(ctx, plain.Path, plain.Args[1:]...)
	cmd.Env, cmd.Dir = plain.Env, plain.Dir
	cmd.WaitDelay = 20 * time.Second // a ProxyCommand shares stderr, and takes a moment to leave when its client has ended
	return cmd
}

// ssh runs OpenSSH's client to its end.
func (s *openSSH) ssh(t *testing.T, stdin string, args ...string) outcome {
	t.Helper()
	return finish(t, s.program(t, "ssh", args...), strings.NewReader(stdin))
}

// finish runs a command to its end.
func finish(t *testing.T, cmd *exec.Cmd, stdin io.Reader) outcome {
	t.Helper()
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%q: %v", cmd.Args, err)
	}
	return outcome{out.String(), errOut.String(), cmd.ProcessState.ExitCode()}
}

// begin starts a command, tells it some first words and waits until it says that it is ready. What it says after that comes from the
// reader; the writer is its input.
func begin(t *testing.T, cmd *exec.Cmd, first ...string) (io.WriteCloser, *bufio.Reader) {
	t.Helper()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errOut bytes.Buffer
	if cmd.Stderr == nil {
		cmd.Stderr = &errOut
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for _, words := range first {
		if _, err := io.WriteString(in, words); err != nil {
			t.Fatal(err)
		}
	}
	r := bufio.NewReader(out)
	if line, err := r.ReadString('\n'); strings.TrimSpace(line) != "ready" {
		cmd.Process.Kill()
		cmd.Wait()
		t.Fatalf("%q said %q, %v: %s", cmd.Args, line, err, &errOut)
	}
	return in, r
}

// atLength is how much of something a test does: all of it takes too long for every run.
func atLength(usual, long int) int {
	if os.Getenv("BERTH_LONG") != "" {
		return long
	}
	return usual
}

// TestOpenSSH: everything that people do with Debian's ssh goes through the built programs as it does with sshd.
func TestOpenSSH(t *testing.T) {
	s := newOpenSSH(t)
	for name, test := range map[string]func(*testing.T, *openSSH){
		"commands": testCommands, "slow reader": testSlowReader, "bulk": testBulk, "sequential": testSequential, "parallel": testParallel,
		"forwards": testForwards, "agent": testAgent, "X11": testX11, "multiplexed": testMultiplexed, "left running": testLeftRunning, "escape": testEscape,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, s)
		})
	}
}

func testCommands(t *testing.T, s *openSSH) {
	for name, tt := range map[string]struct {
		args  []string
		stdin string
		want  outcome
	}{
		"success":           {args: []string{"box.berth", "true"}},
		"exit code":         {args: []string{"box.berth", "exit 7"}, want: outcome{Code: 7}},
		"no such command":   {args: []string{"box.berth", "no-such-command 2>/dev/null"}, want: outcome{Code: 127}},
		"killed":            {args: []string{"box.berth", "kill -9 $$"}, want: outcome{Code: 255}},
		"terminated":        {args: []string{"box.berth", "kill $$"}, want: outcome{Code: 255}},
		"login shell":       {args: []string{"box.berth"}, stdin: "echo $((40+2)); exit 3\n", want: outcome{Out: "42\n", Code: 3}},
		"login shell dies":  {args: []string{"box.berth"}, stdin: "kill -9 $$\n", want: outcome{Code: 255}},
		"stdin to EOF":      {args: []string{"box.berth", "cat; echo end"}, stdin: "in\n", want: outcome{Out: "in\nend\n"}},
		"stdin /dev/null":   {args: []string{"-n", "box.berth", "cat; echo end"}, stdin: "unread", want: outcome{Out: "end\n"}},
		"unread stdin":      {args: []string{"box.berth", "echo done"}, stdin: strings.Repeat("x", 4<<20), want: outcome{Out: "done\n"}},
		"streams":           {args: []string{"box.berth", "echo out; echo err >&2"}, want: outcome{Out: "out\n", Err: "err\n"}},
		"a variable":        {args: []string{"-o", `SetEnv=GREETING="hi there"`, "box.berth", `echo "$GREETING"`}, want: outcome{Out: "hi there\n"}},
		"a linker variable": {args: []string{"-o", "SetEnv=LD_PRELOAD=/evil.so", "box.berth", "echo ${LD_PRELOAD-none}"}, want: outcome{Out: "none\n"}},
		"a pipeline":        {args: []string{"box.berth", "echo 'a b' | wc -c"}, want: outcome{Out: "4\n"}},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, s.ssh(t, tt.stdin, tt.args...)); diff != "" {
				t.Error(diff)
			}
		})
	}
	t.Run("a login shell on a terminal dies", func(t *testing.T) {
		if got := s.ssh(t, "kill -9 $$\n", "-tt", "box.berth"); got.Code != 255 {
			t.Errorf("%+v, want exit code 255", got)
		}
	})
}

// testSlowReader: 5 MB on each stream come apart and whole, though nobody is in a hurry to read the first.
func testSlowReader(t *testing.T, s *openSSH) {
	const size = 5 << 20
	cmd := s.program(t, "ssh", "box.berth", fmt.Sprintf("head -c %d /dev/zero | tr '\\0' o & head -c %[1]d /dev/zero | tr '\\0' e >&2; wait; exit 9", size))
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	for buf := make([]byte, 3000); err == nil; { // a little at a time, so that every window on the way fills
		var n int
		n, err = out.Read(buf)
		got.Write(buf[:n])
	}
	cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 9 {
		t.Errorf("exit code %d", code)
	}
	for _, stream := range []struct {
		name, of string
		got      []byte
	}{{"stdout", "o", got.Bytes()}, {"stderr", "e", errOut.Bytes()}} {
		if right := bytes.Count(stream.got, []byte(stream.of)); len(stream.got) != size || right != size {
			t.Errorf("%s: %d bytes, %d of them right", stream.name, len(stream.got), right)
		}
	}
}

// testBulk sends random bytes there and back, the second time with new keys after each megabyte.
func testBulk(t *testing.T, s *openSSH) {
	for name, tt := range map[string]struct {
		size    int
		options []string
		rekeys  int
	}{
		"both ways":     {size: atLength(16, 256) << 20},
		"while rekeyed": {size: 8 << 20, options: []string{"-o", "RekeyLimit=1M", "-o", "LogLevel=DEBUG1"}, rekeys: 4},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := s.program(t, "ssh", append(tt.options, "box.berth", "cat")...)
			sent, back := sha256.New(), sha256.New()
			var errOut bytes.Buffer
			n := &byteCount{}
			cmd.Stdin = io.TeeReader(io.LimitReader(rand.Reader, int64(tt.size)), sent)
			cmd.Stdout, cmd.Stderr = io.MultiWriter(back, n), &errOut
			if err := cmd.Run(); err != nil {
				t.Fatalf("%v: %s", err, &errOut)
			}
			if n.n != tt.size || !bytes.Equal(sent.Sum(nil), back.Sum(nil)) {
				t.Errorf("%d bytes of %d came back, with sum %x for %x", n.n, tt.size, back.Sum(nil), sent.Sum(nil))
			}
			if got := strings.Count(errOut.String(), "SSH2_MSG_NEWKEYS received") - 1; tt.rekeys > 0 && got < tt.rekeys {
				t.Errorf("new keys were made %d times", got)
			}
		})
	}
}

type byteCount struct{ n int }

func (c *byteCount) Write(p []byte) (int, error) { c.n += len(p); return len(p), nil }

func testSequential(t *testing.T, s *openSSH) {
	for i := range atLength(20, 1000) {
		want := outcome{Out: fmt.Sprintln(i), Code: i % 200}
		if diff := cmp.Diff(want, s.ssh(t, "", "box.berth", fmt.Sprintf("echo %d; exit %d", i, i%200))); diff != "" {
			t.Fatalf("command %d: %s", i, diff)
		}
	}
}

// testParallel: each command has a connection and a node of the mesh of its own.
func testParallel(t *testing.T, s *openSSH) {
	var wg sync.WaitGroup
	for i := range atLength(20, 50) {
		cmd := s.program(t, "ssh", "box.berth", fmt.Sprintf("cat; exit %d", i))
		want := outcome{Out: fmt.Sprintln("of", i), Code: i}
		wg.Go(func() {
			if diff := cmp.Diff(want, finish(t, cmd, strings.NewReader(want.Out))); diff != "" {
				t.Errorf("command %d: %s", i, diff)
			}
		})
	}
	wg.Wait()
}

// upperAt answers connections to a socket as upper does those to a port.
func upperAt(t *testing.T, path string) {
	t.Helper()
	l, err := net.Listen("unix", path)
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
			go func() {
				defer c.Close()
				all, _ := io.ReadAll(c)
				io.WriteString(c, strings.ToUpper(string(all)))
			}()
		}
	}()
}

// asks sends a question over a connection, to its end, and wants the answer.
func asks(t *testing.T, what string, c net.Conn, err error) {
	t.Helper()
	if err != nil {
		t.Errorf("%s: %v", what, err)
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	question := strings.Repeat("question ", 20_000)
	if _, err := io.WriteString(c, question); err != nil {
		t.Errorf("%s: %v", what, err)
	}
	c.(interface{ CloseWrite() error }).CloseWrite()
	if answer, err := io.ReadAll(c); err != nil || string(answer) != strings.ToUpper(question) {
		t.Errorf("%s answers %d bytes of %d, %v", what, len(answer), len(question), err)
	}
}

// socks asks a SOCKS 5 proxy, which -D is, for a connection to a port of 127.0.0.1.
func socks(proxy string, port int) (net.Conn, error) {
	c, err := net.Dial("tcp", proxy)
	if err != nil {
		return nil, err
	}
	request := binary.BigEndian.AppendUint16([]byte{5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1}, uint16(port))
	answer := make([]byte, 2+10) // no login; succeeded, and an address
	c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := c.Write(request); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	if _, err := io.ReadFull(c, answer); err != nil || answer[1] != 0 || answer[3] != 0 {
		return nil, errors.Join(fmt.Errorf("the proxy answers % x", answer), err, c.Close())
	}
	return c, nil
}

func testForwards(t *testing.T, s *openSSH) {
	port := service(t, "127.0.0.1:0", upper)
	target := fmt.Sprintf("127.0.0.1:%d", port)
	local, dynamic := freeAddr(t), freeAddr(t)
	path := func(name string) string { return filepath.Join(s.tmp, name) }
	upperAt(t, path("target"))
	var errOut bytes.Buffer
	cmd := s.program(t, "ssh", "-o", "ExitOnForwardFailure=yes", "-o", "LogLevel=VERBOSE", "-L", local+":"+target, "-D", dynamic, "-R", "0:"+target,
		"-L", path("local")+":"+path("target"), "-R", path("remote")+":"+path("target"), "-L", path("mixed")+":"+target,
		"box.berth", "echo ready; cat")
	cmd.Stderr = &errOut
	in, _ := begin(t, cmd)
	for what, dial := range map[string]func() (net.Conn, error){
		"-L":                  func() (net.Conn, error) { return net.Dial("tcp", local) },
		"-D":                  func() (net.Conn, error) { return socks(dynamic, port) },
		"-L of a socket":      func() (net.Conn, error) { return net.Dial("unix", path("local")) },
		"-R of a socket":      func() (net.Conn, error) { return net.Dial("unix", path("remote")) },
		"-L socket to a port": func() (net.Conn, error) { return net.Dial("unix", path("mixed")) },
	} {
		c, err := dial()
		asks(t, what, c, err)
	}
	in.Close()
	if err := cmd.Wait(); err != nil { // and stderr is whole
		t.Errorf("%v: %s", err, &errOut)
	}
	_, said, found := strings.Cut(errOut.String(), "Allocated port ")
	if !found {
		t.Fatalf("no port was chosen for -R 0:\n%s", &errOut)
	}
	chosen, err := strconv.Atoi(strings.Fields(said)[0])
	if err != nil || chosen == 0 {
		t.Errorf("the port chosen for -R 0 is %q", said)
	}
	eventually(t, 20*time.Second, "the forwarded port is closed", func() bool {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", chosen))
		if err == nil {
			c.Close()
		}
		return err != nil
	})

	if got := s.ssh(t, "question", "-W", target, "box.berth"); got.Out != "QUESTION" || got.Code != 0 {
		t.Errorf("-W: %+v", got)
	}
	closed := freeAddr(t)
	if got := s.ssh(t, "", "-o", "LogLevel=INFO", "-W", closed, "box.berth"); got.Code == 0 || !strings.Contains(got.Err, "refused") {
		t.Errorf("-W to a port that nobody listens on: %+v", got)
	}
}

// sshAgent starts an agent in dir that has the key "mine". It returns its socket, and the environment of its clients.
func (s *openSSH) sshAgent(t *testing.T, dir string) (sock string, env []string) {
	t.Helper()
	sock, key := filepath.Join(dir, "agent"), filepath.Join(dir, "agent-key")
	s.start("ssh-agent", nil, "-D", "-a", sock).wait("SSH_AUTH_SOCK=", 20*time.Second)
	s.must("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "mine", "-f", key)
	add := s.command("ssh-add", "-q", key)
	add.Env = s.env("SSH_AUTH_SOCK=" + sock)
	if got := finish(t, add, nil); got.Code != 0 {
		t.Fatalf("ssh-add: %+v", got)
	}
	return sock, add.Env
}

func testAgent(t *testing.T, s *openSSH) {
	sock, env := s.sshAgent(t, s.tmp)
	cmd := s.program(t, "ssh", "-A", "box.berth", "echo $SSH_AUTH_SOCK; ssh-add -l")
	cmd.Env = env
	got := finish(t, cmd, nil)
	forwarded, keys, _ := strings.Cut(got.Out, "\n")
	if forwarded == sock || !strings.Contains(keys, "mine (ED25519)") {
		t.Errorf("%+v, want the key over another socket", got)
	}
	eventually(t, 20*time.Second, "the forwarded socket is gone", func() bool { return !exists(forwarded) })
}

// testX11: two sessions at once reach the person's X server, each at a display of its own.
func testX11(t *testing.T, s *openSSH) {
	cookies := filepath.Join(s.tmp, "desktop-cookies")
	cookie := strings.Repeat("0123456789abcdef", 2)
	s.must("xauth", "-q", "-f", cookies, "add", ":0", ".", cookie) // a server takes the cookies of any display
	server := s.command("Xvfb", "-displayfd", "1", "-auth", cookies, "-nolisten", "tcp", "-screen", "0", "320x200x24", "+extension", "SECURITY")
	says, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatalf("cannot run Xvfb: %v", err)
	}
	t.Cleanup(func() { server.Process.Kill(); server.Wait() })
	number, err := bufio.NewReader(says).ReadString('\n')
	if err != nil {
		t.Fatalf("Xvfb does not come up: %v", err)
	}
	desktop := ":" + strings.TrimSpace(number)
	s.must("xauth", "-q", "-f", cookies, "add", desktop, ".", cookie)

	var ins [2]io.WriteCloser
	var outs [2]*bufio.Reader
	for i := range ins {
		cmd := s.program(t, "ssh", "-X", "box.berth", "echo ready; read now; xdpyinfo | grep dimensions; echo $DISPLAY")
		cmd.Env = s.env("DISPLAY="+desktop, "XAUTHORITY="+cookies)
		ins[i], outs[i] = begin(t, cmd)
	}
	displays := map[string]bool{desktop: true}
	for i, in := range ins {
		io.WriteString(in, "now\n")
		seen, err := io.ReadAll(outs[i])
		dimensions, display, _ := strings.Cut(string(seen), "\n")
		if !strings.Contains(dimensions, "320x200 pixels") || displays[display] || err != nil {
			t.Errorf("session %d: %q, %v; want the X server at a display of its own", i, seen, err)
		}
		displays[display] = true
	}
}

// testMultiplexed has 50 sessions at once on one connection, and asks it for a port as -R 0 does.
func testMultiplexed(t *testing.T, s *openSSH) {
	control := []string{"-o", "ControlPath=" + filepath.Join(s.tmp, "mux")}
	master := s.program(t, "ssh", append(control, "-M", "-N", "box.berth")...)
	if err := master.Start(); err != nil {
		t.Fatal(err)
	}
	with := func(args ...string) []string { return append(append(control[:2:2], args...), "box.berth") }
	eventually(t, 30*time.Second, "the master runs", func() bool { return s.ssh(t, "", with("-O", "check")...).Code == 0 })
	type session struct {
		cmd *exec.Cmd
		in  io.WriteCloser
		out *bufio.Reader
	}
	sessions := make([]session, 50)
	for i := range sessions {
		cmd := s.program(t, "ssh", append(with(), fmt.Sprintf("echo ready; cat; exit %d", i))...)
		in, out := begin(t, cmd)
		sessions[i] = session{cmd, in, out}
	}
	for i, one := range sessions { // all of them are there
		fmt.Fprintln(one.in, "word", i)
		if line, err := one.out.ReadString('\n'); line != fmt.Sprintln("word", i) {
			t.Errorf("session %d says %q, %v", i, line, err)
		}
	}
	for i, one := range sessions {
		one.in.Close()
		one.cmd.Wait()
		if code := one.cmd.ProcessState.ExitCode(); code != i {
			t.Errorf("session %d ended with %d", i, code)
		}
	}

	port := service(t, "127.0.0.1:0", upper)
	got := s.ssh(t, "", with("-O", "forward", "-R", fmt.Sprintf("0:127.0.0.1:%d", port))...)
	c, err := net.Dial("tcp", "127.0.0.1:"+strings.TrimSpace(got.Out))
	asks(t, "-R 0", c, err)

	if got := s.ssh(t, "", with("-O", "exit")...); got.Code != 0 {
		t.Errorf("the master is told to leave: %+v", got)
	}
	master.Wait()
}

// testLeftRunning: what was put into the background goes on when its connection has gone.
func testLeftRunning(t *testing.T, s *openSSH) {
	wait := filepath.Join(s.tmp, "go-on")
	if err := syscall.Mkfifo(wait, 0o600); err != nil {
		t.Fatal(err)
	}
	mark := filepath.Join(s.tmp, "mark")
	got := s.ssh(t, "", "box.berth", fmt.Sprintf("nohup sh -c 'read x <%s; echo $x >%s' >/dev/null 2>&1 </dev/null & echo started", wait, mark))
	if diff := cmp.Diff(outcome{Out: "started\n"}, got); diff != "" {
		t.Fatal(diff)
	}
	if err := os.WriteFile(wait, []byte("alive\n"), 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "the command in the background has gone on", func() bool {
		text, _ := os.ReadFile(mark)
		return string(text) == "alive\n"
	})
}

// testEscape: ~. hangs up, whatever runs.
func testEscape(t *testing.T, s *openSSH) {
	cmd := s.program(t, "ssh", "-tt", "box.berth", "stty -echo; echo ready; exec sleep 1000")
	in, _ := begin(t, cmd)
	io.WriteString(in, "\r~.")
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 255 {
		t.Errorf("%v, want exit code 255", err)
	}
}

// TestOpenSSHShells: with each shell in the user database, commands, scripts and logins do as they do with sshd.
func TestOpenSSHShells(t *testing.T) {
	shells := map[string]string{
		"bash": "/bin/bash", "zsh": "/usr/bin/zsh", "fish": "/usr/bin/fish", "dash": "/bin/dash",
		"ash": "", "missing": "/no/such/shell", "nologin": "/usr/sbin/nologin",
	}
	var names []string
	for name := range shells {
		names = append(names, name)
	}
	s := newOpenSSH(t, names...)
	shells["ash"] = filepath.Join(s.home, "ash")
	if err := os.Symlink(strings.TrimSpace(s.must("which", "busybox")), shells["ash"]); err != nil {
		t.Fatal(err)
	}
	for name, shell := range shells {
		s.runWithShell(name, shell)
	}
	for name := range shells {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			host := name + ".berth"
			if name == "nologin" {
				for _, args := range [][]string{{host}, {host, "true"}, {"-tt", host}} {
					if got := s.ssh(t, "", args...); got.Code != 1 || !strings.Contains(got.Out, "not available") {
						t.Errorf("%q: %+v", args, got)
					}
				}
				return
			}
			if diff := cmp.Diff(outcome{Out: "a  b\n", Err: "err\n", Code: 7}, s.ssh(t, "", host, `echo "a  b"; echo err >&2; exit 7`)); diff != "" {
				t.Errorf("a command: %s", diff)
			}
			if got := s.ssh(t, "echo from stdin\nexit 5\n", host); !strings.HasSuffix(got.Out, "from stdin\n") || got.Code != 5 {
				t.Errorf("a login without a terminal: %+v", got)
			}
			if got := s.ssh(t, "echo on a terminal\nexit 6\n", "-tt", host); !strings.Contains(got.Out, "on a terminal") || got.Code != 6 {
				t.Errorf("a login on a terminal: %+v", got)
			}
			if got := s.ssh(t, "", host, "sh -c 'kill -9 $PPID'; sleep 1000"); got.Code != 255 {
				t.Errorf("a shell that is killed: %+v", got)
			}
			sftp := s.program(t, "sftp", "-b", "-", host)
			if got := finish(t, sftp, strings.NewReader("pwd\n")); got.Code != 0 || !strings.Contains(got.Out, s.home) {
				t.Errorf("sftp: %+v", got)
			}
		})
	}
}

// runWithShell starts an agent that sees a user database in which everybody has the shell.
func (s *openSSH) runWithShell(agent, shell string) {
	s.t.Helper()
	passwd := filepath.Join(s.tmp, "passwd-"+agent)
	if err := os.WriteFile(passwd, []byte("root:x:0:0:root:"+s.home+":"+shell+"\n"), 0o644); err != nil {
		s.t.Fatal(err)
	}
	token := tokenPattern.FindString(s.berth("agent", "token", agent))
	cmd := s.command("unshare", "--mount", "sh", "-c", `mount --bind "$1" /etc/passwd && shift && exec "$@"`, "sh",
		passwd, filepath.Join(bin, "berthd"), "run", "--state-dir", filepath.Join(s.home, "state-"+agent))
	cmd.Env = s.env("BERTH_URL="+s.url(), "BERTH_TOKEN="+token)
	s.startCommand(cmd, "berthd for "+agent).wait("ready", 30*time.Second)
}
