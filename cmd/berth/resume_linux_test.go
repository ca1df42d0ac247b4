package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/berthd/berth/internal/netlab"
)

// This file tests what OpenSSH with berth as its ProxyCommand survives, in network namespaces:
//
//	workspace (namespace w) -- router and control server (namespace r) -- person (namespace c)
//	10.x.1.1              10.x.1.2             10.x.2.2             10.x.2.1, later 10.x.2.9

// roadLab is such a network with an agent "box" that is connected.
type roadLab struct {
	*netlab.Lab
	t                *testing.T
	dir, bin, config string
	key, token       string // of the server's admin and of the agent
	server, agent    *labProcess
}

func newRoadLab(t *testing.T) *roadLab {
	t.Helper()
	l := &roadLab{Lab: netlab.New(t, "road", "w", "r", "c"), t: t, dir: t.TempDir()}
	l.Wire("w", "r", 1)
	l.Wire("c", "r", 2)
	l.In("r", "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
	l.In("w", "ip", "route", "add", "default", "via", l.Addr(1, 2))
	l.In("c", "ip", "route", "add", "default", "via", l.Addr(2, 2))

	l.bin = filepath.Join(l.dir, "bin")
	if out, err := exec.Command("go", "build", "-o", l.bin+"/", "../berth", "../berthd", "../berthd-ptyhost").CombinedOutput(); err != nil {
		t.Fatalf("cannot build: %v\n%s", err, out)
	}
	l.serve()
	l.eventually("the server made its key", func() bool {
		key, err := os.ReadFile(filepath.Join(l.dir, "data", "admin-key"))
		l.key = strings.TrimSpace(string(key))
		return err == nil && l.key != ""
	})
	l.server.waitFor(l, "serving")
	out, err := l.command("c", l.url(2), "berth", "agent", "create", "box").CombinedOutput()
	l.token = tokenForm.FindString(string(out))
	if err != nil || l.token == "" {
		t.Fatalf("cannot make an agent: %v\n%s", err, out)
	}
	l.run()
	l.eventually("the agent is connected", func() bool {
		out, _ := l.command("c", l.url(2), "berth", "ssh", "box", "true").CombinedOutput()
		return len(out) == 0
	})

	proxy := []string{filepath.Join(l.bin, "berth"), "--url", l.url(2), "--token-file", filepath.Join(l.dir, "data", "admin-key")}
	l.config = writeFile(t, filepath.Join(l.dir, "ssh_config"), hostsFile(proxy), 0o600)
	return l
}

var tokenForm = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)

// url is the control server as the namespace on a wire reaches it.
func (l *roadLab) url(wire int) string { return fmt.Sprintf("http://%s:7080", l.Addr(wire, 2)) }

func (l *roadLab) command(space, url, program string, args ...string) *exec.Cmd {
	cmd := l.Command(space, append([]string{filepath.Join(l.bin, program)}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+l.dir, "BERTH_URL="+url, "BERTH_TOKEN="+l.key, "SHELL=/bin/sh")
	cmd.Dir = l.dir
	return cmd
}

func (l *roadLab) serve() {
	l.server = l.start(l.command("r", "", "berth", "serve", "--listen", "0.0.0.0:7080", "--access-url", l.url(1),
		"--data-dir", filepath.Join(l.dir, "data"), "--no-context"))
}

func (l *roadLab) run() {
	cmd := l.command("w", l.url(1), "berthd", "run", "--state-dir", filepath.Join(l.dir, "state"))
	cmd.Env = append(cmd.Env, "BERTH_TOKEN="+l.token)
	l.agent = l.start(cmd)
}

func (l *roadLab) eventually(what string, ok func() bool) {
	l.t.Helper()
	for deadline := time.Now().Add(90 * time.Second); !ok(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			l.t.Fatalf("not in time: %s", what)
		}
	}
}

// labProcess is a program that runs in the lab, with whatever it starts in a process group of its own.
type labProcess struct {
	*exec.Cmd
	in   io.Writer
	done chan struct{}
	out  labOutput
}

// labOutput collects what a program says.
type labOutput struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *labOutput) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *labOutput) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

func (l *roadLab) start(cmd *exec.Cmd) *labProcess {
	l.t.Helper()
	p := &labProcess{Cmd: cmd, done: make(chan struct{})}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Stdout, cmd.Stderr = &p.out, &p.out
	in, err := cmd.StdinPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	p.in = in
	if err := cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	go func() {
		cmd.Wait()
		close(p.done)
	}()
	l.t.Cleanup(func() {
		p.signal(syscall.SIGKILL)
		<-p.done
		if l.t.Failed() {
			l.t.Logf("%q said:\n%s", cmd.Args, &p.out)
		}
	})
	return p
}

func (p *labProcess) signal(s syscall.Signal) { syscall.Kill(-p.Process.Pid, s) }

