package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"
	"time"

	"github.com/berthd/berth/bench/lab"
	"github.com/berthd/berth/ptyhost"
)

// patience bounds every wait for a terminal.
const patience = time.Minute

// bulk prints a file through every way.
func bulk(ctx context.Context, w *world, s *settings, file string, out io.Writer) error {
	script := fmt.Sprintf("stty -echo; echo READY; while read x; do cat %s; echo; echo END-$x; done", file)
	ways, err := w.all(ctx, "bulk", script, true)
	if err != nil {
		return err
	}
	defer closeAll(ways)
	speed := make([]*lab.Series, len(ways))
	bytesSeen := make([]*lab.Series, len(ways))
	for i, way := range ways {
		speed[i], bytesSeen[i] = &lab.Series{Name: way.name}, &lab.Series{Name: way.name}
	}
	for round := range s.Rounds + 1 { // the first warms up
		for i, way := range ways {
			before := way.read()
			begun := time.Now()
			if err := way.ask(strconv.Itoa(round), "END-"+strconv.Itoa(round)); err != nil {
				return fmt.Errorf("bulk, %s: %w", way.name, err)
			}
			if took := time.Since(begun); round > 0 || s.Rounds == 1 {
				speed[i].Add(float64(s.size) / 1e6 / took.Seconds())
				bytesSeen[i].Add(float64(way.read()-before) / float64(s.size))
			}
		}
	}
	for i := range ways {
		lab.Row(out, "bulk output", speed[i], "MB/s", speed[0])
	}
	for i := range ways {
		lab.Row(out, "part of it that was sent", bytesSeen[i], "", nil)
	}
	return nil
}

// interrupt types Ctrl-C while yes runs.
func interrupt(ctx context.Context, w *world, s *settings, _ string, out io.Writer) error {
	const script = `stty -echo; echo READY; while read x; do trap 'echo; echo STOPPED-$x' INT; yes "flood $x the quick brown fox"; done`
	ways, err := w.all(ctx, "interrupt", script, true)
	if err != nil {
		return err
	}
	defer closeAll(ways)
	took := make([]*lab.Series, len(ways))
	for i, way := range ways {
		took[i] = &lab.Series{Name: way.name}
	}
	for round := range max(s.Rounds, 1) {
		for i, way := range ways {
			id := strconv.Itoa(round)
			if err := way.ask(id, "flood "+id+" the quick"); err != nil {
				return fmt.Errorf("interrupt, %s: %w", way.name, err)
			}
			if err := lab.Pause(ctx, 300*time.Millisecond); err != nil { // so that queues fill
				return err
			}
			begun := time.Now()
			if err := way.typeAndSee("\x03", "STOPPED-"+id); err != nil {
				return fmt.Errorf("interrupt, %s: %w", way.name, err)
			}
			took[i].Add(lab.Milliseconds(time.Since(begun)))
		}
	}
	for i := range ways {
		lab.Row(out, "Ctrl-C while yes runs", took[i], "ms", nil)
	}
	return nil
}

// echo types single keys, alone and while a second session of the same way floods.
func echo(ctx context.Context, w *world, s *settings, _ string, out io.Writer) error {
	ways, err := w.all(ctx, "echo", "stty raw -echo; echo READY; exec cat", false)
	if err != nil {
		return err
	}
	defer closeAll(ways)
	alone, flooded := make([]*lab.Series, len(ways)), make([]*lab.Series, len(ways))
	for i, way := range ways {
		alone[i], flooded[i] = &lab.Series{Name: way.name}, &lab.Series{Name: way.name}
	}
	for round := range s.Rounds {
		for i, way := range ways {
			if err := way.keys(ctx, s.keys, alone[i]); err != nil {
				return fmt.Errorf("echo, %s: %w", way.name, err)
			}
		}
		for i, way := range ways {
			flood, err := way.again(fmt.Sprintf("flood%d", round), "echo READY; exec yes 'the quick brown fox jumps over the lazy dog'")
			if err != nil {
				return fmt.Errorf("a flood beside %s: %w", way.name, err)
			}
			err = way.keys(ctx, s.keys, flooded[i])
			flood.close()
			if err != nil {
				return fmt.Errorf("echo beside a flood, %s: %w", way.name, err)
			}
		}
	}
	peer := 0
	for i, way := range ways {
		if way.name == nameSSH {
			peer = i
		}
	}
	for _, kind := range []struct {
		what string
		all  []*lab.Series
	}{{"echo of a key", alone}, {"echo beside a flood", flooded}} {
		for _, q := range []float64{0.5, 0.99} {
			base := kind.all[peer].Quantile(q)
			for _, one := range kind.all {
				fmt.Fprintf(out, "%s, p%.0f\t%s\t%.3g ms\t%.3g-%.3g\t%.2f of %s\t\n", kind.what, q*100, one.Name, one.Quantile(q), one.Quantile(0), one.Quantile(1), one.Quantile(q)/base, nameSSH)
			}
		}
	}
	return nil
}

