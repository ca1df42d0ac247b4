package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/berthd/berth/tailnet"
	"github.com/berthd/berth/wire"
)

const (
	// quickDial is how long a connection may take to open before the agent is asked whether it is there at all.
	quickDial = 3 * time.Second
	// attendTick is how often it is looked whether the agent is another process, attendEvery how often it is
	// pinged; after attendMisses without an answer people are told.
	attendTick   = time.Second
	attendEvery  = 5 * time.Second
	attendMisses = 2
	// maxForwardedConns bounds the TCP connections at one time; each costs a socket and two buffers of 32 KiB.
	maxForwardedConns = 4096
	// repeatAfter is how soon the same complaint is made again: a browser tries a closed port many times.
	repeatAfter = 10 * time.Second
	// acceptPause is how long to wait after a failed accept, which mostly means that files have run out.
	acceptPause = 100 * time.Millisecond
)

// forwarder carries connections and datagrams to the ports of one agent.
type forwarder struct {
	program *program
	mesh    *mesh
	wait    time.Duration // for the agent, per connection
	slots   chan struct{} // one for each TCP connection
	flows   *flowTable

	mu         sync.Mutex
	away       bool                // the agent does not answer
	open       map[net.Conn]string // connections here, and the key of the agent's process that each is with
	complaints map[string]time.Time
}

func newForwarder(p *program, m *mesh, wait time.Duration) *forwarder {
	return &forwarder{program: p, mesh: m, wait: wait, slots: make(chan struct{}, maxForwardedConns), flows: newFlowTable(),
		open: map[net.Conn]string{}, complaints: map[string]time.Time{}}
}

// serve serves one port until ctx is done or it is closed.
func (f *forwarder) serve(ctx context.Context, e *endpoint) error {
	defer context.AfterFunc(ctx, func() { e.Close() })()
	if e.udp != nil {
		return f.serveUDP(ctx, e)
	}
	return f.serveTCP(ctx, e)
}

func (f *forwarder) serveTCP(ctx context.Context, e *endpoint) error {
	var running sync.WaitGroup
	defer running.Wait()
	for {
		near, err := e.tcp.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil
		case err != nil:
			f.complain("cannot accept a connection to %s: %v; raise the limit of open files (ulimit -n) if it is reached", e.served, err)
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(acceptPause):
			}
			continue
		}
		select {
		case f.slots <- struct{}{}:
		default:
			f.complain("%d connections are open already: the next are refused until some end", maxForwardedConns)
			breakOff(near)
			continue
		}
		running.Go(func() {
			defer func() { <-f.slots }()
			f.carry(ctx, near, e.spec.remote)
		})
	}
}

// carry connects one connection with the agent's port, and copies until both directions have ended.
func (f *forwarder) carry(ctx context.Context, near net.Conn, remote uint16) {
	defer near.Close()
	defer context.AfterFunc(ctx, func() { breakOff(near) })()
	far, err := f.dial(ctx, remote)
	if err != nil {
		if ctx.Err() == nil {
			f.complain("%v", err)
		}
		breakOff(near) // the program here sees a failure, and no empty answer
		return
	}
	defer far.Close()
	defer context.AfterFunc(ctx, func() { far.Close() })()
	f.opened(near)
	defer f.closed(near)
	splice(near, far)
}

// key is the mesh key of the agent's present process.
func (f *forwarder) key() string { return f.mesh.node.PeerKey(wire.AgentAddr(f.mesh.agent.ID)) }

// opened notes a connection, and which process of the agent it is with.
func (f *forwarder) opened(near net.Conn) {
	key := f.key()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.open[near] = key
}

func (f *forwarder) closed(near net.Conn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.open, near)
}

// dial connects to a port of the agent. Mostly the agent is there, so it is not asked first.
func (f *forwarder) dial(ctx context.Context, port uint16) (net.Conn, error) {
	waiting, cancel := context.WithTimeout(ctx, f.wait)
	defer cancel()
	quick, giveUp := context.WithTimeout(waiting, quickDial)
	conn, err := f.mesh.connect(quick, port)
	late := quick.Err() != nil
	giveUp()
	if err != nil && late && ctx.Err() == nil {
		return f.dialLate(ctx, waiting, port)
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("nothing listens on port %d of %s; \"berth ports %s\" shows what does", port, f.mesh.agent.Name, shellQuote(f.mesh.agent.Name))
	}
	return conn, err
}

