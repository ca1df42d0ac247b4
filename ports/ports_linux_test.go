package ports

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/berthd/berth/wire"
)

// What this test binary does when it is started as a helper process.
const (
	roleVar    = "BERTH_PORTS_TEST_ROLE"
	roleListen = "listen" // print a port, listen on it until stdin ends
	roleList   = "list"   // print the list as JSON
)

func TestMain(m *testing.M) {
	switch os.Getenv(roleVar) {
	case roleListen:
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			panic(err)
		}
		fmt.Println(l.Addr().(*net.TCPAddr).Port)
		os.Stdin.Read(make([]byte, 1))
	case roleList:
		list, err := New(Config{}).List(context.Background())
		if err != nil {
			panic(err)
		}
		json.NewEncoder(os.Stdout).Encode(list)
	default:
		goleak.VerifyTestMain(m)
	}
}

// helper starts this binary in a role; it ends with the test.
func helper(t *testing.T, role string, as *syscall.Credential) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleVar+"="+role)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as}
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
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	return cmd, bufio.NewReader(out)
}

// find returns the entry of a port.
func find(list []wire.ListeningPort, network string, port int) *wire.ListeningPort {
	for i := range list {
		if list[i].Network == network && int(list[i].Port) == port {
			return &list[i]
		}
	}
	return nil
}

func lists(t *testing.T, l *Lister) []wire.ListeningPort {
	t.Helper()
	list, err := l.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// sources runs a test over each way to learn of sockets.
func sources(t *testing.T, test func(t *testing.T, l *Lister)) {
	for _, s := range []source{diag{}, procNet{}} {
		t.Run(s.String(), func(t *testing.T) { test(t, &Lister{source: s}) })
	}
}

func TestEveryAddress(t *testing.T) {
	v6only := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1) })
	}}
	sources(t, func(t *testing.T, l *Lister) {
		for _, tt := range []struct{ network, address, want string }{
			{"tcp4", "0.0.0.0:0", "0.0.0.0"},
			{"tcp4", "127.0.0.1:0", "127.0.0.1"},
			{"tcp4", "127.3.2.1:0", "127.3.2.1"},
			{"tcp", "[::]:0", "::"},
			{"tcp6", "[::1]:0", "::1"},
			{"udp4", "0.0.0.0:0", "0.0.0.0"},
			{"udp6", "[::1]:0", "::1"},
		} {
			var addr net.Addr
			if strings.HasPrefix(tt.network, "udp") {
				c, err := v6only.ListenPacket(t.Context(), tt.network, tt.address)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				addr = c.LocalAddr()
			} else {
				c, err := net.Listen(tt.network, tt.address)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				addr = c.Addr()
			}
			port := int(netip.MustParseAddrPort(addr.String()).Port())
			got := find(lists(t, l), tt.network[:3], port)
			if got == nil {
				t.Errorf("%s on %s is not listed", tt.network, addr)
				continue
			}
			if diff := cmp.Diff([]string{tt.want}, got.Addresses); diff != "" || got.PID != os.Getpid() {
				t.Errorf("%s on %s: process %d, addresses %s", tt.network, addr, got.PID, diff)
			}
		}
	})
}

func TestOneEntryForEachPort(t *testing.T) {
	first, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	port := first.Addr().(*net.TCPAddr).Port
	second, err := net.Listen("tcp6", fmt.Sprintf("[::1]:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	sources(t, func(t *testing.T, l *Lister) {
		var entries []wire.ListeningPort
		for _, p := range lists(t, l) {
			if p.Network == "tcp" && int(p.Port) == port {
				entries = append(entries, p)
			}
		}
		if len(entries) != 1 || !cmp.Equal(entries[0].Addresses, []string{"127.0.0.1", "::1"}) {
			t.Errorf("got %+v, want one entry with both addresses", entries)
		}
	})
}

func TestOwner(t *testing.T) {
	cmd, out := helper(t, roleListen, nil)
	line, err := out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	port, _ := strconv.Atoi(strings.TrimSpace(line))
	sources(t, func(t *testing.T, l *Lister) {
		got := find(lists(t, l), "tcp", port)
		if got == nil || got.PID != cmd.Process.Pid || got.Command != "/proc/self/exe" || got.ProcessName != "exe" || got.User == "" {
			t.Fatalf("got %+v, want process %d", got, cmd.Process.Pid)
		}
		if got.StartedAt == nil || time.Since(*got.StartedAt).Abs() > time.Minute {
			t.Errorf("started at %v", got.StartedAt)
		}
		if diff := cmp.Diff(got, find(lists(t, l), "tcp", port)); diff != "" {
			t.Errorf("the second list differs: %s", diff)
		}
		hiding := &Lister{source: l.source, cfg: Config{HidePIDs: []int{cmd.Process.Pid}}}
		if got := find(lists(t, hiding), "tcp", port); got == nil || got.Hidden != Berthd {
			t.Errorf("a process to hide: %+v", got)
		}
	})
}

