package ports

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/internal/netlab"
	"github.com/berthd/berth/wire"
)

// inSpace starts this binary in a role in a network namespace, and ends it with the test or by the function returned.
func inSpace(t *testing.T, lab *netlab.Lab, name, role string) (cmd *exec.Cmd, port int, end func()) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd = lab.Command(name, exe)
	out := start(t, cmd, role)
	line, err := out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	port, err = strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	return cmd, port, func() { cmd.Process.Kill(); cmd.Wait() }
}

// elsewhere returns the entry of a port of a process in another network namespace.
func elsewhere(list []wire.ListeningPort, port, pid int) *wire.ListeningPort {
	for i, p := range list {
		if p.Namespace != 0 && int(p.Port) == port && (pid == 0 || p.PID == pid) {
			return &list[i]
		}
	}
	return nil
}

// Ports in other network namespaces are listed beside ours, by entering them and by reading /proc.
func TestOtherNamespaces(t *testing.T) {
	lab := netlab.New(t, "ports", "a", "b")
	cmd, port, end := inSpace(t, lab, "a", roleListen)
	other, otherPort, _ := inSpace(t, lab, "b", roleListen)
	sources(t, func(t *testing.T, l *Lister) {
		list := lists(t, l)
		got, second := elsewhere(list, port, cmd.Process.Pid), elsewhere(list, otherPort, other.Process.Pid)
		if got == nil || second == nil {
			t.Fatalf("not listed: %+v", list)
		}
		if got.User != "root" || got.Container != "" || got.Namespace == second.Namespace {
			t.Errorf("got %+v and %+v", got, second)
		}
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid))
		if err != nil || link != fmt.Sprintf("net:[%d]", got.Namespace) {
			t.Errorf("namespace %d, want %s (%v)", got.Namespace, link, err)
		}
		if p := find(list, "tcp", port); p != nil && p.Namespace == 0 && p.PID == cmd.Process.Pid {
			t.Errorf("listed as ours: %+v", p)
		}
		if source := l.Source(); strings.Contains(source, "and") {
			t.Errorf("source %q for namespaces that can be entered", source)
		}
	})
	l := lister(new(diag))
	if elsewhere(lists(t, l), port, cmd.Process.Pid) == nil {
		t.Error("not listed")
	}
	end()
	if got := elsewhere(lists(t, l), port, cmd.Process.Pid); got != nil {
		t.Errorf("listed after its process ended: %+v", got)
	}
}

// Whoever may not enter a namespace reads it in /proc, where everybody may.
func TestOtherNamespacesWithoutRights(t *testing.T) {
	lab := netlab.New(t, "ports", "a", "b")
	_, port, _ := inSpace(t, lab, "a", roleListen)
	_, otherPort, _ := inSpace(t, lab, "b", roleListen)
	answer := listAs(t, roleList, syscall.SysProcAttr{Credential: nobody})
	got, second := elsewhere(answer.Ports, port, 0), elsewhere(answer.Ports, otherPort, 0)
	if got == nil || second == nil || got.Namespace == second.Namespace {
		t.Fatalf("got %+v and %+v", got, second)
	}
	if got.User != "root" || len(got.Addresses) != 1 || got.Addresses[0] != "127.0.0.1" {
		t.Errorf("got %+v", got)
	}
	if want := "netlink, and /proc/net for namespaces that may not be entered"; answer.Source != want {
		t.Errorf("source %q, want %q", answer.Source, want)
	}
}

// What opens and closes is told within a second: here, in a namespace, and in one that begins while somebody watches. Nothing keeps a namespace alive.
func TestWatch(t *testing.T) {
	lab := netlab.New(t, "ports", "a", "b")
	l := New(Config{})
	ctx, cancel := context.WithCancel(t.Context())
	lists, second := make(chan []wire.ListeningPort), make(chan []wire.ListeningPort)
	watched := make(chan error, 2)
	watch := func(to chan<- []wire.ListeningPort) {
		watched <- l.Watch(ctx, func(list []wire.ListeningPort) error {
			select {
			case to <- list:
			case <-ctx.Done():
			}
			return nil
		})
	}
	go watch(lists)
	go watch(second)
	var from <-chan []wire.ListeningPort = lists
	wait := func(what string, ok func([]wire.ListeningPort) bool) {
		t.Helper()
		began := time.Now()
		for limit := time.After(20 * time.Second); ; {
			select {
			case list := <-from:
				if ok(list) {
					t.Logf("%s: told after %v", what, time.Since(began).Round(time.Millisecond))
					return
				}
			case <-limit:
				t.Fatalf("not told: %s", what)
			}
		}
	}
	wait("the list at once", func([]wire.ListeningPort) bool { return true })
	open := make([]int, len(kinds))
	var opened []io.Closer
	for i, k := range kinds {
		var c io.Closer
		c, open[i] = k.open(t)
		opened = append(opened, c)
	}
	openedHere := func(list []wire.ListeningPort) bool {
		for i, k := range kinds {
			if k.in(list, open[i]) == nil {
				return false
			}
		}
		return true
	}
	wait("every kind opened here", openedHere)
	from = second
	wait("every kind opened here, to another watcher", openedHere)
	from = lists
	for _, c := range opened {
		c.Close()
	}
	wait("every kind closed here", func(list []wire.ListeningPort) bool {
		for i, k := range kinds {
			if k.in(list, open[i]) != nil {
				return false
			}
		}
		return true
	})
	for _, name := range []string{"a", "b", "a"} {
		cmd, port, end := inSpace(t, lab, name, roleListen)
		wait("opened in "+name, func(list []wire.ListeningPort) bool { return elsewhere(list, port, cmd.Process.Pid) != nil })
		end()
		wait("closed in "+name, func(list []wire.ListeningPort) bool { return elsewhere(list, port, 0) == nil })
	}
	cmd, out := helper(t, roleListen, nobody)
	line, err := out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	port, _ := strconv.Atoi(strings.TrimSpace(line))
	wait("opened by another user", func(list []wire.ListeningPort) bool {
		p := find(list, "tcp", port)
		return p != nil && p.PID == cmd.Process.Pid && p.User == "nobody"
	})
	cmd.Process.Kill()
	wait("closed by another user", func(list []wire.ListeningPort) bool { return find(list, "tcp", port) == nil })
	cancel()
	for range 2 {
		if err := <-watched; err != nil {
			t.Error(err)
		}
	}
	if l.scanner != nil || l.spaces.own.conn != nil {
		t.Error("the scanner goes on when nobody watches")
	}
}

