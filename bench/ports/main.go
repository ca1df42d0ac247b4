// Command ports measures scans for listening ports, berth's beside `ss -Hltnp` and go-netstat, in turns and in one run: on a quiet machine, with many
// listeners, and with many connections and descriptors. It also measures what a watch costs, and how soon it tells a change. Each case is a machine of its own, made of a process, a
// network and a mount namespace, so it needs root and the programs ip and ss. It prints a table.
//
//	go run ./bench/ports [-rounds 5] [-watch 60s] [-quick]
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/cakturk/go-netstat/netstat"

	"github.com/berthd/berth/ports"
	"github.com/berthd/berth/wire"
)

// A machine is what a case consists of.
type machine struct {
	name        string
	processes   int // each with
	listeners   int // on 127.0.0.1, and
	connections int // to itself, which are two sockets each
	idle        int // processes that do nothing
	namespaces  int // with one process each, which listens
	watch       bool
}

// A quiet machine has about as many processes as a cloud machine that nobody uses.
var (
	machines = []machine{
		{name: "quiet: 20 listeners, 100 processes", processes: 10, listeners: 2, idle: 90, watch: true},
		{name: "2,000 listeners in 200 processes", processes: 200, listeners: 10},
		{name: "50,000 established sockets, 500 processes of 100 descriptors", processes: 500, listeners: 1, connections: 50},
		{name: "quiet, and 20 network namespaces with a listener each", processes: 10, listeners: 2, idle: 70, namespaces: 20, watch: true},
	}
	small = []machine{
		{name: "quiet: 4 listeners, 10 processes", processes: 2, listeners: 2, idle: 8, watch: true},
		{name: "100 listeners in 10 processes", processes: 10, listeners: 10},
		{name: "400 established sockets", processes: 10, listeners: 1, connections: 20},
		{name: "3 network namespaces", processes: 2, listeners: 2, namespaces: 3, watch: true},
	}
)

type options struct {
	rounds int
	watch  time.Duration
	quick  bool
}

func main() {
	var o options
	flag.IntVar(&o.rounds, "rounds", 5, "how often each scan is measured, in turns")
	flag.DurationVar(&o.watch, "watch", time.Minute, "for how long a watch is measured")
	flag.BoolVar(&o.quick, "quick", false, "small machines and one round, to see that it works")
	only := flag.Int("case", 0, "only this one, from 1")
	flag.Parse()
	if o.quick {
		machines, o.rounds, o.watch = small, 1, time.Second
	}
	if err := run(o, *only); err != nil {
		fmt.Fprintln(os.Stderr, "bench/ports:", err)
		os.Exit(1)
	}
}

// roleVar makes this program play a part in a machine.
const roleVar = "BERTH_BENCH_PORTS_ROLE"

func run(o options, only int) error {
	if role := os.Getenv(roleVar); role == "machine" {
		return measure(machines[only-1], o)
	} else if role != "" {
		return play(role)
	}
	fmt.Println("| machine | scan | median | least to most | of `ss` | CPU, median | of `ss` |")
	fmt.Println("|---|---|---|---|---|---|---|")
	for i := range machines {
		if only != 0 && only != i+1 {
			continue
		}
		cmd := exec.Command("/proc/self/exe", append(os.Args[1:], "-case", fmt.Sprint(i+1))...)
		cmd.Env = append(os.Environ(), roleVar+"=machine")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWPID | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("cannot measure %q: %w", machines[i].name, err)
		}
	}
	return nil
}

// scan is one way to list what listens.
type scan struct {
	name string
	do   func() error // notes what it took
	cost
}

// cost is the time that scans took, and the time of processors.
type cost struct{ times, cpu []time.Duration }

// take notes what f costs in this process and in those that it waits for.
func (c *cost) take(f func() error) error {
	used, began := cpu(), time.Now()
	err := f()
	c.times, c.cpu = append(c.times, time.Since(began)), append(c.cpu, cpu()-used)
	return err
}