// attaching attaches to a session with a full scrollback.
func attaching(ctx context.Context, w *world, s *settings, file string, out io.Writer) error {
	const script = `stty -echo; awk 'BEGIN {for (i = 0; i < 10100; i++) printf "%5d the \033[32mquick\033[0m brown fox jumps over the lazy dog, again and again and again\n", i}'; echo LAST; read x`
	keep, err := w.host("attach", script, false)
	if err != nil {
		return err
	}
	defer keep.close()
	if err := keep.see("LAST"); err != nil {
		return err
	}
	server, err := w.freshTmux(ctx)
	if err != nil {
		return err
	}
	defer server.stop()
	if err := errors.Join(server.open("attach", script), server.await(w, "attach", "LAST")); err != nil {
		return err
	}
	host, whole, peer := &lab.Series{Name: nameHost}, &lab.Series{Name: nameBerth}, &lab.Series{Name: nameTmux + ", the screen alone"}
	var size int64
	for range 2*s.Rounds + 1 {
		begun := time.Now()
		other, err := w.local(nameTmux, server.command("attach-session", "-t", "attach"))
		if err == nil {
			err = other.see("LAST")
		}
		if err != nil {
			return fmt.Errorf("attaching with tmux: %w", err)
		}
		peer.Add(lab.Milliseconds(time.Since(begun)))
		other.close()
		begun = time.Now()
		late, err := w.host("attach", "", false)
		if err == nil {
			err = late.see("LAST")
		}
		if err != nil {
			return fmt.Errorf("attaching: %w", err)
		}
		host.Add(lab.Milliseconds(time.Since(begun)))
		size = late.read()
		late.close()
	}
	lab.Row(out, fmt.Sprintf("attach to 10,000 lines (%d kB)", size/1000), host, "ms", peer)
	lab.Row(out, "attach", peer, "ms", nil)

	long, err := w.berthShell("attach-long", script)
	if err != nil {
		return err
	}
	defer long.close()
	if err := long.see("LAST"); err != nil {
		return err
	}
	for range s.Rounds {
		begun := time.Now()
		late, err := w.berthShell("attach-long", "")
		if err == nil {
			err = late.see("LAST")
		}
		if err != nil {
			return fmt.Errorf("attaching over the mesh: %w", err)
		}
		whole.Add(lab.Milliseconds(time.Since(begun)))
		late.close()
	}
	lab.Row(out, "the same from the command's start", whole, "ms", nil)
	return nil
}

// memory reads what the host, and a tmux server, take for sessions that nobody watches.
func memory(ctx context.Context, w *world, s *settings, file string, out io.Writer) error {
	host, stop, err := w.freshHost(ctx)
	if err != nil {
		return err
	}
	defer stop()
	server, err := w.freshTmux(ctx)
	if err != nil {
		return err
	}
	defer server.stop()
	n := 0
	open := func(script string) error {
		n++
		a, err := host.client.Attach(ctx, ptyhost.AttachRequest{Size: window, Create: host.create(script)})
		if err != nil {
			return err
		}
		v := watch(nameHost, a, nil)
		err = v.see("LAST")
		v.close()
		name := fmt.Sprintf("s%d", n)
		return errors.Join(err, server.open(name, script), server.await(w, name, "LAST"))
	}
	var ours, theirs [3]float64 // without a session, with idle ones, with full ones
	for i, step := range []struct {
		more   int
		script string
	}{{0, ""}, {s.idle, "echo LAST; read x"}, {s.full, fmt.Sprintf("head -c 4000000 %s; echo LAST; read x", file)}} {
		for range step.more {
			if err := open(step.script); err != nil {
				return fmt.Errorf("session %d: %w", n, err)
			}
		}
		err := lab.Pause(ctx, s.settle)
		if err == nil {
			ours[i], err = host.rss()
		}
		if err == nil {
			theirs[i], err = lab.Resident(server.pid)
		}
		if err != nil {
			return err
		}
	}
	for _, one := range []struct {
		name string
		rss  [3]float64
	}{{nameHost, ours}, {nameTmux, theirs}} {
		fmt.Fprintf(out, "resident, no session\t%s\t%.3g MB\t\t\t\n", one.name, one.rss[0])
		fmt.Fprintf(out, "resident, %d idle sessions\t%s\t%.3g MB\t\t\t\n", s.idle, one.name, one.rss[1])
		fmt.Fprintf(out, "an idle session\t%s\t%.3g MB\t\t\t\n", one.name, (one.rss[1]-one.rss[0])/float64(s.idle))
		fmt.Fprintf(out, "a session with a full scrollback\t%s\t%.3g MB\t\t\t\n", one.name, (one.rss[2]-one.rss[1])/float64(s.full))
	}
	return nil
}