// ssh is a program of OpenSSH at the person's place.
func (l *roadLab) ssh(program string, args ...string) *labProcess {
	l.t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		l.t.Fatal("this test drives OpenSSH, which is not installed; ./test.sh installs it")
	}
	cmd := l.Command("c", append([]string{path, "-F", l.config}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+l.dir)
	return l.start(cmd)
}

// TestResume cuts the network, moves the person to another address, starts the control server anew and suspends the
// person's programs, while a file is copied and a shell is open.
func TestResume(t *testing.T) {
	// The copy must last for longer than what is done to it.
	const kbits = "40000" // a second
	size, cut, asleep := 64<<20, 12*time.Second, 5*time.Second
	if os.Getenv("BERTH_LONG") != "" {
		size, cut, asleep = 1<<30, 30*time.Second, time.Minute
	}
	l := newRoadLab(t)
	from, to := filepath.Join(l.dir, "from"), filepath.Join(l.dir, "to")
	want := randomFile(t, from, int64(size))

	shell := l.ssh("ssh", "-tt", "box.berth", "sh")
	turn := 0
	alive := func(after string) {
		t.Helper()
		turn++
		begun := time.Now()
		fmt.Fprintf(shell.in, "echo turn$((%d + 0))-$PPID.\n", turn)
		l.eventually("the shell answers after "+after, func() bool { return strings.Contains(shell.out.String(), fmt.Sprintf("turn%d-", turn)) })
		t.Logf("the shell answers %v after %s", time.Since(begun).Round(10*time.Millisecond), after)
	}
	alive("it was opened")

	scp := l.ssh("scp", "-l", kbits, from, "box.berth:"+to)
	copied := func() int64 {
		info, err := os.Stat(to)
		if err != nil {
			return 0
		}
		return info.Size()
	}
	moves := func(after string) {
		t.Helper()
		begun, at := time.Now(), copied()
		l.eventually("the copy goes on after "+after, func() bool {
			select {
			case <-scp.done:
				t.Fatalf("the copy ended with %v at %d of %d bytes, after %s", scp.ProcessState, copied(), size, after)
			default:
			}
			return copied() > at
		})
		t.Logf("the copy goes on %v after %s, at %d of %d MiB", time.Since(begun).Round(10*time.Millisecond), after, copied()>>20, size>>20)
	}
	moves("it began")

	link := func(state string) { l.In("r", "ip", "link", "set", "r2", state) }
	link("down")
	time.Sleep(cut)
	link("up")
	alive("the network was cut")
	moves("the network was cut")

	l.In("c", "ip", "addr", "del", l.Addr(2, 1)+"/24", "dev", "c2") // which takes the route along
	l.In("c", "ip", "addr", "add", l.Addr(2, 9)+"/24", "dev", "c2")
	l.In("c", "ip", "route", "add", "default", "via", l.Addr(2, 2))
	alive("the address changed")
	moves("the address changed")

	l.server.signal(syscall.SIGKILL)
	<-l.server.done
	alive("the control server was killed")
	l.serve()
	l.server.waitFor(l, "serving")
	moves("the control server was started anew")

	for _, p := range []*labProcess{shell, scp} {
		p.signal(syscall.SIGSTOP)
	}
	time.Sleep(asleep)
	for _, p := range []*labProcess{shell, scp} {
		p.signal(syscall.SIGCONT)
	}
	alive("the programs were suspended")
	moves("the programs were suspended")

	select {
	case <-scp.done:
	case <-time.After(10 * time.Minute):
		t.Fatalf("the copy does not end, at %d of %d bytes", copied(), size)
	}
	if got := sumOf(t, to); !scp.ProcessState.Success() || got != want {
		t.Errorf("scp ends with %v; the copy has %d bytes and the sum %x, want %x", scp.ProcessState, copied(), got, want)
	}

	// What berthd knew is gone with it, which is said and not waited for.
	l.agent.signal(syscall.SIGKILL)
	<-l.agent.done
	l.run()
	l.eventually("the shell ends after berthd was killed", func() bool {
		select {
		case <-shell.done:
			return true
		default:
			return false
		}
	})
	if code := shell.ProcessState.ExitCode(); code != exitTransport || !strings.Contains(shell.out.String(), "does not know this connection any more") {
		t.Errorf("the shell ends with %d", code)
	}
}

func (p *labProcess) waitFor(l *roadLab, words string) {
	l.t.Helper()
	l.eventually(p.Args[len(p.Args)-1]+" says "+words, func() bool { return strings.Contains(p.out.String(), words) })
}

// randomFile makes a file that does not compress, and returns its sum.
func randomFile(t *testing.T, path string, size int64) (sum [sha256.Size]byte) {
	t.Helper()
	f := create(t, path)
	h := sha256.New()
	if _, err := io.CopyN(io.MultiWriter(f, h), rand.NewChaCha8([32]byte{6}), size); err != nil {
		t.Fatal(err)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

func sumOf(t *testing.T, path string) [sha256.Size]byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return [sha256.Size]byte(h.Sum(nil))
}
