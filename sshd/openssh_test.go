package sshd

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
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

	"github.com/berthd/berth/shell"
)

func TestExec(t *testing.T) {
	f := serve(t, nil)
	tests := map[string]struct {
		args  []string
		stdin string
		want  result
	}{
		"success":         {args: []string{"ws", "true"}},
		"exit code":       {args: []string{"ws", "exit 7"}, want: result{Code: 7}},
		"no such command": {args: []string{"ws", "no-such-command 2>/dev/null"}, want: result{Code: 127}},
		"killed":          {args: []string{"ws", "kill -9 $$"}, want: result{Code: 255}},
		"both streams":    {args: []string{"ws", "echo out; echo err >&2"}, want: result{Stdout: "out\n", Stderr: "err\n"}},
		"stdin to EOF":    {args: []string{"ws", "cat; echo end"}, stdin: "in\n", want: result{Stdout: "in\nend\n"}},
		"no stdin":        {args: []string{"-n", "ws", "cat; echo end"}, want: result{Stdout: "end\n"}},
		"unread stdin":    {args: []string{"ws", "echo done"}, stdin: strings.Repeat("x", 8<<20), want: result{Stdout: "done\n"}},
		"shell on stdin":  {args: []string{"ws"}, stdin: "echo hello\nexit 3\n", want: result{Stdout: "hello\n", Code: 3}},
		"directory":       {args: []string{"ws", "pwd"}, want: result{Stdout: f.dir + "\n"}},
		"environment":     {args: []string{"-o", "SetEnv=GREETING=hi", "ws", "echo $GREETING"}, want: result{Stdout: "hi\n"}},
		"linker variable": {args: []string{"-o", "SetEnv=LD_AUDIT=/evil", "ws", "echo ${LD_AUDIT-none}"}, want: result{Stdout: "none\n"}},
		"session type":    {args: []string{"-o", "SetEnv=CODER_SSH_SESSION_TYPE=vscode", "ws", "echo ${CODER_SSH_SESSION_TYPE-none}"}, want: result{Stdout: "none\n"}},
		"no terminal":     {args: []string{"ws", "test -t 0 || test -t 1 || echo none"}, want: result{Stdout: "none\n"}},
		"streams close on their own": {
			args: []string{"ws", "exec >&-; echo late >&2; exit 4"}, want: result{Stderr: "late\n", Code: 4},
		},
		"script": {args: []string{"ws", "#!/bin/sh\necho script"}, want: result{Stdout: "script\n"}},
		"container": {
			args: []string{"-o", "SetEnv=CODER_CONTAINER=c", "ws", "true"},
			want: result{Stderr: "berth: cannot run in container \"c\": this agent runs commands on its own machine only\n", Code: 229},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if diff := cmp.Diff(tt.want, f.ssh(t, tt.stdin, tt.args...)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestContainer(t *testing.T) {
	f := serve(t, func(c *Config) {
		command := c.Command
		c.Terminals = terminals(t)
		c.ContainerCommand = func(_ context.Context, in Container, line string, clientEnv []string) (shell.Spec, error) {
			if in.Name != "web" {
				return shell.Spec{}, fmt.Errorf("cannot find container %q", in.Name)
			}
			return command(fmt.Sprintf("echo '%s %s' '%s' ${CODER_CONTAINER-clean}$CODER_CONTAINER_USER $LANG", in.Name, in.User, line), clientEnv)
		}
	})
	env := func(in, user string) []string {
		return []string{"-o", "SetEnv=CODER_CONTAINER=" + in + " CODER_CONTAINER_USER=" + user + " LANG=C.UTF-8"}
	}
	for name, tt := range map[string]struct {
		args []string
		want result
	}{
		"command":  {append(env("web", "dev"), "ws", "make all"), result{Stdout: "web dev make all clean C.UTF-8\n"}},
		"shell":    {append(env("web", ""), "ws"), result{Stdout: "web   clean C.UTF-8\n"}},
		"terminal": {append(env("web", "dev"), "-tt", "ws", "top"), result{Stdout: "web dev top clean C.UTF-8\r\n"}},
		"unknown":  {append(env("db", ""), "ws", "true"), result{Stderr: "berth: cannot find container \"db\"\n", Code: 229}},
		"sftp":     {append(env("web", ""), "-s", "ws", "sftp"), result{Stderr: "berth: cannot serve SFTP in container \"web\": copy its files by a command there, such as tar\n", Code: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			got := f.ssh(t, "", tt.args...)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestStartFailure(t *testing.T) {
	f := serve(t, func(c *Config) {
		c.Command = func(string, []string) (shell.Spec, error) {
			return shell.Spec{Argv: []string{"/no/such/shell", "-c", "true"}, Dir: "/"}, nil
		}
	})
	got := f.ssh(t, "", "ws", "true")
	if got.Code != 229 || !strings.Contains(got.Stderr, "/no/such/shell") {
		t.Errorf("got %+v, want status 229 and the shell's name", got)
	}
}

func TestStreamsKeptApart(t *testing.T) {
	f := serve(t, nil)
	const size = 5 << 20
	cmd := f.command(t, "ssh", "ws", fmt.Sprintf("head -c %d /dev/zero | tr '\\0' o & head -c %d /dev/zero | tr '\\0' e >&2; wait", size, size))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// A slow reader: a little at a time, so that the window fills.
	var got bytes.Buffer
	for buf := make([]byte, 3000); ; {
		n, err := stdout.Read(buf)
		got.Write(buf[:n])
		if err != nil {
			break
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if want := bytes.Repeat([]byte("o"), size); !bytes.Equal(got.Bytes(), want) {
		t.Errorf("stdout: got %d bytes, %d of them right", got.Len(), bytes.Count(got.Bytes(), []byte("o")))
	}
	if want := bytes.Repeat([]byte("e"), size); !bytes.Equal(stderr.Bytes(), want) {
		t.Errorf("stderr: got %d bytes, %d of them right", stderr.Len(), bytes.Count(stderr.Bytes(), []byte("e")))
	}
}

func TestBulkBothWays(t *testing.T) {
	f := serve(t, nil)
	const size = 50 << 20
	sent, got := sha256.New(), sha256.New()
	cmd := f.command(t, "ssh", "ws", "cat")
	cmd.Stdin = io.TeeReader(io.LimitReader(rand.Reader, size), sent)
	n := new(counter)
	cmd.Stdout = io.MultiWriter(got, n)
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if *n != size || !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
		t.Errorf("got %d bytes with sum %x back, want %d with %x", *n, got.Sum(nil), size, sent.Sum(nil))
	}
}

type counter int64

func (c *counter) Write(p []byte) (int, error) { *c += counter(len(p)); return len(p), nil }

func TestBackgroundCommandLivesOn(t *testing.T) {
	f := serve(t, nil)
	got := f.ssh(t, "", "ws", "nohup sleep 1000 >/dev/null 2>&1 </dev/null & echo $!")
	pid, err := strconv.Atoi(strings.TrimSpace(got.Stdout))
	if err != nil {
		t.Fatalf("no process id in %+v", got)
	}
	defer syscall.Kill(pid, syscall.SIGKILL)
	if err := syscall.Kill(pid, 0); err != nil {
		t.Errorf("the background command is gone: %v", err)
	}
}

// A command that is left alone goes on, as sshd has it, until it writes to the pipe that nobody reads.
func TestClientLeaves(t *testing.T) {
	f := serve(t, nil)
	mark := filepath.Join(f.dir, "mark")
	if err := syscall.Mkfifo(mark, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := f.command(t, "ssh", "ws", "echo ready; read go; echo survived >"+mark)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatal(line, err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	got, err := os.ReadFile(mark) // waits for the writer
	if err != nil || string(got) != "survived\n" {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestManyCommands(t *testing.T) {
	f := serve(t, nil)
	master := f.command(t, "ssh", "-M", "-N", "-f", "-o", "ControlPersist=yes", "ws")
	if got := run(t, master, ""); got.Code != 0 {
		t.Fatal(got)
	}
	defer f.ssh(t, "", "-O", "exit", "ws")
	t.Run("sequential", func(t *testing.T) {
		for i := range 100 {
			if got := f.ssh(t, "", "ws", fmt.Sprintf("echo %d; exit %d", i, i)); got.Stdout != fmt.Sprintln(i) || got.Code != i {
				t.Fatalf("command %d: %+v", i, got)
			}
		}
	})
	t.Run("parallel", func(t *testing.T) {
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				got := f.ssh(t, "", "-o", "ControlPath=none", "ws", fmt.Sprintf("echo %d; exit %d", i, i))
				if got.Stdout != fmt.Sprintln(i) || got.Code != i {
					t.Errorf("command %d: %+v", i, got)
				}
			})
		}
		wg.Wait()
	})
}

func TestFileTransfer(t *testing.T) {
	f := serve(t, nil)
	data := make([]byte, 3<<20)
	rand.Read(data)
	src := filepath.Join(t.TempDir(), "with space ü")
	if err := os.WriteFile(src, data, 0o640); err != nil {
		t.Fatal(err)
	}
	batch := filepath.Join(t.TempDir(), "batch")
	if err := os.WriteFile(batch, []byte(fmt.Sprintf("pwd\nput -p %q put\nget put %q\nrename put renamed\nmkdir d\nsymlink renamed link\n", src, src+".back")), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := run(t, f.command(t, "sftp", "-b", batch, "ws"), ""); got.Code != 0 || !strings.Contains(got.Stdout, f.dir) {
		t.Fatalf("sftp: %+v, want it to start in %s", got, f.dir)
	}
	same := func(path string) {
		t.Helper()
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: %d bytes, %v; not what was sent", path, len(got), err)
		}
	}
	same(src + ".back")
	same(filepath.Join(f.dir, "renamed"))
	same(filepath.Join(f.dir, "link"))
	for name, args := range map[string][]string{"sftp protocol": {"-s"}, "scp protocol": {"-O"}} {
		t.Run(name, func(t *testing.T) {
			target := "target" + args[0]
			if got := run(t, f.command(t, "scp", append(args, "-p", src, "ws:"+target)...), ""); got.Code != 0 {
				t.Fatalf("%+v", got)
			}
			same(filepath.Join(f.dir, target))
			if info, err := os.Stat(filepath.Join(f.dir, target)); err != nil || info.Mode().Perm() != 0o640 {
				t.Errorf("mode %v, %v", info.Mode(), err)
			}
			back := filepath.Join(t.TempDir(), "back")
			if got := run(t, f.command(t, "scp", append(args, "ws:"+target, back)...), ""); got.Code != 0 {
				t.Fatalf("%+v", got)
			}
			same(back)
		})
	}
}

func TestBlock(t *testing.T) {
	f := serve(t, func(c *Config) { c.Block = Block{FileTransfer: true, LocalForward: true, RemoteForward: true} })
	const refusal = "\x02File transfer has been disabled.\n"
	for _, line := range []string{"scp -t x", "/usr/bin/rsync --server", "nc localhost 1", "sftp"} {
		if got := f.ssh(t, "", "ws", line); got.Stdout != refusal || got.Code != 65 {
			t.Errorf("%s: %+v", line, got)
		}
	}
	if got := f.ssh(t, "", "-s", "ws", "sftp"); got.Stdout != "" || got.Code != 65 {
		t.Errorf("sftp subsystem: %+v", got)
	}
	if got := f.ssh(t, "", "-o", "ExitOnForwardFailure=yes", "-R", "0:127.0.0.1:1", "ws", "true"); got.Code != 255 {
		t.Errorf("remote forward: %+v", got)
	}
	if got := f.ssh(t, "", "-o", "LogLevel=INFO", "-W", f.addr.String(), "ws"); got.Code != 255 || !strings.Contains(got.Stderr, "disabled") {
		t.Errorf("local forward: %+v", got)
	}
}

// halfCloser listens, and answers each connection with the sum of all that came before its EOF: only a forward that passes half-close on is answered.
func halfCloser(t *testing.T, network, address string) net.Addr {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				sum := sha256.New()
				io.Copy(sum, conn)
				io.WriteString(conn, hex.EncodeToString(sum.Sum(nil)))
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr()
}

// echoer listens, and sends back what it gets.
func echoer(t testing.TB) net.Addr {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				io.Copy(conn, conn)
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr()
}

// checkHalfClose sends data through a forward to a halfCloser and wants its answer.
func checkHalfClose(t *testing.T, network, address string) {
	t.Helper()
	data := make([]byte, 1<<20)
	rand.Read(data)
	conn, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(conn)
	if want := fmt.Sprintf("%x", sha256.Sum256(data)); err != nil || string(got) != want {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
}

func TestForwarding(t *testing.T) {
	f := serve(t, nil)
	dir, err := os.MkdirTemp("", "fwd")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	tcp := halfCloser(t, "tcp", "127.0.0.1:0").String()
	unix := halfCloser(t, "unix", filepath.Join(dir, "target")).String()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	local := free.Addr().String()
	free.Close()

	localUnix, remoteUnix := filepath.Join(dir, "local"), filepath.Join(dir, "made", "remote")
	cmd := f.command(t, "ssh", "-o", "ExitOnForwardFailure=yes", "-v", "-o", "LogLevel=VERBOSE",
		"-L", local+":"+tcp, "-L", localUnix+":"+unix, "-R", "0:"+tcp, "-R", "127.0.0.1:0:"+unix, "-R", remoteUnix+":"+unix, "ws", "echo ready; cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, _ := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		cmd.Process.Kill()
		cmd.Wait()
		t.Fatalf("got %q: %s", line, &stderr)
	}
	checkHalfClose(t, "tcp", local)
	checkHalfClose(t, "unix", localUnix)
	checkHalfClose(t, "unix", remoteUnix)
	if info, err := os.Stat(remoteUnix); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the remote socket: %v, %v; want it for this user only", info, err)
	}
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Fatal(err, stderr.String())
	}
	var chosen []string
	for line := range strings.Lines(stderr.String()) {
		if rest, ok := strings.CutPrefix(line, "Allocated port "); ok {
			chosen = append(chosen, strings.Fields(rest)[0])
		}
	}
	if len(chosen) != 2 || chosen[0] == chosen[1] {
		t.Errorf("ports chosen for two -R 0: %v\n%s", chosen, &stderr)
	}
	wantGone(t, remoteUnix)
}

func TestStdioForward(t *testing.T) {
	f := serve(t, nil)
	target := halfCloser(t, "tcp", "127.0.0.1:0").String()
	got := f.ssh(t, "some words", "-W", target, "ws")
	if want := fmt.Sprintf("%x", sha256.Sum256([]byte("some words"))); got.Stdout != want || got.Code != 0 {
		t.Errorf("got %+v, want %s", got, want)
	}
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	if got := f.ssh(t, "", "-o", "LogLevel=INFO", "-W", closed.Addr().String(), "ws"); got.Code == 0 || !strings.Contains(got.Stderr, "refused") {
		t.Errorf("a refused connection: %+v", got)
	}
}

func TestAgentForwarding(t *testing.T) {
	f := serve(t, nil)
	dir, err := os.MkdirTemp("", "agent")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	sock, key := filepath.Join(dir, "sock"), filepath.Join(dir, "key")
	agent := exec.Command("ssh-agent", "-D", "-a", sock)
	out, err := agent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	defer agent.Wait()
	defer agent.Process.Kill()
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil { // it says where it listens when it does
		t.Fatal(err)
	}
	env := append(os.Environ(), "SSH_AUTH_SOCK="+sock)
	for _, args := range [][]string{{"ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "mine", "-f", key}, {"ssh-add", "-q", key}} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env = env
		if got := run(t, cmd, ""); got.Code != 0 {
			t.Fatalf("%v: %+v", args, got)
		}
	}
	cmd := f.command(t, "ssh", "-A", "ws", "echo $SSH_AUTH_SOCK; ssh-add -l")
	cmd.Env = env
	got := run(t, cmd, "")
	forwarded, keys, _ := strings.Cut(got.Stdout, "\n")
	if forwarded == sock || !strings.Contains(keys, "mine (ED25519)") {
		t.Errorf("got %+v, want the key through another socket", got)
	}
	wantGone(t, forwarded)
}

// wantGone waits until a file that a connection owned is removed: the client leaves before the server has noticed.
func wantGone(t *testing.T, path string) {
	t.Helper()
	eventually(t, path+" is removed", func() bool {
		_, err := os.Lstat(path)
		return os.IsNotExist(err)
	})
}

// eventually waits for a condition that nothing announces.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(10 * time.Second); !ok(); {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("it never came to this: %s", what)
		}
	}
}
