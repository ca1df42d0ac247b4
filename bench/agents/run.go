package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/berthd/berth/wire"
)

// run is the whole measurement.
func run(ctx context.Context, s settings, out io.Writer) error {
	dir := s.keep
	if dir == "" {
		temp, err := os.MkdirTemp("", "berth-agents-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(temp)
		dir = temp
	}
	if s.berth == "" {
		program, err := build(ctx, dir)
		if err != nil {
			return err
		}
		s.berth = program
	}
	server, err := newServer(s.berth, dir, s.agents)
	if err != nil {
		return err
	}
	if err := server.start(ctx); err != nil {
		return err
	}
	defer func() { server.kill() }()
	tokens, err := server.tokens(ctx)
	if err != nil {
		return fmt.Errorf("cannot make tokens: %w", err)
	}
	if len(tokens) != s.agents {
		return fmt.Errorf("the server has %d agents, not %d", len(tokens), s.agents)
	}
	r := newRecord()
	agents := make([]*agent, len(tokens))
	for i, who := range tokens {
		if agents[i], err = newAgent(s, server, who, r); err != nil {
			return err
		}
	}
	idle, err := server.usage()
	if err != nil {
		return err
	}

	agentsCtx, stop := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer stop()
	begun := time.Now()
	// All link within a second for each hundred.
	spread := time.Duration(s.agents) * 10 * time.Millisecond
	for _, a := range agents {
		running.Go(func() { a.run(agentsCtx, rand.N(spread)) })
	}
	if err := all(ctx, r, s.agents, s.within+spread); err != nil {
		return errors.Join(err, failures(server, r))
	}
	fmt.Fprintf(out, "%d agents linked in %.1f s\n", s.agents, time.Since(begun).Seconds())

	r.steady()
	if err := watch(ctx, s, server, r, idle, out); err != nil {
		return err
	}
	if err := errors.Join(failures(server, r), connected(ctx, s, server)); err != nil {
		return err
	}
	if err := outage(ctx, s, server, r, out); err != nil {
		return errors.Join(err, failures(server, r))
	}

	stop()
	running.Wait()
	if err := failures(server, r); err != nil {
		return err
	}
	return checkLogs(ctx, server, agents, out)
}

// all waits until every agent is linked.
func all(ctx context.Context, r *record, agents int, within time.Duration) error {
	limit := time.NewTimer(within)
	defer limit.Stop()
	for {
		n, changed := r.links()
		if n == agents {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-limit.C:
			return fmt.Errorf("%d of %d agents are linked after %v", n, agents, within)
		case <-changed:
		}
	}
}

// watch lets the agents work and prints what that takes.
func watch(ctx context.Context, s settings, server *server, r *record, idle usage, out io.Writer) error {
	before, err := server.usage()
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-server.ended:
		return fmt.Errorf("the server ended: see %s", server.logFile())
	case <-time.After(s.steady):
	}
	after, err := server.usage()
	if err != nil {
		return err
	}
	n := float64(s.agents)
	fmt.Fprintf(out, "over %v, of %d CPUs, shared with the agents themselves:\n", s.steady, runtime.NumCPU())
	fmt.Fprintf(out, "server memory: %.1f MB resident before the first agent, %.1f MB at the end (%.1f MB anonymous), peak %.1f MB: %.0f kB an agent\n",
		mb(idle.resident), mb(after.resident), mb(after.anonymous), mb(after.peak), float64(after.resident-idle.resident)/n/1e3)
	cpu := after.cpu - before.cpu
	fmt.Fprintf(out, "server CPU: %.1f s, %.0f %% of one CPU: %.3f ms a second for each agent\n",
		cpu.Seconds(), 100*cpu.Seconds()/s.steady.Seconds(), ms(cpu)/s.steady.Seconds()/n)
	r.printCalls(out, s.steady)
	return nil
}

func mb(n int64) float64 { return float64(n) / 1e6 }

// outage kills the server, starts it again, and waits for the agents.
func outage(ctx context.Context, s settings, server *server, r *record, out io.Writer) error {
	r.killed()
	server.kill()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(s.down):
	}
	started := time.Now()
	if err := server.start(ctx); err != nil {
		return err
	}
	back := time.Now()
	r.returned()
	fmt.Fprintf(out, "the server was killed, away for %v, and answered %.2f s after its start\n", s.down, back.Sub(started).Seconds())
	err := all(ctx, r, s.agents, s.within)
	took := time.Since(back)
	r.printArrivals(out, started)
	if err != nil {
		return err
	}
	r.mu.Lock()
	arrivals := slices.Collect(maps.Values(r.back))
	dials := slices.Clone(r.dials)
	r.mu.Unlock()
	fmt.Fprintf(out, "all %d are back after %.1f s; at most %d arrived within any second, and %d dialled within any 100 ms\n",
		s.agents, took.Seconds(), peak(arrivals, time.Second), peak(dials, 100*time.Millisecond))
	u, err := server.usage()
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "server memory then: %.1f MB resident, peak %.1f MB; CPU %.1f s since its start\n", mb(u.resident), mb(u.peak), u.cpu.Seconds())
	r.printCalls(out, took)
	r.steady()
	// Everybody has to stay.
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(2 * s.logs):
	}
	return connected(ctx, s, server)
}

// failures is the error of a run with anything wrong in it.
func failures(server *server, r *record) error {
	var all []string
	for _, text := range r.failures() {
		all = append(all, "agents: "+text)
	}
	troubles, err := server.troubles()
	if err != nil {
		return err
	}
	for _, text := range troubles {
		all = append(all, "server: "+text)
	}
	if len(all) == 0 {
		return nil
	}
	const shown = 20
	if len(all) > shown {
		all = append(all[:shown], fmt.Sprintf("and %d more", len(all)-shown))
	}
	return errors.New("there were errors:\n" + strings.Join(all, "\n"))
}

// connected asks the server itself, until it says that every agent is connected and ready: the last to
// come may still have to say so.
func connected(ctx context.Context, s settings, server *server) error {
	admin, err := server.admin()
	if err != nil {
		return err
	}
	for limit := time.Now().Add(s.within); ; {
		rows, err := admin.Agents(ctx)
		if err != nil {
			return err
		}
		var missing []string
		for _, row := range rows {
			if row.Status != wire.AgentConnected || row.LifecycleState != "ready" {
				missing = append(missing, fmt.Sprintf("%s is %s and %s", row.Name, row.Status, row.LifecycleState))
			}
		}
		if len(rows) == s.agents && len(missing) == 0 {
			return nil
		}
		if time.Now().After(limit) {
			return fmt.Errorf("of %d agents not all are connected and ready: %s", len(rows), strings.Join(missing[:min(10, len(missing))], ", "))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

// checkLogs compares what the server stored with what the agents sent.
func checkLogs(ctx context.Context, server *server, agents []*agent, out io.Writer) error {
	admin, err := server.admin()
	if err != nil {
		return err
	}
	var lines uint64
	for _, a := range agents {
		if err := a.checkLogs(ctx, admin); err != nil {
			return err
		}
		lines += a.acknowledged
	}
	fmt.Fprintf(out, "%d log lines of %d agents are stored once, in order\n", lines, len(agents))
	return nil
}
