package ptyhost

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
)

// hostProcess runs a host as a process of its own in a mount namespace of its own, after the lines of shell given.
func hostProcess(t *testing.T, socket, prepare string) *Client {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-ec", prepare+"\nexec "+self)
	cmd.Env = append(os.Environ(), envHost+"="+socket)
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	c := Dial(socket)
	if err := c.Ensure(testContext(t), cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Shutdown(testContext(t)); err != nil {
			t.Errorf("cannot end the host: %v", err)
			cmd.Process.Kill()
		}
		cmd.Wait()
	})
	return c
}

// TestNoTerminalsLeft wants a plain sentence when the kernel has no PTY left, and the next one to work when it has. The limit is that of a
// devpts of its own: the machine's is everybody's.
func TestNoTerminalsLeft(t *testing.T) {
	socket := filepath.Join(socketDir(t), "s")
	c := hostProcess(t, socket, "mount -t devpts -o newinstance,ptmxmode=0666,max=2 devpts /dev/pts; mount --bind /dev/pts/ptmx /dev/ptmx")
	first := watch(t, attach(t, c, AttachRequest{Create: shell("echo up; tty; read x")}))
	first.expect(t, "/dev/pts/0")
	second := watch(t, attach(t, c, AttachRequest{Create: shell("echo up; read x")}))
	second.expect(t, "up")
	for range 20 { // the failed ones leave nothing behind either
		_, err := c.Attach(testContext(t), AttachRequest{ID: uuid.NewString(), Create: shell("echo up")})
		if !errors.Is(err, ErrStart) || !strings.Contains(err.Error(), "no terminals left") || !strings.Contains(err.Error(), "sysctl") {
			t.Fatalf("without a PTY: %v", err)
		}
	}
	fmt.Fprintln(second, "end")
	wantExit(t, second.Attachment, ExitStatus{})
	third := watch(t, attach(t, c, AttachRequest{Create: shell("echo again; read x")}))
	third.expect(t, "again")
}

// TestDiskFull wants terminals to work when neither the log nor anything else beside the socket can be written.
func TestDiskFull(t *testing.T) {
	dir := socketDir(t)
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
	socket := filepath.Join(dir, "s")
	c := Dial(socket)
	if err := c.Ensure(testContext(t), func() error { return startHost(socket) }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Shutdown(testContext(t)); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "full"), make([]byte, 1<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	for range 40 { // each writes two lines into the log, which would be more than a page
		a := attach(t, c, AttachRequest{Create: shell("echo up; exit 3")})
		if out := readAll(t, a); out != "up\r\n" {
			t.Errorf("read %q", out)
		}
		wantExit(t, a, ExitStatus{Code: 3})
	}

	// A host that starts then has no log.
	if err := StartDetached(exec.Command("/bin/true"), nil, "/dev/full"); err != nil {
		t.Errorf("a log on /dev/full: %v", err)
	}
	none := socketDir(t)
	if err := syscall.Mount("tmpfs", none, "tmpfs", 0, "nr_inodes=1"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(none, syscall.MNT_DETACH) })
	if err := StartDetached(exec.Command("/bin/true"), nil, filepath.Join(none, "log")); err != nil {
		t.Errorf("without room for a log: %v", err)
	}
}

// TestResizeStorm wants a terminal to stay usable while two viewers resize it 500 times a second each, and to end with the size of the last typist.
func TestResizeStorm(t *testing.T) {
	c := startTestHost(t)
	id := uuid.NewString()
	script := `seq 1 20000; n=0; trap 'n=$((n+1))' WINCH; while :; do read -t 5 x && echo "read $x after $n resizes"; done`
	a := watch(t, attach(t, c, AttachRequest{ID: id, Create: &CreateRequest{Argv: []string{"/bin/bash", "-c", script}, Env: testEnv}}))
	a.expect(t, "20000")
	b := watch(t, attach(t, c, AttachRequest{ID: id}))
	const each = 1000
	var storm sync.WaitGroup
	for i, w := range []*watcher{a, b} {
		storm.Go(func() {
			tick := time.NewTicker(2 * time.Millisecond)
			defer tick.Stop()
			for n := range each {
				<-tick.C
				size := Size{Rows: uint16(20 + (n+i)%30), Cols: uint16(70 + n%50)}
				switch n % 250 {
				case 100:
					size = Size{}
				case 200:
					size = Size{Rows: 65535, Cols: 65535}
				}
				if err := w.Resize(size); err != nil {
					t.Errorf("resize %d: %v", n, err)
					return
				}
				if n%10 == i { // each becomes the last typist again and again
					fmt.Fprintf(w, "%c%d\n", 'a'+i, n)
				}
			}
		})
	}
	start := time.Now()
	for n := range 5 { // others do not notice
		o := watch(t, attach(t, c, AttachRequest{Create: shell("read x; echo got $x")}))
		fmt.Fprintln(o, n)
		o.expect(t, fmt.Sprintf("got %d", n))
	}
	t.Logf("five other terminals opened and answered in %v", time.Since(start).Round(time.Millisecond))
	storm.Wait()
	if err := b.Resize(Size{33, 111}); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(b, "last")
	b.expect(t, "read last after")
	eventually(t, "the last typist's size", func() bool { return listed(t, c, id).Size == (Size{33, 111}) })
	out, _ := b.output()
	_, after, _ := strings.Cut(string(out), "read last after ")
	t.Logf("of %d resizes the program saw %s", 2*each, strings.TrimSpace(after[:min(len(after), 20)]))
}

// TestShellsThatRefuse: what a shell has to say is shown, with its exit code; one that is missing is named.
func TestShellsThatRefuse(t *testing.T) {
	c := startTestHost(t)
	a := attach(t, c, AttachRequest{Create: &CreateRequest{Argv: []string{"/usr/sbin/nologin"}, Env: testEnv}})
	if out := readAll(t, a); !strings.Contains(out, "This account is currently not available.") {
		t.Errorf("nologin said %q", out)
	}
	wantExit(t, a, ExitStatus{Code: 1})
	a = attach(t, c, AttachRequest{Create: &CreateRequest{Argv: []string{"/bin/false"}, Env: testEnv}})
	if out := readAll(t, a); out != "" {
		t.Errorf("false said %q", out)
	}
	wantExit(t, a, ExitStatus{Code: 1})
}
