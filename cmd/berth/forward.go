package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
)

// maxForwarded bounds the ports that one command forwards: each costs a socket here.
const maxForwarded = 1024

// Networks, as specifications and the agent name them.
const (
	networkTCP = "tcp"
	networkUDP = "udp"
)

// spec is what one argument of `berth forward` asks for: ports of the agent, in a row, and where they
// are served here.
type spec struct {
	network string
	host    string // what to listen on
	local   uint16 // the first port here; 0 takes any that is free for each
	remote  uint16 // the first port there
	count   int
}

// specForm is how a specification is written.
const specForm = "[[HOST:]LOCAL:]REMOTE[/udp]"

// parseSpec reads a specification. LOCAL and REMOTE may be ranges of the same length. Without LOCAL the
// same ports are used, without HOST only this machine can connect.
func parseSpec(s string) (spec, error) {
	bad := func(why string) (spec, error) {
		return spec{}, fmt.Errorf("cannot forward %q: %s; the form is %s, such as 8080, 9000:8080, 8000-8010 or 5353:53/udp", s, why, specForm)
	}
	ports, network, named := strings.Cut(s, "/")
	f := spec{network: networkTCP, host: "127.0.0.1"}
	if named {
		if network != networkTCP && network != networkUDP {
			return bad("what follows / must be tcp or udp")
		}
		f.network = network
	}
	here, there := "", ports
	if i := strings.LastIndexByte(ports, ':'); i >= 0 {
		if here, there = ports[:i], ports[i+1:]; here == "" {
			return bad("LOCAL is empty")
		}
	}
	var ok bool
	if f.remote, f.count, ok = parseRange(there); !ok || f.remote == 0 {
		return bad(fmt.Sprintf("%q is no port or range", there))
	}
	if f.local = f.remote; here == "" {
		return f, nil
	}
	if strings.Contains(here, ":") {
		var err error
		if f.host, here, err = net.SplitHostPort(here); err != nil || f.host == "" {
			return bad("HOST is not one; an IPv6 address stands in brackets")
		}
	}
	first, count, ok := parseRange(here)
	switch {
	case !ok || first == 0 && count > 1:
		return bad(fmt.Sprintf("%q is no port or range", here))
	case first != 0 && count != f.count:
		return bad(fmt.Sprintf("%s are %d ports and %s are %d", here, count, there, f.count))
	}
	f.local = first
	return f, nil
}

// parseRange reads FIRST or FIRST-LAST.
func parseRange(s string) (first uint16, count int, ok bool) {
	from, to, isRange := strings.Cut(s, "-")
	a, err := strconv.ParseUint(from, 10, 16)
	if err != nil {
		return 0, 0, false
	}
	if !isRange {
		return uint16(a), 1, true
	}
	b, err := strconv.ParseUint(to, 10, 16)
	if err != nil || b < a {
		return 0, 0, false
	}
	return uint16(a), int(b-a) + 1, true
}

// at returns the spec for the port at an index of the row.
func (f spec) at(i int) spec {
	one := f
	one.count, one.remote = 1, f.remote+uint16(i)
	if f.local != 0 {
		one.local = f.local + uint16(i)
	}
	return one
}

// circular tells whether a port would lead to itself, if the agent's loopback is this machine's.
func (f spec) circular() bool {
	ip := net.ParseIP(f.host)
	return f.local == f.remote && (ip == nil || ip.IsLoopback() || ip.IsUnspecified())
}

// listenAddr is where the first port is served.
func (f spec) listenAddr() string { return net.JoinHostPort(f.host, strconv.Itoa(int(f.local))) }