// terminal is one way to a program, as a person's terminal sees it: it reads all the time.
type terminal struct {
	name  string
	w     io.Writer
	again func(session, script string) (*terminal, error) // opens another of the same way
	end   func()

	mu     sync.Mutex
	total  int64
	wanted []byte // a text that is waited for
	tail   []byte // the end of what was read since, for a text that lies across two pieces
	seen   chan error
	err    error // why reading ended
}

// watch reads rw until it ends.
func watch(name string, rw io.ReadWriter, end func()) *terminal {
	t := &terminal{name: name, w: rw, end: end}
	go func() {
		buf := make([]byte, 64<<10)
		for {
			n, err := rw.Read(buf)
			t.take(buf[:n], err)
			if err != nil {
				return
			}
		}
	}()
	return t
}

func (t *terminal) take(p []byte, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.total += int64(len(p))
	t.err = err
	if t.wanted == nil { // it may be asked for yet
		t.tail = append(t.tail, p...)
		t.tail = append(t.tail[:0], t.tail[max(0, len(t.tail)-kept):]...)
		return
	}
	joint := append(t.tail, p[:min(len(p), len(t.wanted))]...)
	switch {
	case bytes.Contains(p, t.wanted), bytes.Contains(joint, t.wanted):
		t.wanted = nil
		t.seen <- nil
		return
	case err != nil:
		t.seen <- fmt.Errorf("it ended before %q: %w", t.wanted, err)
		t.wanted = nil
		return
	}
	if len(p) >= len(t.wanted) {
		joint = p
	}
	t.tail = append(t.tail[:0], joint[max(0, len(joint)-len(t.wanted)):]...)
}

// read returns how many bytes were read so far.
func (t *terminal) read() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.total
}

// kept is how much of what was read see looks back at.
const kept = 4 << 10

// see waits for a text, which may just have come.
func (t *terminal) see(text string) error { return t.typeAndSee("", text) }

// ask enters a line and waits for a text.
func (t *terminal) ask(line, text string) error { return t.typeAndSee(line+"\r", text) }

func (t *terminal) typeAndSee(keys, text string) error {
	seen := make(chan error, 1)
	t.mu.Lock()
	if t.err != nil && !bytes.Contains(t.tail, []byte(text)) {
		t.mu.Unlock()
		return fmt.Errorf("it ended before %q: %w", text, t.err)
	}
	if keys == "" && bytes.Contains(t.tail, []byte(text)) {
		t.mu.Unlock()
		return nil
	}
	t.wanted, t.tail, t.seen = []byte(text), t.tail[:0], seen
	t.mu.Unlock()
	if keys != "" {
		if _, err := io.WriteString(t.w, keys); err != nil {
			return err
		}
	}
	select {
	case err := <-seen:
		return err
	case <-time.After(patience):
		return fmt.Errorf("no %q in %v", text, patience)
	}
}

// keys types n keys and notes how long the echo of each took, in ms. What starting a way costs is over by then.
func (t *terminal) keys(ctx context.Context, n int, to *lab.Series) error {
	if err := lab.Pause(ctx, time.Second); err != nil {
		return err
	}
	for i := range n {
		key := string(rune('a' + i%26))
		begun := time.Now()
		if err := t.typeAndSee(key, key); err != nil {
			return err
		}
		to.Add(lab.Milliseconds(time.Since(begun)))
		if err := lab.Pause(ctx, 3*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

func (t *terminal) close() {
	if t.end != nil {
		t.end()
	}
}

func closeAll(all []*terminal) {
	for _, t := range all {
		t.close()
	}
}