// A port whose owner may not be read is listed without.
func TestUnreadableOwner(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test needs root, to become somebody else")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	const nobody = 65534
	_, out := helper(t, roleList, &syscall.Credential{Uid: nobody, Gid: nobody})
	var list []wire.ListeningPort
	if err := json.NewDecoder(out).Decode(&list); err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	want := &wire.ListeningPort{Network: "tcp", Port: uint16(port), Addresses: []string{"127.0.0.1"}, User: "root"}
	if diff := cmp.Diff(want, find(list, "tcp", port)); diff != "" {
		t.Error(diff)
	}
}

// A socket that is closed is gone at once, and one that takes its number is not mistaken for it.
func TestOpenedAndClosed(t *testing.T) {
	sources(t, func(t *testing.T, l *Lister) {
		for range 20 {
			s, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			port := s.Addr().(*net.TCPAddr).Port
			if got := find(lists(t, l), "tcp", port); got == nil || got.PID != os.Getpid() {
				t.Errorf("open: %+v", got)
			}
			s.Close()
			if got := find(lists(t, l), "tcp", port); got != nil {
				t.Errorf("closed: %+v", got)
			}
		}
	})
}

// ss asks the same kernel; what it lists before and after is in the list, and what is in the list it knows.
func TestSameAsSS(t *testing.T) {
	for range 5 {
		l, err := net.Listen("tcp", ":0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
	}
	sources(t, func(t *testing.T, l *Lister) {
		before := ss(t)
		got := make(map[string]bool)
		for _, p := range lists(t, l) {
			got[fmt.Sprintf("%s %d", p.Network, p.Port)] = true
		}
		after := ss(t)
		for p := range before {
			if after[p] && !got[p] {
				t.Errorf("%s is in ss and not in the list", p)
			}
		}
		for p := range got {
			if !before[p] && !after[p] {
				t.Errorf("%s is in the list and not in ss", p)
			}
		}
	})
}

func ss(t *testing.T) map[string]bool {
	t.Helper()
	out, err := exec.Command("ss", "-Hltun").Output()
	if err != nil {
		t.Fatalf("cannot run ss (iproute2 must be installed): %v", err)
	}
	ports := make(map[string]bool)
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		ports[f[0]+" "+f[4][strings.LastIndexByte(f[4], ':')+1:]] = true
	}
	return ports
}

func TestBestSource(t *testing.T) {
	if got := New(Config{}).Source(); got != "netlink" && got != "/proc/net" {
		t.Errorf("source %q", got)
	}
}

func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := New(Config{}).List(ctx); err == nil {
		t.Error("a cancelled list succeeded")
	}
}

func TestParseStat(t *testing.T) {
	const rest = " S 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 %s 1 2"
	boot := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	started := boot.Add(12 * time.Second)
	for name, tt := range map[string]struct {
		in      string
		name    string
		started *time.Time
	}{
		"plain":       {"7 (sshd)" + fmt.Sprintf(rest, "1234"), "sshd", &started},
		"hostile":     {"7 (a) S (b\x1b[)" + fmt.Sprintf(rest, "1234"), "a) S (b\x1b[", &started},
		"not UTF-8":   {"7 (\xff)" + fmt.Sprintf(rest, "1234"), "�", &started},
		"no number":   {"7 (x)" + fmt.Sprintf(rest, "many"), "x", nil},
		"far too big": {"7 (x)" + fmt.Sprintf(rest, "9223372036854775807"), "x", nil},
		"short":       {"7 (x) S", "x", nil},
		"no name":     {"7 x S", "", nil},
		"empty":       {"", "", nil},
	} {
		gotName, gotStarted := parseStat(tt.in, boot)
		if gotName != tt.name || !cmp.Equal(gotStarted, tt.started) {
			t.Errorf("%s: got %q, %v; want %q, %v", name, gotName, gotStarted, tt.name, tt.started)
		}
	}
}

func TestSocketInode(t *testing.T) {
	for in, want := range map[string]uint32{"socket:[1]": 1, "socket:[4294967295]": 1<<32 - 1} {
		if got, ok := socketInode([]byte(in)); !ok || got != want {
			t.Errorf("%s: %d, %v", in, got, ok)
		}
	}
	for _, in := range []string{"", "socket:[]", "socket:[4294967296]", "socket:[1", "socket:[1x]", "pipe:[1]", "/dev/null"} {
		if got, ok := socketInode([]byte(in)); ok {
			t.Errorf("%s: %d", in, got)
		}
	}
}

func FuzzParseDiag(f *testing.F) {
	v4 := make([]byte, diagMessageSize)
	v4[0] = unix.AF_INET
	binary.BigEndian.PutUint16(v4[4:], 8080)
	copy(v4[8:], []byte{127, 0, 0, 1})
	f.Add(v4)
	f.Add([]byte{unix.AF_INET6})
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseDiag(b)
		if (err == nil) != s.local.Addr().IsValid() {
			t.Errorf("%v, %v", s.local, err)
		}
	})
}

func BenchmarkFirstList(b *testing.B) {
	for b.Loop() {
		if _, err := (&Lister{source: diag{}}).List(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLaterList(b *testing.B) {
	l := &Lister{source: diag{}}
	for b.Loop() {
		if _, err := l.List(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