// dialLate is dial for a port that did not answer at once, until waiting is done: either the agent is
// away, or what listens there is.
func (f *forwarder) dialLate(ctx, waiting context.Context, port uint16) (net.Conn, error) {
	asking, cancel := context.WithTimeout(ctx, quickDial)
	defer cancel()
	if err := f.mesh.node.AwaitReachable(asking, wire.AgentAddr(f.mesh.agent.ID)); err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		f.setAway(true)
		conn, err := f.mesh.dial(waiting, port)
		if err == nil {
			f.setAway(false)
		}
		return conn, err
	}
	conn, err := f.mesh.connect(waiting, port)
	if err != nil { // the agent refuses too when what listens does not answer it
		return nil, fmt.Errorf("port %d of %s takes no connections, though %s answers: what listens there may hang or be too busy", port, f.mesh.agent.Name, f.mesh.agent.Name)
	}
	return conn, nil
}

// attend tells when the agent stops answering and when it is back, until ctx is done.
func (f *forwarder) attend(ctx context.Context) error {
	missed := 0
	for last := time.Now(); ; {
		f.breakDead()
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(attendTick):
		}
		if f.isAway() {
			trying, cancel := context.WithTimeout(ctx, attendEvery)
			if f.mesh.node.AwaitReachable(trying, wire.AgentAddr(f.mesh.agent.ID)) == nil {
				f.setAway(false)
			}
			cancel()
			missed = 0
			continue
		}
		if time.Since(last) < attendEvery {
			continue
		}
		last = time.Now()
		if _, err := pingOnce(ctx, f.mesh); err == nil {
			missed = 0
		} else if missed++; missed >= attendMisses && ctx.Err() == nil {
			f.setAway(true)
		}
	}
}

// breakDead breaks off the connections with a process of the agent that is no more: the next one does
// not know them, and says so only when something is sent, which a program that waits for an answer
// never does.
func (f *forwarder) breakDead() {
	key := f.key()
	f.mu.Lock()
	defer f.mu.Unlock()
	for near, was := range f.open {
		if key != "" && was != key {
			breakOff(near)
		}
	}
}

func (f *forwarder) isAway() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.away
}

// setAway notes whether the agent answers, and tells of a change.
func (f *forwarder) setAway(away bool) {
	f.mu.Lock()
	changed := f.away != away
	f.away = away
	f.mu.Unlock()
	switch {
	case !changed:
	case away:
		f.say("%s does not answer; connections wait up to %v for it", f.mesh.agent.Name, f.wait)
	default:
		f.say("%s answers again", f.mesh.agent.Name)
	}
}

// say prints a line for people.
func (f *forwarder) say(format string, args ...any) {
	fmt.Fprintln(f.program.errOut, "berth:", clean(fmt.Sprintf(format, args...)))
}

// complain is say for what may come again and again.
func (f *forwarder) complain(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	f.mu.Lock()
	now := time.Now()
	for old, at := range f.complaints {
		if now.Sub(at) >= repeatAfter {
			delete(f.complaints, old)
		}
	}
	_, said := f.complaints[text]
	if !said {
		f.complaints[text] = now
	}
	f.mu.Unlock()
	if !said {
		f.say("%s", text)
	}
}

// splice copies both ways until both have ended; the end of one direction is passed on by itself.
func splice(a, b net.Conn) {
	var both sync.WaitGroup
	oneWay := func(to, from net.Conn) {
		if _, err := io.Copy(to, from); err != nil {
			// One broken side is of no use to the other, which must not take it for the end.
			breakOff(to)
			breakOff(from)
			return
		}
		closeWrite(to)
	}
	both.Go(func() { oneWay(a, b) })
	both.Go(func() { oneWay(b, a) })
	both.Wait()
}

// breakOff closes a connection such that its other end sees a failure, where that can be done.
func breakOff(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	c.Close()
}

