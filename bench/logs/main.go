// Command logs measures the way of log lines from a script to the control server: a shell loop that prints line by line, as
// fast as it can, beside the same loop with cat behind it; and a file through berthd beside the same file through rsyslog
// (Debian 12 has no package of fluent-bit).
//
//	go run ./bench/logs [-rounds 3] [-only loop|file] [-quick] [-bin DIR]
//
// Server, agent, script and rsyslog are processes of their own, on loopback, and all share the machine's processors. Processor time
// and memory are those of rsyslog alone, or of berthd and the process that holds the script together, from the first line to when
// the last has been delivered. It takes some five minutes.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/berthd/berth/bench/lab"
)

// settings say how much is measured.
type settings struct {
	lab.Bench
	loop int // lines that the loop prints in a round
	file int // lines of the file; they fit the spool, so that none is dropped however slow the server is
}

func main() {
	s := settings{Bench: lab.Bench{Name: "logs", Rounds: 3}, loop: 6_000_000, file: 300_000}
	flag.IntVar(&s.loop, "lines", s.loop, "how many lines the loop prints; 6 million take a minute or more")
	s.Main("loop or file", s.quickly, s.run)
}

// quickly makes settings under which figures mean nothing.
func (s *settings) quickly() {
	s.Rounds, s.loop, s.file = 1, 20_000, 20_000
}

// run measures all and prints a table.
func (s *settings) run(ctx context.Context, out io.Writer) error {
	return s.In(ctx, func(dir string) error {
		w, err := start(ctx, s.Bin, dir)
		if err != nil {
			return err
		}
		defer w.Stop()
		// What starting costs is over when the first line has arrived.
		if _, err := w.deliver("echo 0", 1); err != nil {
			return fmt.Errorf("%w\n%s", err, w.Log())
		}
		if err := w.find(); err != nil {
			return err
		}
		part := func(name string, measure func(*world, *settings, io.Writer) error) lab.Part {
			return lab.Part{Name: name, Measure: func(out io.Writer) error { return measure(w, s, out) }}
		}
		return s.Table(out, w.World, part("loop", loop), part("file", file))
	})
}

// text is what ends every line of the loop and of the file.
const text = "the quick brown fox jumps over the lazy dog and runs on through the field beside it"

// loop runs a shell loop behind berthd and behind cat, in turns.
func loop(w *world, s *settings, out io.Writer) error {
	script := filepath.Join(w.Dir, "loop")
	if err := os.WriteFile(script, fmt.Appendf(nil, "i=0; while [ $i -lt $1 ]; do echo \"$i %s\"; i=$((i+1)); done\n", text), 0o600); err != nil {
		return err
	}
	command := fmt.Sprintf("sh %s %d", script, s.loop)
	var cat, ours, speed, cores, memory, lag lab.Series
	cat.Name, ours.Name, speed.Name, cores.Name, memory.Name, lag.Name = "cat", "berthd", "berthd", "berthd", "berthd", "berthd"
	var size int64 // what the loop prints, without the line ends
	for i := range s.loop {
		size += int64(len(fmt.Sprint(i)) + 1 + len(text))
	}
	for range s.Rounds {
		// In the same session: how much of a busy machine a process has depends on that.
		alone, err := w.deliver(command+" | cat >/dev/null", 0)
		if err != nil {
			return err
		}
		cat.Add(alone.written.Seconds())
		cost, err := w.deliver(command, size)
		if err != nil {
			return err
		}
		ours.Add(cost.written.Seconds())
		speed.Add(float64(s.loop) / cost.written.Seconds())
		cores.Add(cost.processor.Seconds() / cost.delivered.Seconds())
		memory.Add(cost.peak)
		lag.Add((cost.delivered - cost.written).Seconds())
	}
	lab.Row(out, "a shell loop", &ours, "s", &cat)
	lab.Row(out, "a shell loop", &cat, "s", nil)
	lab.Row(out, "its speed", &speed, "lines/s", nil)
	lab.Row(out, "processors", &cores, "", nil)
	lab.Row(out, "most memory", &memory, "MB", nil)
	lab.Row(out, "delivered after its end", &lag, "s", nil)
	return w.inOrder(s.loop)
}

// file sends a file through berthd and through rsyslog, in turns.
func file(w *world, s *settings, out io.Writer) error {
	path := filepath.Join(w.Dir, "file")
	var lines bytes.Buffer
	for i := range s.file {
		fmt.Fprintln(&lines, i, text)
	}
	size := int64(lines.Len())
	if err := os.WriteFile(path, lines.Bytes(), 0o600); err != nil {
		return err
	}
	r, err := w.startRsyslog()
	if err != nil {
		return err
	}
	var speed, cost [2]lab.Series
	for i, name := range []string{"rsyslog", "berthd"} {
		speed[i].Name, cost[i].Name = name, name
	}
	for round := range s.Rounds {
		theirs, err := r.deliver(path, round, int64(s.file))
		if err != nil {
			return err
		}
		ours, err := w.deliver("cat "+path, size-int64(s.file))
		if err != nil {
			return err
		}
		for i, one := range []spent{theirs, ours} {
			speed[i].Add(float64(s.file) / one.delivered.Seconds())
			cost[i].Add(one.processor.Seconds() / (float64(size) / 1e9))
		}
	}
	for i := range speed {
		lab.Row(out, "a file", &speed[i], "lines/s", &speed[0])
	}
	for i := range cost {
		lab.Row(out, "processor time a GB", &cost[i], "s", &cost[0])
	}
	return w.inOrder(s.file)
}
