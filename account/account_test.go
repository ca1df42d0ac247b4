package account

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// envVerify makes this test binary verify that it is somebody, as berthd does in a child.
const envVerify = "BERTH_TEST_VERIFY"

// somebody has no entry anywhere: nothing here looks one up.
var somebody = &User{Name: "somebody", UID: 54321, GID: 54322, Groups: []uint32{54322, 54323}}

func TestMain(m *testing.M) {
	if os.Getenv(envVerify) != "" {
		if err := somebody.Verify(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root becomes another user")
	}
}

// open is a directory that somebody may enter; private is one that they may not.
func directories(t *testing.T) (open, private string) {
	t.Helper()
	root, err := os.MkdirTemp("", "account-") // t.TempDir lets nobody else in
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	open, private = filepath.Join(root, "open"), filepath.Join(root, "private")
	for _, dir := range []string{open, private} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Chmod(root, 0o755), os.Chown(open, int(somebody.UID), int(somebody.GID))); err != nil {
		t.Fatal(err)
	}
	return open, private
}

func owner(t *testing.T, path string) string {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	stat := info.Sys().(*syscall.Stat_t)
	return fmt.Sprintf("%d:%d %v", stat.Uid, stat.Gid, info.Mode().Perm())
}

func TestFind(t *testing.T) {
	home := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	passwd := write("passwd", strings.ReplaceAll(`root:x:0:0:root:HOME:/bin/sh
# no entry
short:x:1
big:x:4294967296:1::HOME:/bin/sh
dev:x:1000:100:Dev:HOME:/bin/sh
1000:x:1001:100::HOME:
twin:x:1000:200::HOME:/bin/cat
noshell:x:1002:100::HOME:/no/such/shell
homeless:x:1003:100::/no/such/home:/bin/sh
filehome:x:1004:100::/etc/passwd:/bin/sh
toor:x:0:0::HOME:/bin/sh
`, "HOME", home))
	group := write("group", "root:x:0:\nusers:x:100:dev\nwheel:x:10:ann,dev\nbad:x:y:dev\nodd:dev\nalso:x:11:dev\nnot:x:12:devil\n")
	for _, c := range []struct {
		name string
		self int
		want *User
		err  string // a part of it
	}{
		{"dev", 0, &User{"dev", 1000, 100, []uint32{100, 10, 11}, home, "/bin/sh"}, ""},
		{"1001", 0, &User{"1000", 1001, 100, []uint32{100}, home, "/bin/sh"}, ""},
		{"1000", 0, &User{"1000", 1001, 100, []uint32{100}, home, "/bin/sh"}, ""}, // a name comes before a number
		{"root", 0, nil, ""},
		{"toor", 0, nil, ""},
		{"0", 0, nil, ""},
		{"dev", 1000, nil, ""},
		{"nobody", 0, nil, "useradd"},
		{"", 0, nil, "no user"},
		{"4294967296", 0, nil, "no user"},
		{"-1", 0, nil, "no user"},
		{"big", 0, nil, "no user"},
		{"dev", 1001, nil, "only root"},
		{"root", 1000, nil, "only root"},
		{"noshell", 0, nil, "usermod --shell"},
		{"homeless", 0, nil, "install -d -m 700 -o 1003 -g 100 /no/such/home"},
		{"filehome", 0, nil, "no directory"},
	} {
		got, err := find(c.name, c.self, passwd, group)
		if diff := cmp.Diff(c.want, got); diff != "" || (err != nil) != (c.err != "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%q as %d: %v, want %q (-want +got):\n%s", c.name, c.self, err, c.err, diff)
		}
	}
}

func TestNilIsOurselves(t *testing.T) {
	var u *User
	ran := false
	if err := u.Do(func() error { ran = true; return fs.ErrClosed }); !ran || !errors.Is(err, fs.ErrClosed) {
		t.Errorf("ran %v, %v", ran, err)
	}
	if u.Credential() != nil {
		t.Error("a nil user has a credential")
	}
}

func TestDo(t *testing.T) {
	needRoot(t)
	open, private := directories(t)
	before, err := current()
	if err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(open, "root's")
	if err := os.WriteFile(secret, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	err = somebody.Do(func() error {
		if _, err := os.ReadFile(secret); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("a file of root's: %v", err)
		}
		if _, err := os.Stat(filepath.Join(private, ".")); err != nil {
			t.Errorf("a directory of root's cannot be seen: %v", err)
		}
		if _, err := os.ReadDir(private); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("a directory of root's: %v", err)
		}
		if err := os.Chown(open, 0, 0); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("a file was given away: %v", err)
		}
		if l, err := net.Listen("tcp", "127.0.0.1:79"); err == nil && !lowPortsForAll(t) {
			l.Close()
			t.Error("a low port was taken")
		}
		return somebody.Do(func() error { return os.MkdirAll(filepath.Join(open, "a", "b"), 0o700) }) // within another
	})
	if err != nil {
		t.Error(err)
	}
	if got := owner(t, filepath.Join(open, "a", "b")); got != "54321:54322 -rwx------" {
		t.Errorf("a new directory belongs to %s", got)
	}
	after, err := current()
	if diff := cmp.Diff(before, after, cmp.AllowUnexported(rights{})); diff != "" || err != nil {
		t.Errorf("%v: rights before and after:\n%s", err, diff)
	}
}

func lowPortsForAll(t *testing.T) bool {
	t.Helper()
	first, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	return err == nil && strings.TrimSpace(string(first)) == "0"
}

func TestDoAfterAPanic(t *testing.T) {
	needRoot(t)
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic was swallowed")
			}
		}()
		_ = somebody.Do(func() error { panic("on purpose") })
	}()
	if r, err := current(); err != nil || r.uid != 0 {
		t.Errorf("after a panic this is %+v, %v", r, err)
	}
}