const (
	// maxFlows bounds the UDP flows at one time; each costs a place in the mesh's stack. The one that was
	// silent for longest gives way to a new one.
	maxFlows = 1024
	// A UDP flow ends when nothing has passed for so long, as on the agent's side.
	flowIdle, flowIdleDNS = 2 * time.Minute, 30 * time.Second
	portDNS               = 53
	// maxUDP is the longest datagram that UDP has.
	maxUDP = 64 << 10
)

// flowKey tells flows apart: by the socket here that they came to, and who sent.
type flowKey struct {
	here *net.UDPConn
	from netip.AddrPort
}

// flow is what one sender here exchanges with one port of the agent.
type flow struct {
	key  flowKey
	far  net.Conn
	last time.Time // when something passed; under the table's lock
}

// flowTable holds the flows of all ports.
type flowTable struct {
	mu    sync.Mutex
	flows map[flowKey]*flow
}

func newFlowTable() *flowTable { return &flowTable{flows: map[flowKey]*flow{}} }

// touch returns the flow of a key, if there is one, and notes that something passed.
func (t *flowTable) touch(key flowKey) *flow {
	t.mu.Lock()
	defer t.mu.Unlock()
	w := t.flows[key]
	if w != nil {
		w.last = time.Now()
	}
	return w
}

// add puts in a flow, and ends the one that was silent for longest if there are too many.
func (t *flowTable) add(w *flow) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.flows) >= maxFlows {
		var oldest *flow
		for _, other := range t.flows {
			if oldest == nil || other.last.Before(oldest.last) {
				oldest = other
			}
		}
		delete(t.flows, oldest.key)
		oldest.far.Close()
	}
	w.last = time.Now()
	t.flows[w.key] = w
}

// idle returns how long nothing has passed in a flow.
func (t *flowTable) idle(w *flow) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	return time.Since(w.last)
}

// remove takes out a flow and closes it.
func (t *flowTable) remove(w *flow) {
	t.mu.Lock()
	if t.flows[w.key] == w {
		delete(t.flows, w.key)
	}
	t.mu.Unlock()
	w.far.Close()
}

// serveUDP carries datagrams between one port here and one of the agent until ctx is done.
func (f *forwarder) serveUDP(ctx context.Context, e *endpoint) error {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	buf := make([]byte, maxUDP)
	for {
		n, from, err := e.udp.ReadFromUDPAddrPort(buf)
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil
		case err != nil:
			f.complain("cannot receive on %s: %v", e.served, err)
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(acceptPause):
			}
			continue
		case n > tailnet.MaxDatagram:
			f.complain("lost a datagram to port %s that was too long: the mesh carries %d bytes at most", portName(networkUDP, e.spec.remote), tailnet.MaxDatagram)
			continue
		}
		key := flowKey{e.udp, from}
		w := f.flows.touch(key)
		if w == nil {
			far, err := f.mesh.node.DialUDP(ctx, netip.AddrPortFrom(wire.AgentAddr(f.mesh.agent.ID), e.spec.remote))
			if err != nil {
				f.complain("%v", err)
				continue
			}
			w = &flow{key: key, far: far}
			f.flows.add(w)
			running.Go(func() { f.answer(ctx, e, w) })
		}
		w.far.Write(buf[:n]) // what cannot be sent is lost, as datagrams are
	}
}

// answer carries what comes back in a flow until it is idle, or ctx is done.
func (f *forwarder) answer(ctx context.Context, e *endpoint, w *flow) {
	defer f.flows.remove(w)
	defer context.AfterFunc(ctx, func() { w.far.Close() })()
	limit := flowIdle
	if e.spec.remote == portDNS {
		limit = flowIdleDNS
	}
	buf := make([]byte, tailnet.MaxDatagram)
	for {
		w.far.SetReadDeadline(time.Now().Add(limit - f.flows.idle(w)))
		for {
			n, err := w.far.Read(buf)
			if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() {
				break
			}
			if err != nil {
				return
			}
			f.flows.touch(w.key)
			e.udp.WriteToUDPAddrPort(buf[:n], w.key.from)
		}
		if f.flows.idle(w) >= limit {
			return
		}
	}
}