func (p *program) forwardCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "forward NAME " + specForm + "...",
		Short: "Make ports of a workspace reachable on this machine",
		Long: `Make ports of a workspace reachable on this machine until Ctrl-C. Only this machine can connect
unless HOST says otherwise. LOCAL and REMOTE may be ranges of the same length; LOCAL 0 takes any free
port and prints it. In the workspace a port is looked for on 127.0.0.1, then on ::1.

With --auto, TCP ports that programs listen on there are forwarded as they appear, and given up 10 s
after they are gone; where the same port is taken here, the next free one is used. It leaves out ports
below 1024, those that cannot be reached on the workspace's loopback, and those of berth itself. What
"berth ports" hides is left out too.

While the workspace is away, listeners stay open and connections wait for it as long as --wait says. A UDP flow
ends when nothing has passed for 2 minutes (30 s on port 53).`,
		Example: `  berth forward demo 8080             # http://127.0.0.1:8080 is demo's port 8080
  berth forward demo 9000:8080 5432
  berth forward demo 8000-8010 5353:53/udp
  berth forward demo --auto           # whatever listens there, as it appears`,
		Args:              wantArgs(1, -1),
		ValidArgsFunction: p.agentNames,
	}
	auto := cmd.Flags().Bool("auto", false, "forward TCP ports as programs there begin to listen")
	wait := waitFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var specs []spec
		total := 0
		for _, arg := range args[1:] {
			f, err := parseSpec(arg)
			if err != nil {
				return usageError(cmd, err)
			}
			specs = append(specs, f)
			if total += f.count; total > maxForwarded {
				return usageError(cmd, fmt.Errorf("cannot forward more than %d ports at once: name those you need", maxForwarded))
			}
		}
		if len(specs) == 0 && !*auto {
			return usageError(cmd, errors.New("cannot tell what to forward: name a port, or give --auto"))
		}
		ctx, stop := untilInterrupt(cmd.Context())
		defer stop()
		return p.forward(ctx, args[0], specs, *auto, *wait)
	}
	return cmd
}

// endpoint is one port that is served here: a listener or, for UDP, a socket.
type endpoint struct {
	spec   spec
	tcp    net.Listener
	udp    *net.UDPConn
	served net.Addr
}

// listen opens one port.
func listen(f spec) (*endpoint, error) {
	if f.network == networkUDP {
		addr, err := net.ResolveUDPAddr("udp", f.listenAddr())
		if err != nil {
			return nil, err
		}
		c, err := net.ListenUDP("udp", addr)
		if err != nil {
			return nil, err
		}
		return &endpoint{spec: f, udp: c, served: c.LocalAddr()}, nil
	}
	l, err := net.Listen("tcp", f.listenAddr())
	if err != nil {
		return nil, err
	}
	return &endpoint{spec: f, tcp: l, served: l.Addr()}, nil
}

// Close stops listening. Connections go on.
func (e *endpoint) Close() error {
	if e.udp != nil {
		return e.udp.Close()
	}
	return e.tcp.Close()
}

// listenAll opens every port of the specs, or none.
func listenAll(name string, specs []spec) (all []*endpoint, err error) {
	defer func() {
		if err != nil {
			closeAll(all)
		}
	}()
	for _, f := range specs {
		for i := range f.count {
			e, err := listen(f.at(i))
			if err != nil {
				return all, cannotListen(name, f.at(i), err)
			}
			all = append(all, e)
		}
	}
	return all, nil
}

func closeAll(all []*endpoint) {
	for _, e := range all {
		e.Close()
	}
}

// cannotListen says why a port cannot be served, and what to do.
func cannotListen(name string, f spec, err error) error {
	fix := fmt.Sprintf("let any free port be taken, as in 0:%s", portName(f.network, f.remote))
	const firstFree = 1024 // the ports below are the superuser's
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		err = fmt.Errorf("something here uses %s already", f.listenAddr())
	case errors.Is(err, syscall.EACCES) && f.local < firstFree:
		err = fmt.Errorf("port %d here is the superuser's", f.local)
		fix = fmt.Sprintf("choose a higher one, as in %d:%s", uint32(f.remote)+8000, portName(f.network, f.remote))
	case errors.Is(err, syscall.EADDRNOTAVAIL), errors.As(err, new(*net.DNSError)):
		err = fmt.Errorf("%s is no address of this machine", f.host)
		fix = "leave HOST out, or name 0.0.0.0 to let others connect"
	}
	return fmt.Errorf("cannot forward port %s of %s: %w; %s", portName(f.network, f.remote), name, err, fix)
}

