// Package netlab makes small networks of namespaces and links for tests, which need root for it and
// the program ip. [New] makes the namespaces, [Lab.Wire] joins two of them, and [Lab.Command] runs a
// program in one.
package netlab

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
)

// Lab is a network that goes away with its test.
type Lab struct {
	t      testing.TB
	prefix string // of the names of all its namespaces
	net    string // first two bytes of its addresses
}

var made atomic.Int32

// New makes a namespace for each of the names, which are short words, with a loopback device that is
// up. prefix tells the labs of one package's tests from those of others that run beside them.
func New(t testing.TB, prefix string, names ...string) *Lab {
	t.Helper()
	if _, err := exec.LookPath("ip"); err != nil {
		t.Fatal("this test needs the program ip: apt-get install iproute2")
	}
	if os.Getuid() != 0 {
		t.Fatal("this test makes network namespaces, which only root may: run it as root")
	}
	// Both are private to this process, should another run beside it.
	l := &Lab{t: t, prefix: fmt.Sprintf("%s%d-%d", prefix, os.Getpid(), made.Add(1)), net: fmt.Sprintf("10.%d", 64+os.Getpid()%128)}
	t.Cleanup(func() {
		for _, name := range names {
			exec.Command("ip", "netns", "delete", l.prefix+name).Run() // takes its links along
		}
	})
	for _, name := range names {
		l.ip("netns", "add", l.prefix+name)
		l.In(name, "ip", "link", "set", "lo", "up")
	}
	return l
}

func (l *Lab) ip(args ...string) {
	l.t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		l.t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// Command is a program to run in a namespace. The process that is started becomes that program.
func (l *Lab) Command(name string, argv ...string) *exec.Cmd {
	return exec.Command("ip", append([]string{"netns", "exec", l.prefix + name}, argv...)...)
}

// In runs a program in a namespace to its end, which must be a good one.
func (l *Lab) In(name string, argv ...string) {
	l.t.Helper()
	l.ip(append([]string{"netns", "exec", l.prefix + name}, argv...)...)
}

// Wire joins two namespaces by a pair of devices on the subnet of a number, which are named for the
// namespace and the number ("a1") and have the addresses [Lab.Addr] 1 and 2 of it.
func (l *Lab) Wire(a, b string, number int) {
	l.t.Helper()
	ends := [2]string{fmt.Sprintf("%s%d", a, number), fmt.Sprintf("%s%d", b, number)}
	l.ip("link", "add", ends[0], "netns", l.prefix+a, "type", "veth", "peer", "name", ends[1], "netns", l.prefix+b)
	for i, name := range []string{a, b} {
		l.In(name, "ip", "addr", "add", l.Addr(number, i+1)+"/24", "dev", ends[i])
		l.In(name, "ip", "link", "set", ends[i], "up")
	}
}

// Addr is an address on the subnet of a number.
func (l *Lab) Addr(number, host int) string { return fmt.Sprintf("%s.%d.%d", l.net, number, host) }
