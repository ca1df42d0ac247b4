// Command containers measures how soon the running containers beside an agent are known: read from memory, against `docker ps -a` and `docker inspect` of the
// same engine in the same run, and from an event to those who watch. It starts engines of its own, so it needs root and Debian's docker.io, podman and
// busybox-static.
//
//	go run ./bench/containers [-engines docker,podman] [-counts 1,50,200] [-quiet 30s] [-quick]
//
// Figures are printed and not judged; what fails is a list that is not the engine's.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/berthd/berth/containers"
	"github.com/berthd/berth/internal/enginelab"
	"github.com/berthd/berth/wire"
)

// settings say what is measured.
type settings struct {
	engines []string
	counts  []int // of containers, ascending
	rounds  int   // of the docker command
	reads   int   // of the list
	changes int   // that are watched
	// quiet is how long a watch is left alone for its CPU time.
	quiet time.Duration
}

func main() {
	s := settings{rounds: 5, reads: 1000, changes: 20}
	engines := flag.String("engines", strings.Join(enginelab.Kinds, ","), "which engines")
	counts := flag.String("counts", "1,50,200", "how many containers, ascending")
	quick := flag.Bool("quick", false, "measure little, to see that it works")
	flag.DurationVar(&s.quiet, "quiet", 30*time.Second, "how long a quiet watch is weighed")
	flag.Parse()
	s.engines = strings.Split(*engines, ",")
	for _, n := range strings.Split(*counts, ",") {
		count, err := strconv.Atoi(n)
		if err != nil {
			fmt.Fprintln(os.Stderr, "bench/containers: -counts takes numbers, separated by commas")
			os.Exit(2)
		}
		s.counts = append(s.counts, count)
	}
	if *quick {
		s = quickly()
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, s, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench/containers:", err)
		os.Exit(1)
	}
}

// quickly are the least settings that measure everything.
func quickly() settings {
	return settings{engines: []string{enginelab.Podman}, counts: []int{1, 3}, rounds: 1, reads: 50, changes: 2, quiet: 200 * time.Millisecond}
}

func run(ctx context.Context, s settings, out io.Writer) error {
	for _, kind := range s.engines {
		if err := measure(ctx, s, kind, out); err != nil {
			return fmt.Errorf("%s: %w", kind, err)
		}
	}
	return nil
}

func measure(ctx context.Context, s settings, kind string, out io.Writer) (err error) {
	e, err := enginelab.Start(kind)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.Stop()) }()
	fmt.Fprintf(out, "%s\n%12s %22s %12s %12s %10s %12s %14s\n", kind, "containers", "docker ps + inspect", "first list", "list", "ratio", "told after", "quiet watch")
	started := 0
	for _, count := range s.counts {
		var starting errgroup.Group
		starting.SetLimit(4)
		for ; started < count; started++ {
			spec := enginelab.Spec(fmt.Sprintf("bench-%03d", started), "sleep", "10000")
			spec.Config.Image = enginelab.ShelllessImage
			spec.Config.Labels = map[string]string{"com.docker.compose.project": "bench", "number": strconv.Itoa(started)}
			starting.Go(func() error {
				_, err := e.Run(spec)
				return err
			})
		}
		if err := starting.Wait(); err != nil {
			return err
		}
		r, err := one(ctx, s, e, count)
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "%12d %11s (%3.0f ms CPU) %12s %12s %10.6f %12s %12.3f %%\n", count, round(r.command), r.commandCPU.Seconds()*1000,
			round(r.first), round(r.list), r.list.Seconds()/r.command.Seconds(), round(r.told), r.quiet*100)
	}
	return nil
}

// result is what was measured with one number of containers. All but the first list are medians.
type result struct {
	command, commandCPU time.Duration // docker ps -a and docker inspect, without the engine's own CPU time
	first, list         time.Duration
	told                time.Duration // from the answer that a container was made to a list that has it
	quiet               float64       // of one processor, with a watch and no event
}