// portName is a port as people write it; what nothing is said of is TCP.
func portName(network string, port uint16) string {
	if network == networkTCP {
		return strconv.Itoa(int(port))
	}
	return fmt.Sprintf("%d/%s", port, network)
}

// forward serves what was asked for until ctx is done.
func (p *program) forward(ctx context.Context, name string, specs []spec, auto bool, wait time.Duration) error {
	// The listeners come first: a port that is taken shows before anything is waited for.
	all, err := listenAll(name, specs)
	if err != nil {
		return err
	}
	defer closeAll(all)
	m, err := p.reach(ctx, name, wait)
	if err != nil {
		return err
	}
	defer m.Close()
	f := newForwarder(p, m, wait)
	own, err := m.sharesLoopback(ctx)
	if err != nil {
		return err
	}
	for _, s := range specs {
		if own && s.circular() {
			return fmt.Errorf("cannot forward port %s of %s to itself: %s is this machine; choose another port here, as in 0:%s",
				portName(s.network, s.remote), m.agent.Name, m.agent.Name, portName(s.network, s.remote))
		}
	}
	group, ctx := errgroup.WithContext(ctx)
	for _, line := range describe(specs, all, clean(m.agent.Name)) {
		fmt.Fprintln(p.out, line)
	}
	for _, e := range all {
		group.Go(func() error { return f.serve(ctx, e) })
	}
	group.Go(func() error { return f.attend(ctx) })
	if auto {
		group.Go(func() error { return f.auto(ctx, all, own) })
	}
	return group.Wait()
}

// describe says what is served where: a range on one line, unless its ports here are not in a row.
func describe(specs []spec, all []*endpoint, name string) (lines []string) {
	for _, f := range specs {
		mine := all[:f.count]
		all = all[f.count:]
		if f.count > 1 && f.local != 0 {
			first, last := mine[0], mine[f.count-1]
			suffix := ""
			if f.network != networkTCP {
				suffix = "/" + f.network
			}
			lines = append(lines, fmt.Sprintf("%s-%d%s -> %s ports %d-%d%s", first.served, last.spec.local, suffix, name, first.spec.remote, last.spec.remote, suffix))
			continue
		}
		for _, e := range mine {
			lines = append(lines, e.describe(name))
		}
	}
	return lines
}

func (e *endpoint) describe(name string) string {
	here := e.served.String()
	if e.spec.network != networkTCP {
		here += "/" + e.spec.network
	}
	return fmt.Sprintf("%s -> %s port %s", here, name, portName(e.spec.network, e.spec.remote))
}

// localPort is the port here.
func (e *endpoint) localPort() uint16 {
	if a, err := netip.ParseAddrPort(e.served.String()); err == nil {
		return a.Port()
	}
	return 0
}

// sharesLoopback tells whether the agent's loopback is this machine's, as in `berth up`: whether a
// listener here is what a connection to the same port of the agent comes to.
func (m *mesh) sharesLoopback(ctx context.Context) (bool, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return false, fmt.Errorf("cannot listen on this machine: %w", err)
	}
	came := make(chan struct{})
	go func() {
		defer close(came)
		if c, err := l.Accept(); err == nil {
			c.Close()
			came <- struct{}{}
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, quickDial)
	defer cancel()
	far, err := m.connect(ctx, uint16(l.Addr().(*net.TCPAddr).Port))
	if err != nil { // refused, as it should be
		l.Close()
		<-came
		return false, nil
	}
	defer far.Close()
	// Something answered. If it was not us, it was a service that has the same number by chance.
	defer time.AfterFunc(time.Second, func() { l.Close() }).Stop()
	_, own := <-came
	l.Close()
	return own, nil
}
