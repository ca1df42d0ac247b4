package main

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/berthd/berth/wire"
)

const (
	// autoLowest is the lowest port that is forwarded by itself: those below are a machine's own services.
	autoLowest = 1024
	// maxAuto bounds the ports that are forwarded by themselves.
	maxAuto = 128
	// autoGrace is how long a port may be gone before it is given up: a server that is started anew comes
	// back within seconds, and should be found where it was.
	autoGrace = 10 * time.Second
	// autoTries is how many ports above a taken one are tried before any free one will do.
	autoTries = 20
	// autoTick is how often ports that are gone are looked at.
	autoTick = time.Second
)

// autoForwarding is a port that is forwarded by itself.
type autoForwarding struct {
	*endpoint
	gone time.Time // when it was missed first; zero while it is there
}

// autoForwarder forwards the ports that programs in the workspace listen on.
type autoForwarder struct {
	*forwarder
	work   sync.WaitGroup  // serves the active ones
	skip   map[uint16]bool // those that were asked for by number, and those here that lead to them if own
	own    bool            // the workspace is this machine, where a port cannot have its own number twice
	active map[uint16]*autoForwarding
	full   bool // people were told that there are too many
}

// auto forwards ports as they appear beside those that were named, until ctx is done; own says that the
// workspace is this machine.
func (f *forwarder) auto(ctx context.Context, named []*endpoint, own bool) error {
	a := newAutoForwarder(f, named, own)
	api := f.mesh.api()
	defer api.Close()
	ctx, stop := context.WithCancel(ctx)
	lists, failed := make(chan wire.ListeningPorts), make(chan error, 1)
	go func() {
		defer close(lists)
		watch := func(ctx context.Context) iter.Seq2[wire.ListeningPorts, error] { return api.WatchPorts(ctx, false) }
		failed <- follow(ctx, watch, func(ports wire.ListeningPorts) error {
			select {
			case lists <- ports:
			case <-ctx.Done():
			}
			return nil
		}, func() {}) // attend tells of it
	}()
	defer func() {
		stop()
		for range lists { // until the watch has ended
		}
		for _, e := range a.active {
			e.Close()
		}
		a.work.Wait()
	}()
	tick := time.NewTicker(autoTick)
	defer tick.Stop()
	for first := true; ; {
		select {
		case <-ctx.Done():
			return nil
		case ports, ok := <-lists:
			if !ok {
				return fmt.Errorf("cannot watch the ports of %s: %w", f.mesh.agent.Name, <-failed)
			}
			a.update(ctx, ports.Ports, time.Now())
			if first && len(a.active) == 0 {
				f.say("nothing to forward in %s yet; waiting for programs to listen", f.mesh.agent.Name)
			}
			first = false
		case now := <-tick.C:
			a.expire(now)
		}
	}
}

func newAutoForwarder(f *forwarder, named []*endpoint, own bool) *autoForwarder {
	a := &autoForwarder{forwarder: f, own: own, skip: map[uint16]bool{}, active: map[uint16]*autoForwarding{}}
	for _, e := range named {
		if e.spec.network != networkTCP {
			continue
		}
		a.skip[e.spec.remote] = true
		if own {
			a.skip[e.localPort()] = true
		}
	}
	return a
}

// update takes over what listens now.
func (a *autoForwarder) update(ctx context.Context, ports []wire.ListeningPort, now time.Time) {
	wanted := autoPorts(ports, a.skip)
	if a.own { // what listens here for a port listens there too, and must not be forwarded in turn
		for _, e := range a.active {
			delete(wanted, e.localPort())
		}
	}
	for remote, e := range a.active {
		_, listens := wanted[remote]
		switch {
		case listens:
			e.gone = time.Time{}
		case e.gone.IsZero():
			e.gone = now
		}
	}
	for _, remote := range slices.Sorted(maps.Keys(wanted)) {
		if a.active[remote] != nil {
			continue
		}
		if len(a.active) >= maxAuto {
			if !a.full {
				a.say("%d ports are forwarded, and no more: name the others that you need, as in berth forward %s %d", maxAuto, shellQuote(a.mesh.agent.Name), remote)
			}
			a.full = true
			return
		}
		a.begin(ctx, wanted[remote])
	}
	a.full = false
}

// begin forwards one port, and says where.
func (a *autoForwarder) begin(ctx context.Context, port wire.ListeningPort) {
	e, err := listenNear(port.Port, a.own)
	if err != nil {
		a.complain("%v", cannotListen(a.mesh.agent.Name, spec{network: networkTCP, host: "127.0.0.1", local: port.Port, remote: port.Port}, err))
		return
	}
	a.active[port.Port] = &autoForwarding{endpoint: e}
	line := e.describe(a.mesh.agent.Name)
	if port.ProcessName != "" {
		line += " (" + port.ProcessName + ")"
	}
	if e.localPort() != port.Port {
		line += fmt.Sprintf("; %d is taken here", port.Port)
	}
	fmt.Fprintln(a.program.out, clean(line))
	a.work.Go(func() { a.serve(ctx, e) }) // it has no error to tell
}

// expire gives up what has been gone for long enough.
func (a *autoForwarder) expire(now time.Time) {
	for remote, e := range a.active {
		if !e.gone.IsZero() && now.Sub(e.gone) >= autoGrace {
			e.Close()
			delete(a.active, remote)
			fmt.Fprintf(a.program.out, "%s closed: nothing listens on port %d of %s any more\n", e.served, remote, clean(a.mesh.agent.Name))
		}
	}
}

// listenNear listens on a port of this machine or, where it is taken, on the next that is free.
func listenNear(port uint16, taken bool) (e *endpoint, err error) {
	f := spec{network: networkTCP, host: "127.0.0.1", local: port, remote: port, count: 1}
	if err = syscall.EADDRINUSE; !taken {
		e, err = listen(f)
	}
	for i := 1; err != nil && i <= autoTries && int(port)+i <= 0xffff; i++ {
		f.local = port + uint16(i)
		e, err = listen(f)
	}
	if err != nil {
		f.local = 0
		e, err = listen(f)
	}
	return e, err
}

// autoPorts returns the ports worth forwarding that were not asked for anyway.
func autoPorts(ports []wire.ListeningPort, skip map[uint16]bool) map[uint16]wire.ListeningPort {
	wanted := map[uint16]wire.ListeningPort{}
	for _, p := range slices.SortedStableFunc(slices.Values(ports), func(a, b wire.ListeningPort) int { return cmp.Compare(a.Port, b.Port) }) {
		if p.Network == networkTCP && p.Hidden == "" && p.Port >= autoLowest && !skip[p.Port] && onLoopback(p) && !ours(p) {
			if _, ok := wanted[p.Port]; !ok {
				wanted[p.Port] = p
			}
		}
	}
	return wanted
}

// onLoopback tells whether the workspace's loopback leads to a port. Stock agents do not say where one
// listens; most listen on every address.
func onLoopback(p wire.ListeningPort) bool {
	if p.Namespace != 0 {
		return false
	}
	if len(p.Addresses) == 0 {
		return true
	}
	return slices.ContainsFunc(p.Addresses, func(a string) bool {
		return a == "0.0.0.0" || a == "::" || a == "127.0.0.1" || a == "::1"
	})
}

// ours tells whether a port is berth's. What another berth forwards listens in the workspace if that is
// its machine, and two of them would forward each other's without an end.
func ours(p wire.ListeningPort) bool { return p.ProcessName == "berth" || p.ProcessName == "berthd" }