// ending is a source that fails in other namespaces: because ctx is done at that moment or, without cancel, for a reason of its own.
type ending struct {
	source
	cancel func()
}

func (e ending) sockets(ctx context.Context, ns *namespace, all []socket) ([]socket, error) {
	if ns.id == 0 {
		return e.source.sockets(ctx, ns, all)
	}
	if e.cancel == nil {
		return nil, unix.EMFILE
	}
	e.cancel()
	return nil, ctx.Err()
}

// A list that is broken off, or a moment without descriptors, takes nothing from the lists of others.
func TestNamespaceFails(t *testing.T) {
	lab := netlab.New(t, "ports", "a")
	cmd, port, _ := inSpace(t, lab, "a", roleListen)
	l := lister(new(diag))
	listed := func() bool { return elsewhere(lists(t, l), port, cmd.Process.Pid) != nil }
	if !listed() {
		t.Fatal("not listed")
	}
	ctx, cancel := context.WithCancel(t.Context())
	l.source = ending{new(diag), cancel}
	if list, err := l.List(ctx); err == nil {
		t.Errorf("a list that was broken off is %+v", list)
	}
	if l.source = new(diag); !listed() {
		t.Error("not listed after a list was broken off")
	}
	l.source = ending{new(diag), nil}
	lists(t, l)
	if l.source = new(diag); !listed() {
		t.Error("not listed after a list in which its namespace could not be asked")
	}
}

// While somebody watches, a namespace with as many sockets as before is not asked, unless an owner has ended.
func TestCountedNamespaces(t *testing.T) {
	lab := netlab.New(t, "ports", "a")
	first, firstPort, end := inSpace(t, lab, "a", roleListen)
	asked := make(map[int64]int)
	l := lister(counting{new(diag), asked})
	l.scanner = new(scanner) // as if somebody watched
	t.Cleanup(l.spaces.release)
	look := func() []wire.ListeningPort {
		t.Helper()
		list, err := l.look(t.Context(), false)
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	for range 3 {
		p := elsewhere(look(), firstPort, first.Process.Pid)
		if p == nil {
			t.Fatal("not listed")
		}
		if got := asked[p.Namespace]; got != 1 {
			t.Errorf("asked %d times, want once", got)
		}
	}
	second, secondPort, endSecond := inSpace(t, lab, "a", roleListen)
	if elsewhere(look(), secondPort, second.Process.Pid) == nil {
		t.Error("another one is not listed")
	}
	end()
	if elsewhere(look(), firstPort, 0) != nil {
		t.Error("listed after it ended")
	}
	endSecond()
	third, thirdPort, _ := inSpace(t, lab, "a", roleListen)
	look()
	if list := look(); elsewhere(list, thirdPort, third.Process.Pid) == nil || elsewhere(list, secondPort, 0) != nil {
		t.Errorf("one that took the place of another is not seen: %+v", list)
	}
}

// counting counts how often each other namespace is asked.
type counting struct {
	source
	asked map[int64]int
}

func (c counting) sockets(ctx context.Context, ns *namespace, all []socket) ([]socket, error) {
	c.asked[ns.id]++
	return c.source.sockets(ctx, ns, all)
}

func TestInUse(t *testing.T) {
	for in, want := range map[string]string{
		"sockets: used 29\nTCP: inuse 5 orphan 0 tw 2 alloc 9 mem 1\nUDP: inuse 13 mem 0\nUDPLITE: inuse 0\n": "TCP 5\nUDP 13\nUDPLITE 0\n",
		"TCP6: inuse 4\nUDP6: inuse 2":      "TCP6 4\nUDP6 2\n",
		"":                                  "",
		"TCP: inuse \n: inuse 1\nTCP inuse": "TCP \n 1\n",
	} {
		if got := string(inUse([]byte(in), nil)); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// A watcher's own failure ends its watch and no other's.
func TestWatcherFails(t *testing.T) {
	l := New(Config{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	told := make(chan struct{}, 1000)
	done := make(chan error, 1)
	go func() {
		done <- l.Watch(ctx, func([]wire.ListeningPort) error { told <- struct{}{}; return nil })
	}()
	<-told
	if err := l.Watch(ctx, func([]wire.ListeningPort) error { return net.ErrClosed }); err != net.ErrClosed {
		t.Errorf("got %v", err)
	}
	open, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	<-told
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