// TestDoAtOnce: what one goroutine does as somebody changes nothing for the others, and threads that begin meanwhile are root's.
func TestDoAtOnce(t *testing.T) {
	needRoot(t)
	open, private := directories(t)
	var all sync.WaitGroup
	for i := range 16 {
		all.Go(func() {
			for n := range 50 {
				name := fmt.Sprintf("%d-%d", i, n)
				if err := somebody.Do(func() error { return os.WriteFile(filepath.Join(open, name), nil, 0o600) }); err != nil {
					t.Error(err)
				}
				if err := os.WriteFile(filepath.Join(private, name), nil, 0o600); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	for dir, want := range map[string]string{open: "54321:54322 -rw-------", private: "0:0 -rw-------"} {
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 16*50 {
			t.Fatalf("%d files, %v", len(entries), err)
		}
		for _, e := range entries {
			if got := owner(t, filepath.Join(dir, e.Name())); got != want {
				t.Fatalf("%s belongs to %s, want %s", e.Name(), got, want)
			}
		}
	}
	tasks, err := filepath.Glob("/proc/self/task/*/status")
	if err != nil || len(tasks) == 0 {
		t.Fatal(err)
	}
	for _, task := range tasks {
		if status, err := os.ReadFile(task); err == nil && !strings.Contains(string(status), "\nUid:\t0\t0\t0\t0\n") {
			t.Errorf("a thread kept other rights:\n%s", status)
		}
	}
}

func TestSockets(t *testing.T) {
	needRoot(t)
	open, private := directories(t)
	path := filepath.Join(open, "s")
	l, err := somebody.ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := owner(t, path); !strings.HasPrefix(got, "54321:54322 ") {
		t.Errorf("the socket belongs to %s", got)
	}
	conn, err := somebody.DialUnix(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	there, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	for side, conn := range map[string]net.Conn{"the listener": conn, "the caller": there} {
		raw, err := conn.(*net.UnixConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var cred *unix.Ucred
		if err := raw.Control(func(fd uintptr) { cred, _ = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil || cred.Uid != somebody.UID {
			t.Errorf("%s is %+v, %v", side, cred, err)
		}
	}
	roots, err := net.Listen("unix", filepath.Join(private, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer roots.Close()
	if conn, err := somebody.DialUnix(context.Background(), roots.Addr().String()); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("reached a socket of root's: %v, %v", conn, err)
	}
	if _, err := somebody.ListenUnix(filepath.Join(private, "t")); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("listened in a directory of root's: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := l.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed twice: %v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

// TestTurnedDirectory: a directory of the user's that has become a link since does not make us remove what it leads to.
func TestTurnedDirectory(t *testing.T) {
	needRoot(t)
	open, private := directories(t)
	victim := filepath.Join(private, "passwd")
	if err := os.WriteFile(victim, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(open, "d")
	if err := somebody.Do(func() error { return os.Mkdir(dir, 0o700) }); err != nil {
		t.Fatal(err)
	}
	l, err := somebody.ListenUnix(filepath.Join(dir, "passwd"))
	if err != nil {
		t.Fatal(err)
	}
	err = somebody.Do(func() error { return errors.Join(os.Rename(dir, dir+"-was"), os.Symlink(private, dir)) })
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("closed with %v", err)
	}
	if _, err := os.Lstat(victim); err != nil {
		t.Errorf("root's file is gone: %v", err)
	}
}

// TestVerify: a child with the credential has no way back; one that kept something is told apart.
func TestVerify(t *testing.T) {
	needRoot(t)
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	open, _ := directories(t)
	program := filepath.Join(open, "verify") // go test builds where nobody else may go
	if err := os.WriteFile(program, self, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*syscall.SysProcAttr)
		want   string
	}{
		"as it is":      {func(*syscall.SysProcAttr) {}, ""},
		"root":          {func(a *syscall.SysProcAttr) { a.Credential = nil }, "this is user 0"},
		"kept groups":   {func(a *syscall.SysProcAttr) { a.Credential.Groups = append(a.Credential.Groups, 0) }, "this is user 54321"},
		"another group": {func(a *syscall.SysProcAttr) { a.Credential.Gid = 0 }, "this is user 54321 of group 0"},
		"a capability":  {func(a *syscall.SysProcAttr) { a.AmbientCaps = []uintptr{unix.CAP_SETUID} }, "rights of root are still in effect"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command(program)
			cmd.Env = append(os.Environ(), envVerify+"=1")
			cmd.Dir = "/"
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: somebody.Credential()}
			c.change(cmd.SysProcAttr)
			out, err := cmd.CombinedOutput()
			if (err == nil) != (c.want == "") || !strings.Contains(string(out), c.want) {
				t.Errorf("%v, want %q: %s", err, c.want, out)
			}
		})
	}
}

// FuzzEntries: whatever stands in a user database, what comes out can be a user's.
func FuzzEntries(f *testing.F) {
	f.Add("root:x:0:0:root:/root:/bin/sh\n")
	f.Add("a:b:1:2:c:d:e:f\n::::::\nx:x:-1:99999999999:::\n")
	f.Add(strings.Repeat("a", maxLine+1) + "\nb:x:1:1:::\n")
	path := filepath.Join(f.TempDir(), "passwd")
	f.Fuzz(func(t *testing.T, text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for u := range Entries(path) {
			if u.Name == "" || strings.ContainsAny(u.Name+u.Home+u.Shell, ":\n") {
				t.Errorf("%+v", u)
			}
		}
		groups(path, "root", 1)
	})
}