func one(ctx context.Context, s settings, e *enginelab.Engine, count int) (r result, err error) {
	var commands, cpu []time.Duration
	for range s.rounds {
		took, used, err := byCommand(ctx, e, count)
		if err != nil {
			return r, err
		}
		commands, cpu = append(commands, took), append(cpu, used)
	}
	r.command, r.commandCPU = median(commands), median(cpu)

	// The engine is found as an agent finds it.
	if err := os.Setenv("DOCKER_HOST", e.Host); err != nil {
		return r, err
	}
	l := containers.New(containers.Config{Timeout: time.Minute})
	running, end := context.WithCancel(ctx)
	ran := make(chan error, 1)
	go func() { ran <- l.Run(running) }()
	defer func() { end(); err = errors.Join(err, <-ran) }()

	began := time.Now()
	if err := hasAll(ctx, l, count); err != nil {
		return r, err
	}
	r.first = time.Since(began)
	var reads []time.Duration
	for range s.reads {
		began := time.Now()
		if err := hasAll(ctx, l, count); err != nil {
			return r, err
		}
		reads = append(reads, time.Since(began))
	}
	r.list = median(reads)
	changed, stop := l.Watch()
	defer stop()
	if r.told, err = watched(ctx, s, e, l, changed); err != nil {
		return r, err
	}
	before := usedCPU()
	began = time.Now()
	select {
	case <-time.After(s.quiet):
	case <-ctx.Done():
		return r, ctx.Err()
	}
	r.quiet = (usedCPU() - before).Seconds() / time.Since(began).Seconds()
	return r, nil
}

// byCommand asks as agents do that run the docker command.
func byCommand(ctx context.Context, e *enginelab.Engine, count int) (took, cpu time.Duration, err error) {
	began := time.Now()
	ps := exec.CommandContext(ctx, "docker", "--host", e.Host, "ps", "--all", "--quiet", "--no-trunc")
	ids, err := ps.Output()
	if err != nil {
		return 0, 0, fmt.Errorf("docker ps: %w", err)
	}
	all := strings.Fields(string(ids))
	if len(all) != count {
		return 0, 0, fmt.Errorf("docker ps lists %d containers, want %d", len(all), count)
	}
	inspect := exec.CommandContext(ctx, "docker", append([]string{"--host", e.Host, "inspect"}, all...)...)
	if _, err := inspect.Output(); err != nil {
		return 0, 0, fmt.Errorf("docker inspect: %w", err)
	}
	took = time.Since(began)
	for _, p := range []*os.ProcessState{ps.ProcessState, inspect.ProcessState} {
		cpu += p.UserTime() + p.SystemTime()
	}
	return took, cpu, nil
}

func hasAll(ctx context.Context, l *containers.Lister, count int) error {
	list, err := l.List(ctx)
	if err != nil {
		return err
	}
	if ours := len(list.Containers); ours != count {
		return fmt.Errorf("the list has %d containers, want %d: %q", ours, count, list.Warnings)
	}
	return nil
}

// watched makes and removes containers, and returns how long those took to be in the list.
func watched(ctx context.Context, s settings, e *enginelab.Engine, l *containers.Lister, changed <-chan struct{}) (time.Duration, error) {
	var told []time.Duration
	for i := range s.changes {
		spec := enginelab.Spec(fmt.Sprintf("change-%03d", i), "true")
		spec.Config.Image = enginelab.ShelllessImage
		id, err := e.Create(spec)
		if err != nil {
			return 0, err
		}
		began := time.Now()
		if err := until(ctx, l, changed, id, true); err != nil {
			return 0, err
		}
		told = append(told, time.Since(began))
		if err := e.Remove(id); err != nil {
			return 0, err
		}
		if err := until(ctx, l, changed, id, false); err != nil {
			return 0, err
		}
	}
	return median(told), nil
}

// until waits for a list with, or without, a container.
func until(ctx context.Context, l *containers.Lister, changed <-chan struct{}, id string, there bool) error {
	limit := time.After(10 * time.Second)
	for {
		list, err := l.List(ctx)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(list.Containers, func(c wire.Container) bool { return c.ID == id }) == there {
			return nil
		}
		select {
		case <-changed:
		case <-limit:
			return errors.New("a change was not told of within 10 s")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// usedCPU is the processor time that this process has had.
func usedCPU() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func median(all []time.Duration) time.Duration {
	slices.Sort(all)
	return all[len(all)/2]
}

// round leaves three digits.
func round(d time.Duration) time.Duration {
	unit := time.Duration(1)
	for d/unit >= 1000 {
		unit *= 10
	}
	return d.Round(unit)
}
