package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
)

// forwardDialTimeout is how long a forwarded connection may take to open, on the far side.
const forwardDialTimeout = 30 * time.Second

// forwarding is one port of the agent that is served here.
type forwarding struct {
	local  string // host:port to listen on
	remote uint16
}

// parseForwarding reads [[HOST:]LOCAL:]REMOTE. Without LOCAL the same port is used, without HOST only
// this machine can connect.
func parseForwarding(s string) (forwarding, error) {
	bad := fmt.Errorf("cannot forward %q: the form is [[HOST:]LOCAL:]REMOTE, such as 8080 or 9000:8080", s)
	rest, remote := "", s
	if i := strings.LastIndexByte(s, ':'); i >= 0 {
		rest, remote = s[:i], s[i+1:]
	}
	to, err := strconv.ParseUint(remote, 10, 16)
	if err != nil || to == 0 {
		return forwarding{}, bad
	}
	host, port := "127.0.0.1", rest
	switch {
	case rest == "" && strings.Contains(s, ":"):
		return forwarding{}, bad
	case rest == "":
		port = remote
	case strings.Contains(rest, ":"):
		if host, port, err = net.SplitHostPort(rest); err != nil || host == "" {
			return forwarding{}, bad
		}
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return forwarding{}, bad
	}
	return forwarding{local: net.JoinHostPort(host, port), remote: uint16(to)}, nil
}

func (p *program) forwardCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "forward NAME [[HOST:]LOCAL:]REMOTE...",
		Short: "Make ports of a workspace reachable on this machine",
		Long: `Make TCP ports of a workspace reachable on this machine until Ctrl-C. Only this machine can
connect unless HOST says otherwise. LOCAL 0 takes any free port and prints it.`,
		Example: `  berth forward demo 8080           # http://127.0.0.1:8080 is demo's port 8080
  berth forward demo 9000:8080 5432`,
		Args:              wantArgs(2, -1),
		ValidArgsFunction: p.agentNames,
	}
	wait := waitFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var all []forwarding
		for _, arg := range args[1:] {
			f, err := parseForwarding(arg)
			if err != nil {
				return usageError(cmd, err)
			}
			all = append(all, f)
		}
		ctx, stop := untilInterrupt(cmd.Context())
		defer stop()
		return p.forward(ctx, args[0], all, *wait)
	}
	return cmd
}

func (p *program) forward(ctx context.Context, name string, all []forwarding, wait time.Duration) error {
	// The listeners come first: a port that is taken shows before anything is waited for.
	var listeners []net.Listener
	defer func() {
		for _, l := range listeners {
			l.Close()
		}
	}()
	for _, f := range all {
		l, err := net.Listen("tcp", f.local)
		if err != nil {
			return fmt.Errorf("cannot listen for port %d of %s: %w; choose another local port, as in %s", f.remote, name, err, suggestion(f))
		}
		listeners = append(listeners, l)
	}
	m, err := p.reach(ctx, name, wait)
	if err != nil {
		return err
	}
	defer m.Close()
	group, ctx := errgroup.WithContext(ctx)
	for i, l := range listeners {
		fmt.Fprintf(p.out, "%s -> %s port %d\n", l.Addr(), clean(m.agent.Name), all[i].remote)
		group.Go(func() error { return p.serveForwarding(ctx, m, l, all[i].remote) })
	}
	return group.Wait()
}

// suggestion names another local port for a forwarding.
func suggestion(f forwarding) string { return fmt.Sprintf("0:%d", f.remote) }

// serveForwarding carries every connection to l until ctx is done.
func (p *program) serveForwarding(ctx context.Context, m *mesh, l net.Listener, remote uint16) error {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	var running sync.WaitGroup
	defer running.Wait()
	for {
		near, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("cannot accept connections: %w", err)
		}
		running.Go(func() {
			defer near.Close()
			dialing, cancel := context.WithTimeout(ctx, forwardDialTimeout)
			far, err := m.dial(dialing, remote)
			cancel()
			if err != nil {
				if ctx.Err() == nil {
					fmt.Fprintln(p.errOut, "berth:", clean(err.Error()))
				}
				return
			}
			defer far.Close()
			defer context.AfterFunc(ctx, func() { near.Close(); far.Close() })()
			splice(near, far)
		})
	}
}

// splice copies both ways until both have ended; the end of one direction is passed on by itself.
func splice(a, b net.Conn) {
	var both sync.WaitGroup
	oneWay := func(to, from net.Conn) {
		if _, err := io.Copy(to, from); err != nil && !errors.Is(err, net.ErrClosed) {
			// One broken side is of no use to the other.
			to.Close()
			from.Close()
			return
		}
		closeWrite(to)
	}
	both.Go(func() { oneWay(a, b) })
	both.Go(func() { oneWay(b, a) })
	both.Wait()
}
