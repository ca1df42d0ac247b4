package ptyhost

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/berthd/berth/account"
)

func startHost(socket string) error {
	cmd := &exec.Cmd{Path: "/proc/self/exe", Args: []string{"ptyhost"}, Env: append(os.Environ(), envHost+"="+socket, envParent+"=")}
	return StartDetached(cmd, nil, socket+".log")
}

func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ptyhost")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TestParentKilled wants the host and its sessions to survive the process that started it.
func TestParentKilled(t *testing.T) {
	socket := filepath.Join(socketDir(t), "s")
	parent := exec.Command("/proc/self/exe")
	parent.Env = append(os.Environ(), envParent+"="+socket)
	parent.Stderr = t.Output()
	parent.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("the parent said %q, %v", line, err)
	}
	c := Dial(socket)
	a := watch(t, attach(t, c, AttachRequest{ID: "work", Create: shell(`echo up; while read x; do echo "still here $x"; done`)}))
	a.expect(t, "up")
	pid := a.Info().PID

	// Kill the whole process group too, as a terminal or a supervisor would.
	if err := syscall.Kill(-parent.Process.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	parent.Wait()
	fmt.Fprintln(a, "one")
	a.expect(t, "still here one")
	again := Dial(socket)
	if err := again.Ensure(testContext(t), func() error { return errors.New("a second host was started") }); err != nil {
		t.Fatal(err)
	}
	b := watch(t, attach(t, again, AttachRequest{ID: "work"}))
	b.expect(t, "still here one")
	if b.Info().PID != pid {
		t.Error("it is another program")
	}

	if err := c.Shutdown(testContext(t)); err != nil {
		t.Fatal(err)
	}
	wantExit(t, b.Attachment, ExitStatus{Code: 129, Signal: "HUP", Reason: "the workspace stopped"})
	if _, err := c.List(testContext(t)); !absent(err) {
		t.Errorf("after the shutdown: %v", err)
	}
	if _, err := os.Lstat(socket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	eventually(t, "the program is gone", func() bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) })
}

// TestHostKilled wants viewers to be told when the host dies, and a new host to take its place.
func TestHostKilled(t *testing.T) {
	socket := filepath.Join(socketDir(t), "s")
	c := Dial(socket)
	if err := c.Ensure(testContext(t), func() error { return startHost(socket) }); err != nil {
		t.Fatal(err)
	}
	a := watch(t, attach(t, c, AttachRequest{Create: shell("echo up; read x")}))
	a.expect(t, "up")
	if err := syscall.Kill(hostPID(t, socket), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Wait(); !errors.Is(err, ErrHostGone) {
		t.Errorf("Wait after the host was killed: %v", err)
	}
	var op *net.OpError
	if _, err := c.Attach(testContext(t), AttachRequest{ID: "x"}); !errors.As(err, &op) || op.Op != "dial" {
		t.Errorf("attach without a host: %v", err)
	}
	if err := c.Ensure(testContext(t), func() error { return startHost(socket) }); err != nil {
		t.Fatal(err)
	}
	if err := c.Shutdown(testContext(t)); err != nil {
		t.Error(err)
	}
}

func hostPID(t *testing.T, socket string) int {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	host, err := peer(conn)
	if err != nil {
		t.Fatal(err)
	}
	return int(host.Pid)
}

// TestAnothersTerminals wants a host of the wrong user to be refused, also where they could have put its socket themselves.
func TestAnothersTerminals(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root becomes another user")
	}
	dir := socketDir(t)
	socket := filepath.Join(dir, "s")
	if err := Dial(socket).Ensure(testContext(t), func() error { return startHost(socket) }); err != nil {
		t.Fatal(err)
	}
	defer Dial(socket).Shutdown(testContext(t))
	c := DialAs(&account.User{Name: "somebody", UID: 54321, GID: 54321, Groups: []uint32{54321}}, socket)
	if _, err := c.List(testContext(t)); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("a socket that they may not use: %v", err)
	}
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(socket, 0o666)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.List(testContext(t)); err == nil || !strings.Contains(err.Error(), "belong to user 0, not to somebody") {
		t.Errorf("terminals of root's: %v", err)
	}
	if err := c.Ensure(testContext(t), func() error { return errors.New("another was started") }); err == nil || strings.Contains(err.Error(), "started") {
		t.Errorf("Ensure took them for missing: %v", err)
	}
}

func TestListen(t *testing.T) {
	socket := filepath.Join(socketDir(t), "dir", "s")
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(socket)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket mode %v, %v", info.Mode(), err)
	}
	if _, err := Listen(socket); !errors.Is(err, ErrHostRunning) {
		t.Errorf("second Listen: %v", err)
	}
	// A host that was killed leaves its socket.
	l.(*listener).Listener.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if l, err = Listen(socket); err != nil {
		t.Fatalf("over a stale socket: %v", err)
	}
	l.Close()
	if err := os.WriteFile(socket, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(socket); err == nil {
		t.Error("Listen replaced a file that is no socket")
	}
}