// measure is the first process of a machine, and all others end with it.
func measure(m machine, o options) error {
	if err := syscall.Mount("none", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("cannot keep mounts to ourselves: %w", err)
	}
	if err := syscall.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("cannot mount /proc: %w", err)
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("cannot make a network: %w: %s", err, out)
	}
	if err := populate(m); err != nil {
		return err
	}
	ctx := context.Background()
	var lister *ports.Lister
	want := m.processes * m.listeners
	check := func(list []wire.ListeningPort) error {
		here, there := 0, 0
		for _, p := range list {
			switch {
			case p.Network != "tcp" || p.PID == 0:
			case p.Namespace == 0:
				here++
			default:
				there++
			}
		}
		if here != want || there != m.namespaces {
			return fmt.Errorf("%d and %d ports with their owners are listed, want %d and %d", here, there, want, m.namespaces)
		}
		return nil
	}
	var out []byte
	var list []wire.ListeningPort
	var four, six []netstat.SockTabEntry
	listening := func(e *netstat.SockTabEntry) bool { return e.State == netstat.Listen }
	scans := []*scan{
		{name: "`ss -Hltnp`", do: func() (err error) { out, err = exec.Command("ss", "-Hltnp").Output(); return err }},
		{name: "go-netstat, TCP over IPv4 and IPv6", do: func() (err error) {
			if four, err = netstat.TCPSocks(listening); err == nil {
				six, err = netstat.TCP6Socks(listening)
			}
			return err
		}},
		{name: "berth, the first one, TCP and UDP", do: func() (err error) {
			lister = ports.New(ports.Config{})
			list, err = lister.List(ctx)
			return err
		}},
		{name: "berth, a later one", do: func() (err error) { list, err = lister.List(ctx); return err }},
	}
	later := scans[len(scans)-1]
	for range o.rounds {
		for _, s := range scans {
			if err := s.take(s.do); err != nil {
				return err
			}
		}
		if got := strings.Count(string(out), "users:"); got != want {
			return fmt.Errorf("ss lists %d, want %d", got, want)
		}
		if got := len(four) + len(six); got != want {
			return fmt.Errorf("go-netstat lists %d, want %d", got, want)
		}
		for range 100 { // a later scan is short, so that one says little
			if err := check(list); err != nil {
				return err
			}
			if err := later.take(later.do); err != nil {
				return err
			}
		}
	}
	ss := scans[0]
	for _, s := range scans {
		mid, used := median(s.times), median(s.cpu)
		fmt.Printf("| %s | %s | %s | %s to %s | %.3f | %s | %.3f |\n", m.name, s.name, ms(mid), ms(s.times[0]), ms(s.times[len(s.times)-1]),
			float64(mid)/float64(median(ss.times)), ms(used), float64(used)/float64(median(ss.cpu)))
	}
	if !m.watch {
		return nil
	}
	share, err := watch(ctx, o.watch)
	if err != nil {
		return err
	}
	fmt.Printf("| %s | berth, a watch for %v | | | | %.3f %% of one | |\n", m.name, o.watch, 100*share)
	told, err := push(ctx, o.rounds)
	if err != nil {
		return err
	}
	mid := median(told)
	fmt.Printf("| %s | berth, until a watch tells a change | %s | %s to %s | | | |\n", m.name, ms(mid), ms(told[0]), ms(told[len(told)-1]))
	return nil
}

// push returns how long a watch takes to tell that a port is open, and that it is closed.
func push(ctx context.Context, rounds int) (times []time.Duration, _ error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	lists := make(chan []wire.ListeningPort, 1)
	done := make(chan error, 1)
	go func() {
		done <- ports.New(ports.Config{}).Watch(ctx, func(list []wire.ListeningPort) error {
			select {
			case lists <- list:
			case <-ctx.Done():
			}
			return nil
		})
	}()
	until := func(port int, open bool) {
		began := time.Now()
		for list := range lists {
			if slices.ContainsFunc(list, func(p wire.ListeningPort) bool { return p.Network == "tcp" && int(p.Port) == port }) == open {
				times = append(times, time.Since(began))
				return
			}
		}
	}
	<-lists
	for range rounds {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			return nil, fmt.Errorf("cannot listen: %w", err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		until(port, true)
		l.Close()
		until(port, false)
	}
	cancel()
	return times, <-done
}

// watch returns the share of one processor that a watch takes on a machine on which nothing changes.
func watch(ctx context.Context, d time.Duration) (float64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	told := make(chan int, 100)
	done := make(chan error, 1)
	go func() {
		done <- ports.New(ports.Config{}).Watch(ctx, func(list []wire.ListeningPort) error { told <- len(list); return nil })
	}()
	<-told
	settled := time.NewTimer(min(d, 5*time.Second)) // what has just begun is looked at more often
	<-settled.C
	before, began := cpu(), time.Now()
	settled.Reset(d)
	<-settled.C
	used, took := cpu()-before, time.Since(began)
	cancel()
	if err := <-done; err != nil {
		return 0, err
	}
	if len(told) > 0 {
		return 0, fmt.Errorf("the watch told %d changes on a machine where nothing changes", len(told))
	}
	return float64(used) / float64(took), nil
}

// cpu is what this process has used, and those that it has waited for.
func cpu() (used time.Duration) {
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var u syscall.Rusage
		if err := syscall.Getrusage(who, &u); err != nil {
			panic(err) // it has no way to fail
		}
		used += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	return used
}

// median sorts times.
func median(times []time.Duration) time.Duration {
	slices.Sort(times)
	return times[len(times)/2]
}

func ms(d time.Duration) string { return fmt.Sprintf("%.2f ms", float64(d)/float64(time.Millisecond)) }

// wait returns once every process of a machine has said that it is ready.
func wait(ready io.Reader, n int) error {
	if got, err := io.ReadFull(ready, make([]byte, n)); err != nil {
		return fmt.Errorf("only %d of %d processes came up: %w", got, n, err)
	}
	return nil
}
