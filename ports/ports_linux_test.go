package ports

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/berthd/berth/internal/netlab"
	"github.com/berthd/berth/wire"
)

// What this test binary does when it is started as a helper process.
const (
	roleVar     = "BERTH_PORTS_TEST_ROLE"
	roleListen  = "listen"  // print a port, listen on it until stdin ends
	roleList    = "list"    // listen, print the list as JSON
	roleSealed  = "sealed"  // may use no netlink; then as list
	roleWalled  = "walled"  // may enter no namespace; then as list
	roleHidden  = "hidden"  // list as another user, in a /proc that hides what is not one's own
	roleCompare = "compare" // compare with ss, as often as roundsVar says
	roundsVar   = "BERTH_PORTS_TEST_ROUNDS"
)

func TestMain(m *testing.M) {
	role := os.Getenv(roleVar)
	if role == "" {
		goleak.VerifyTestMain(m)
		return
	}
	if err := play(role); err != nil {
		fmt.Fprintln(os.Stderr, role+":", err)
		os.Exit(1)
	}
}

func play(role string) error {
	switch role {
	case roleListen:
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		if err := os.WriteFile("/proc/self/comm", []byte(hostile), 0); err != nil {
			return err
		}
		fmt.Println(l.Addr().(*net.TCPAddr).Port)
		os.Stdin.Read(make([]byte, 1))
		return nil
	case roleSealed:
		if err := refuse(unix.SYS_SOCKET, unix.AF_NETLINK); err != nil {
			return err
		}
	case roleWalled:
		if err := refuse(unix.SYS_SETNS, anyArgument); err != nil {
			return err
		}
	case roleHidden:
		if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return err
		}
		if err := unix.Mount("proc", "/proc", "proc", 0, "hidepid=2"); err != nil {
			return err
		}
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), roleVar+"="+roleList)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: nobody}
		return cmd.Run()
	case roleCompare:
		return compare(os.Getenv(roundsVar))
	}
	own, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer own.Close()
	l := New(Config{HidePIDs: []int{os.Getpid()}})
	list, err := l.List(context.Background())
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(wire.ListeningPorts{Ports: list, Source: l.Source()})
}

// hostile is the name that a helper which listens gives itself.
const hostile = "\x1b[31m)\n(<b>&"

var nobody = &syscall.Credential{Uid: 65534, Gid: 65534}

// anyArgument has refuse not look at the argument.
const anyArgument = 1<<32 - 1

// refuse makes the kernel refuse a system call to this process, if its first argument is the given one.
func refuse(call, argument uint32) error {
	const load, equal, answer = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
	filter := []unix.SockFilter{
		{Code: load, K: 0}, // the number of the call
		{Code: equal, K: call, Jf: 3},
		{Code: load, K: 16}, // its first argument
		{Code: equal, K: argument, Jf: 1},
		{Code: answer, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: answer, K: unix.SECCOMP_RET_ALLOW},
	}
	if argument == anyArgument {
		filter[2], filter[3] = filter[4], filter[5]
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program))); errno != 0 {
		return fmt.Errorf("cannot set a seccomp filter: %w", errno)
	}
	return nil
}

// helper starts this binary in a role; it ends with the test.
func helper(t *testing.T, role string, as *syscall.Credential) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as}
	return cmd, start(t, cmd, role)
}

// start starts a command that becomes this binary in a role, and returns what it says. It ends with the test.
func start(t *testing.T, cmd *exec.Cmd, role string) *bufio.Reader {
	t.Helper()
	cmd.Env = append(os.Environ(), roleVar+"="+role)
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
	return bufio.NewReader(out)
}

// find returns the entry of a port in our own network namespace.
func find(list []wire.ListeningPort, network string, port int) *wire.ListeningPort {
	for i := range list {
		if list[i].Network == network && int(list[i].Port) == port && list[i].Namespace == 0 {
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

func lister(s source) *Lister {
	l := New(Config{})
	l.source = s
	return l
}

// sources runs a test over each way to learn of sockets.
func sources(t *testing.T, test func(t *testing.T, l *Lister)) {
	for _, s := range []source{new(diag), procNet{}} {
		t.Run(s.String(), func(t *testing.T) { test(t, lister(s)) })
	}
}

// A kind of listener.
type kind struct{ network, address, want string }

var kinds = []kind{
	{"tcp4", "0.0.0.0:0", "0.0.0.0"},
	{"tcp4", "127.0.0.1:0", "127.0.0.1"},
	{"tcp4", "127.3.2.1:0", "127.3.2.1"},
	{"tcp", "[::]:0", "::"},
	{"tcp6", "[::]:0", "::"}, // for IPv6 only
	{"tcp6", "[::1]:0", "::1"},
	{"udp4", "0.0.0.0:0", "0.0.0.0"},
	{"udp4", "127.0.0.1:0", "127.0.0.1"},
	{"udp", "[::]:0", "::"},
	{"udp6", "[::]:0", "::"}, // for IPv6 only
	{"udp6", "[::1]:0", "::1"},
}

// open listens, and returns the port.
func (k kind) open(t *testing.T) (io.Closer, int) {
	t.Helper()
	if strings.HasPrefix(k.network, "udp") {
		c, err := net.ListenPacket(k.network, k.address)
		if err != nil {
			t.Fatal(err)
		}
		return c, c.LocalAddr().(*net.UDPAddr).Port
	}
	l, err := net.Listen(k.network, k.address)
	if err != nil {
		t.Fatal(err)
	}
	return l, l.Addr().(*net.TCPAddr).Port
}

// in returns the entry of a port of this kind, whose only address it is.
func (k kind) in(list []wire.ListeningPort, port int) *wire.ListeningPort {
	p := find(list, k.network[:3], port)
	if p == nil || !slices.Equal(p.Addresses, []string{k.want}) || p.PID != os.Getpid() {
		return nil
	}
	return p
}

func TestEveryKind(t *testing.T) {
	sources(t, func(t *testing.T, l *Lister) {
		for _, k := range kinds {
			open, port := k.open(t)
			if list := lists(t, l); k.in(list, port) == nil {
				t.Errorf("%s on %s: %+v", k.network, k.address, find(list, k.network[:3], port))
			}
			open.Close()
			if p := find(lists(t, l), k.network[:3], port); p != nil {
				t.Errorf("%s on %s: closed, but %+v", k.network, k.address, p)
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
		if got == nil || got.PID != cmd.Process.Pid || got.Command != "/proc/self/exe" || got.ProcessName != hostile || got.User == "" {
			t.Fatalf("got %+v, want process %d", got, cmd.Process.Pid)
		}
		if got.StartedAt == nil || time.Since(*got.StartedAt).Abs() > time.Minute {
			t.Errorf("started at %v", got.StartedAt)
		}
		if diff := cmp.Diff(got, find(lists(t, l), "tcp", port)); diff != "" {
			t.Errorf("the second list differs: %s", diff)
		}
		hiding := New(Config{HidePIDs: []int{cmd.Process.Pid}})
		hiding.source = l.source
		if got := find(lists(t, hiding), "tcp", port); got == nil || got.Hidden != Berthd {
			t.Errorf("a process to hide: %+v", got)
		}
	})
}

// TestOwnerEnds: a socket that outlives its owner in another process is that process's from the next list on.
func TestOwnerEnds(t *testing.T) {
	sources(t, func(t *testing.T, l *Lister) {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		socket, err := listener.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		port := listener.Addr().(*net.TCPAddr).Port
		var holders []*exec.Cmd
		for range 3 {
			cmd := exec.Command("sleep", "60")
			cmd.ExtraFiles = []*os.File{socket}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Wait()
			defer cmd.Process.Kill()
			holders = append(holders, cmd)
		}
		listener.Close()
		socket.Close()
		for _, holder := range holders {
			for range 2 { // the second of an unchanged machine
				if got := find(lists(t, l), "tcp", port); got == nil || got.PID != holder.Process.Pid {
					t.Fatalf("got %+v, want process %d", got, holder.Process.Pid)
				}
			}
			holder.Process.Kill()
			holder.Wait()
		}
		if got := find(lists(t, l), "tcp", port); got != nil {
			t.Errorf("a port that nobody listens on any more is listed: %+v", got)
		}
	})
}

// list starts this binary in a role that lists, and returns what it found.
func listAs(t *testing.T, role string, attr syscall.SysProcAttr) wire.ListeningPorts {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test needs root, to become somebody else")
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.SysProcAttr = &attr
	var answer wire.ListeningPorts
	if err := json.NewDecoder(start(t, cmd, role)).Decode(&answer); err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(answer.Ports, func(p wire.ListeningPort) bool { return p.Hidden == Berthd && p.Namespace == 0 && p.PID != 0 }) {
		t.Errorf("its own port is not listed: %+v", answer.Ports)
	}
	return answer
}

// A port whose owner may not be read, or not even seen, is listed without.
func TestUnreadableOwner(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	want := &wire.ListeningPort{Network: "tcp", Port: uint16(port), Addresses: []string{"127.0.0.1"}, User: "root"}
	for role, attr := range map[string]syscall.SysProcAttr{
		roleList:   {Credential: nobody},
		roleHidden: {Cloneflags: unix.CLONE_NEWNS},
	} {
		answer := listAs(t, role, attr)
		if diff := cmp.Diff(want, find(answer.Ports, "tcp", port)); diff != "" {
			t.Errorf("%s: %s", role, diff)
		}
	}
}

// Whoever has the rights sees the owner of every port.
func TestAnotherUsersPort(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test needs root, to become somebody else")
	}
	cmd, out := helper(t, roleListen, nobody)
	line, err := out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	port, _ := strconv.Atoi(strings.TrimSpace(line))
	sources(t, func(t *testing.T, l *Lister) {
		if got := find(lists(t, l), "tcp", port); got == nil || got.PID != cmd.Process.Pid || got.User != "nobody" {
			t.Errorf("got %+v", got)
		}
	})
}

// Where netlink is refused, /proc says the same; where other namespaces may not be entered too.
func TestSealed(t *testing.T) {
	lab := netlab.New(t, "ports", "a")
	inside, insidePort, _ := inSpace(t, lab, "a", roleListen)
	cmd, out := helper(t, roleListen, nil)
	line, err := out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	port, _ := strconv.Atoi(strings.TrimSpace(line))
	for role, source := range map[string]string{
		roleSealed: "/proc/net",
		roleWalled: "netlink, and /proc/net for namespaces that may not be entered",
	} {
		answer := listAs(t, role, syscall.SysProcAttr{})
		if answer.Source != source {
			t.Errorf("%s: source %q, want %q", role, answer.Source, source)
		}
		if got := find(answer.Ports, "tcp", port); got == nil || got.PID != cmd.Process.Pid {
			t.Errorf("%s: %+v", role, got)
		}
		if got := elsewhere(answer.Ports, insidePort, inside.Process.Pid); got == nil {
			t.Errorf("%s: the port in a namespace is not listed: %+v", role, answer.Ports)
		}
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

// A command line of any length and content is told in part, and as text.
func TestHugeCommand(t *testing.T) {
	cmd := exec.Command("/proc/self/exe", slices.Repeat([]string{"\xff\x1b]0;x\a" + strings.Repeat("é", 1<<10)}, 200)...)
	line, err := start(t, cmd, roleListen).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	port, _ := strconv.Atoi(strings.TrimSpace(line))
	got := find(lists(t, New(Config{})), "tcp", port)
	if got == nil || !utf8.ValidString(got.Command) || len(got.Command) < maxCommand/2 || len(got.Command) > maxCommand+8 {
		t.Errorf("got %+v", got)
	}
	if _, err := json.Marshal(got); err != nil {
		t.Error(err)
	}
}

// Processes that end while they are looked at do no harm.
func TestVanishing(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	busy := exec.CommandContext(ctx, "perl", "-e", `use Socket; $SIG{CHLD} = "IGNORE";
		while (1) { if (fork) { select undef, undef, undef, 0.001; next } socket($s, PF_INET, SOCK_STREAM, 0); bind($s, sockaddr_in(0, INADDR_LOOPBACK)); listen($s, 1); exit }`)
	if err := busy.Start(); err != nil {
		t.Fatalf("cannot start perl (perl-base must be installed): %v", err)
	}
	defer func() { cancel(); busy.Wait() }()
	open, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	sources(t, func(t *testing.T, l *Lister) {
		for range 50 {
			if find(lists(t, l), "tcp", open.Addr().(*net.TCPAddr).Port) == nil {
				t.Fatal("a port is missing")
			}
		}
	})
}

// A signal that comes while a table of descriptors is read, of which the Go runtime sends itself many, hides none of them.
func TestSignals(t *testing.T) {
	const many = 1000
	wanted := make(map[uint32]*holder)
	for range many {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			t.Fatal(err)
		}
		wanted[uint32(st.Ino)] = new(holder)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	walking := unix.Gettid()
	var sender sync.WaitGroup
	defer sender.Wait()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	sender.Go(func() {
		for ctx.Err() == nil {
			unix.Tgkill(os.Getpid(), walking, unix.SIGURG)
		}
	})
	w := walker{dirents: make([]byte, 32<<10)}
	for range 20 {
		if w.process(os.Getpid(), wanted); len(w.found) != many {
			t.Fatalf("%d of %d sockets are found", len(w.found), many)
		}
	}
}

// A farm is 200 processes that listen on 10 ports each, of every kind. It says a dot for each process, and ends with its standard input.
const farm = `use Socket qw(:all); $| = 1;
	for (1 .. 200) {
		next if fork;
		for my $kind (0 .. 9) {
			my $six = $kind & 1;
			my $address = $kind & 2 ? ($six ? "::1" : "127.0.0.1") : ($six ? "::" : "0.0.0.0");
			my $udp = $kind > 6;
			socket(my $s, $six ? PF_INET6 : PF_INET, $udp ? SOCK_DGRAM : SOCK_STREAM, 0) or die "socket: $!";
			if ($six) { setsockopt($s, IPPROTO_IPV6, IPV6_V6ONLY, $kind == 1 ? 1 : 0) or die "v6only: $!" }
			bind($s, $six ? pack_sockaddr_in6(0, inet_pton(AF_INET6, $address)) : pack_sockaddr_in(0, inet_aton($address))) or die "bind: $!";
			$udp or listen($s, 5) or die "listen: $!";
			push @all, $s;
		}
		print "."; sysread STDIN, $_, 1; exit;
	}
	sysread STDIN, $_, 1; `

// On a machine with 2,000 listeners in 200 processes, ss of the same moment has the same sockets with the same owners: ten times in a row, and a hundred
// times with BERTH_LONG.
func TestSameAsSS(t *testing.T) {
	rounds := "10"
	if os.Getenv("BERTH_LONG") != "" {
		rounds = "100"
	}
	t.Setenv(roundsVar, rounds)
	lab := netlab.New(t, "ports", "farm")
	dots := start(t, lab.Command("farm", "perl", "-e", farm), "")
	if _, err := io.ReadFull(dots, make([]byte, 200)); err != nil {
		t.Fatalf("not all processes came up (perl-base must be installed): %v", err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	said, err := io.ReadAll(start(t, lab.Command("farm", exe), roleCompare))
	if err != nil || string(said) != "the same "+rounds+" times\n" {
		t.Errorf("%s%v", said, err)
	}
	// From outside, the same is listed for that namespace.
	want, err := ss(lab.Command("farm", "ss", "-Hlntup"))
	if err != nil {
		t.Fatal(err)
	}
	spaces := make(map[int64][]wire.ListeningPort)
	for _, p := range lists(t, New(Config{})) {
		spaces[p.Namespace] = append(spaces[p.Namespace], p)
	}
	for id, list := range spaces {
		if diff := differ(want, list); diff == "" {
			return
		} else if len(list) > 1000 {
			t.Errorf("in namespace %d: %s", id, diff)
		}
	}
	t.Error("no namespace has what ss has in it")
}

// compare compares with ss, and says how often both were the same.
func compare(rounds string) error {
	n, err := strconv.Atoi(rounds)
	if err != nil {
		return err
	}
	warm := New(Config{})
	for i := range n {
		want, err := ss(exec.Command("ss", "-Hlntup"))
		if err != nil {
			return err
		}
		sockets := 0
		for _, e := range want {
			sockets += len(e.addresses)
		}
		if sockets != 2000 {
			return fmt.Errorf("ss lists %d sockets, want 2000", sockets)
		}
		l := warm
		if i%4 == 3 {
			l = New(Config{})
		}
		list, err := l.List(context.Background())
		if err != nil {
			return err
		}
		own := slices.DeleteFunc(slices.Clone(list), func(p wire.ListeningPort) bool { return p.Namespace != 0 })
		if diff := differ(want, own); diff != "" {
			return fmt.Errorf("round %d: %s", i+1, diff)
		}
	}
	fmt.Printf("the same %d times\n", n)
	return nil
}

// differ compares a list with what ss says.
func differ(want map[string]entry, list []wire.ListeningPort) string {
	got := make(map[string]entry)
	for _, p := range list {
		got[fmt.Sprintf("%s %d", p.Network, p.Port)] = entry{p.Addresses, p.PID}
	}
	return cmp.Diff(want, got, cmp.AllowUnexported(entry{}))
}

// entry is what is compared of a port: its addresses, and of the processes that have it the one that began first.
type entry struct {
	addresses []string
	pid       int
}

// ss returns what ss lists, by network and port.
func ss(cmd *exec.Cmd) (map[string]entry, error) {
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("cannot run ss (iproute2 must be installed): %w", err)
	}
	ports := make(map[string]entry)
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		colon := strings.LastIndexByte(f[4], ':')
		address := strings.Trim(f[4][:colon], "[]")
		if address == "*" { // of both families
			address = "::"
		}
		_, owner, _ := strings.Cut(line, "pid=")
		owner, _, _ = strings.Cut(owner, ",")
		pid, err := strconv.Atoi(owner)
		if err != nil {
			return nil, fmt.Errorf("ss knows no owner: %s", line)
		}
		e := ports[f[0]+" "+f[4][colon+1:]]
		e.addresses = append(e.addresses, address)
		slices.Sort(e.addresses)
		if e.pid == 0 || pid < e.pid {
			e.pid = pid
		}
		ports[f[0]+" "+f[4][colon+1:]] = e
	}
	return ports, nil
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
		gotName, ticks := parseStat(tt.in)
		if got := sinceBoot(ticks, boot); gotName != tt.name || !cmp.Equal(got, tt.started) {
			t.Errorf("%s: got %q, %v; want %q, %v", name, gotName, got, tt.name, tt.started)
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

// message makes a netlink message.
func message(kind uint16, seq uint32, body []byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(body)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, 0)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	return append(b, body...)
}

func inetMessage(family byte, port uint16) []byte {
	b := make([]byte, diagMessageSize)
	b[0] = family
	binary.BigEndian.PutUint16(b[4:], port)
	copy(b[8:], []byte{127, 0, 0, 1})
	return b
}

func TestParseDump(t *testing.T) {
	sock := message(unix.SOCK_DIAG_BY_FAMILY, 7, inetMessage(unix.AF_INET, 80))
	unbound := message(unix.SOCK_DIAG_BY_FAMILY, 7, inetMessage(unix.AF_INET, 0))
	refused := binary.NativeEndian.AppendUint32(nil, uint32(0xffffffff)) // -EPERM
	for name, tt := range map[string]struct {
		in      []byte
		sockets int
		done    bool
		err     error
	}{
		"two and more to come":  {slices.Concat(sock, sock), 2, false, nil},
		"the end":               {slices.Concat(sock, message(unix.NLMSG_DONE, 7, make([]byte, 4)), sock), 1, true, nil},
		"not bound":             {unbound, 0, false, nil},
		"an answer to others":   {message(unix.SOCK_DIAG_BY_FAMILY, 6, inetMessage(unix.AF_INET, 80)), 0, false, nil},
		"refused":               {message(unix.NLMSG_ERROR, 7, refused), 0, true, unix.EPERM},
		"refused half way":      {slices.Concat(sock, message(unix.NLMSG_DONE, 7, refused)), 1, true, unix.EPERM},
		"another kind":          {message(99, 7, nil), 0, false, nil},
		"nothing":               {nil, 0, false, nil},
		"shorter than a header": {sock[:10], 0, false, nil},
	} {
		got, done, err := parseDump(tt.in, 7, nil)
		if len(got) != tt.sockets || done != tt.done || err != tt.err {
			t.Errorf("%s: %d sockets, %v, %v", name, len(got), done, err)
		}
	}
	for name, in := range map[string][]byte{
		"longer than the piece": sock[:len(sock)-1],
		"a short socket":        message(unix.SOCK_DIAG_BY_FAMILY, 7, make([]byte, 8)),
		"an unknown family":     message(unix.SOCK_DIAG_BY_FAMILY, 7, inetMessage(99, 80)),
	} {
		if _, _, err := parseDump(in, 7, nil); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func FuzzParseDump(f *testing.F) {
	f.Add(slices.Concat(message(unix.SOCK_DIAG_BY_FAMILY, 1, inetMessage(unix.AF_INET, 8080)), message(unix.NLMSG_DONE, 1, make([]byte, 4))))
	f.Add(message(unix.SOCK_DIAG_BY_FAMILY, 1, inetMessage(unix.AF_INET6, 53)))
	f.Add(message(unix.NLMSG_ERROR, 1, []byte{0xff, 0xff, 0xff, 0xff}))
	f.Fuzz(func(t *testing.T, b []byte) {
		all, _, _ := parseDump(b, 1, nil)
		for _, s := range all {
			if !s.local.IsValid() || s.local.Port() == 0 {
				t.Errorf("got %v", s.local)
			}
		}
	})
}

func TestParseTable(t *testing.T) {
	const four = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 12345 1 0000000000000000 100 0 0 10 0"
	const six = "  12: 00000000000000000000000001000000:0035 00000000000000000000000000000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4294967295 2 0000000000000000 0"
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the lines are those of a machine that keeps the last byte first")
	}
	for line, want := range map[string]socket{
		four: {local: netip.MustParseAddrPort("127.0.0.1:8080"), uid: 1000, key: socketKey{inode: 12345}},
		six:  {local: netip.MustParseAddrPort("[::1]:53"), key: socketKey{inode: 1<<32 - 1}},
	} {
		state := byte(stateListen)
		if want.local.Addr().Is6() {
			state = stateClose
		}
		if got, ok := parseTable([]byte(line), state); !ok || got != want {
			t.Errorf("got %+v, %v, want %+v", got, ok, want)
		}
		if got, ok := parseTable([]byte(line), 1); ok {
			t.Errorf("of another state: %+v", got)
		}
	}
	for _, line := range []string{
		"", "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode", four[:90],
		strings.Replace(four, "0100007F", "0100007", 1), strings.Replace(four, "1F90", "FFFFF", 1), strings.Replace(four, "12345", "4294967296", 1),
		strings.Replace(four, "1000 ", "root ", 1), strings.Replace(four, "0100007F:1F90", "0100007F.1F90", 1),
	} {
		if got, ok := parseTable([]byte(line), stateListen); ok {
			t.Errorf("%q: %+v", line, got)
		}
	}
}

func FuzzParseTable(f *testing.F) {
	f.Add("   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 12345 1")
	f.Add("  12: 00000000000000000000000001000000:0035 0:0 0A 0:0 0:0 0 0 0 1")
	f.Add("0: 0100007F:1F90 0:0 0A 0:0 0:0 0 1000 0 many")
	f.Fuzz(func(t *testing.T, line string) {
		if s, ok := parseTable([]byte(line), stateListen); ok != s.local.IsValid() {
			t.Errorf("%v, %v", s, ok)
		}
	})
}

func BenchmarkFirstList(b *testing.B) {
	for b.Loop() {
		if _, err := lister(new(diag)).List(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLaterList(b *testing.B) {
	l := lister(new(diag))
	for b.Loop() {
		if _, err := l.List(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
