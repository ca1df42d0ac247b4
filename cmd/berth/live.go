package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"reflect"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/wire"
)

// api returns the agent's own HTTP API.
func (m *mesh) api() *client.AgentAPI {
	return client.NewAgentAPI(m.agent.ID, func(ctx context.Context) (net.Conn, error) { return m.dial(ctx, wire.PortHTTP) })
}

// follow hands each value of a watch to got until ctx is done, got fails or the agent refuses. A watch
// that breaks is begun again; lost is called once, until the next value.
func follow[T any](ctx context.Context, watch func(context.Context) iter.Seq2[T, error], got func(T) error, lost func()) error {
	wait, away := minRedial, false
	for {
		var broke error
		for value, err := range watch(ctx) {
			if broke = err; err != nil {
				break
			}
			wait, away = minRedial, false
			if err := got(value); err != nil {
				return err
			}
		}
		var answer *wire.Error
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.As(broke, &answer) && answer.StatusCode < 500:
			return broke
		case !away:
			lost()
		}
		away = true
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		wait = min(2*wait, maxRedial)
	}
}

// snapshot is what a workspace has of one kind at one time.
type snapshot[T any] struct {
	items    []T
	warnings []string
}

// listing is how things of one kind are shown as they change.
type listing[T any] struct {
	program *program
	agent   string                      // its name
	source  string                      // who tells of them, if it is not the agent
	what    string                      // "ports"
	key     func(T) string              // tells one thing from another
	table   func([]T, time.Time) *table // shows them
}

// from names who tells of them.
func (l *listing[T]) from() string { return clean(cmp.Or(l.source, l.agent)) }

// watch shows what the agent has of a kind until ctx is done: in place on a terminal, else a line for
// each change.
func (l *listing[T]) watch(ctx context.Context, all func(context.Context) iter.Seq2[snapshot[T], error], output format) error {
	var err error
	if output == formatText && term.IsTerminal(int(l.program.out.Fd())) {
		view := l.open(ctx)
		err = follow(ctx, all, view.show, view.lose)
		view.close()
	} else {
		view := &lineView[T]{listing: l, output: output, had: map[string]T{}, warned: map[string]bool{}}
		err = follow(ctx, all, view.show, view.lose)
	}
	if err != nil {
		return fmt.Errorf("cannot watch the %s of %s: %w", l.what, l.agent, err)
	}
	return nil
}

// watchAgent reaches the agent of a name and shows in l what it tells by watch, as taken by take, until it is interrupted.
func watchAgent[T, A any](ctx context.Context, l *listing[T], name string, wait time.Duration, output format,
	watch func(context.Context, *client.AgentAPI) iter.Seq2[A, error], take func(A) snapshot[T]) error {
	ctx, stop := untilInterrupt(ctx)
	defer stop()
	m, err := l.program.reach(ctx, name, wait)
	if err != nil {
		return err
	}
	defer m.Close()
	api := m.api()
	defer api.Close()
	l.agent = m.agent.Name
	return l.watch(ctx, func(ctx context.Context) iter.Seq2[snapshot[T], error] {
		return func(yield func(snapshot[T], error) bool) {
			for found, err := range watch(ctx, api) {
				if !yield(take(found), err) {
					return
				}
			}
		}
	}, output)
}

// Changes, as `--watch --output json` names them.
const (
	changeAdded   = "added"
	changeChanged = "changed"
	changeRemoved = "removed"
)

// changed is one line of `--watch --output json`.
type changed[T any] struct {
	At     time.Time `json:"at"`
	Change string    `json:"change"`
	Item   T         `json:"item"`
}

// lineView prints a line for each change.
type lineView[T any] struct {
	*listing[T]
	output format
	order  []string // of the keys, as they were listed last
	had    map[string]T
	warned map[string]bool
	away   bool
}

func (v *lineView[T]) lose() {
	v.away = true
	fmt.Fprintf(v.program.errOut, "berth: lost the connection to %s; trying again\n", v.from())
}

func (v *lineView[T]) show(s snapshot[T]) error {
	if v.away {
		v.away = false
		fmt.Fprintf(v.program.errOut, "berth: %s is back\n", v.from())
	}
	warned := map[string]bool{}
	for _, w := range s.warnings {
		if warned[w] = true; !v.warned[w] {
			fmt.Fprintln(v.program.errOut, "berth: note:", clean(w))
		}
	}
	v.warned = warned
	now, has := time.Now(), map[string]T{}
	var order []string
	for _, item := range s.items {
		key := v.key(item)
		if _, twice := has[key]; twice {
			continue
		}
		has[key] = item
		order = append(order, key)
	}
	for _, key := range v.order {
		if _, ok := has[key]; !ok {
			if err := v.print(now, changeRemoved, v.had[key]); err != nil {
				return err
			}
		}
	}
	for _, key := range order {
		before, ok := v.had[key]
		change := changeAdded
		if ok {
			if reflect.DeepEqual(before, has[key]) {
				continue
			}
			change = changeChanged
		}
		if err := v.print(now, change, has[key]); err != nil {
			return err
		}
	}
	v.had, v.order = has, order
	return nil
}

// signs are what changes look like in text.
var signs = map[string]string{changeAdded: "+", changeChanged: "~", changeRemoved: "-"}

func (v *lineView[T]) print(now time.Time, change string, item T) error {
	if v.output == formatJSON {
		return printJSONLine(v.program.out, changed[T]{now, change, item})
	}
	cells := v.table([]T{item}, now).rows[0]
	_, err := fmt.Fprintf(v.program.out, "%s %s %s\n", now.Format(time.TimeOnly), signs[change], strings.Join(cells, "  "))
	return err
}

// redrawEvery is how often a list on a terminal is drawn anew: ages grow, and windows change their size.
const redrawEvery = time.Second

// screenView shows a list in place, on a screen of its own.
type screenView[T any] struct {
	*listing[T]
	done chan struct{}
	work sync.WaitGroup

	mu   sync.Mutex
	last *snapshot[T] // nil before the first
	away time.Time    // since when the agent is lost; zero while it is not
}

// What begins and ends a screen of its own: without a cursor, and without wrapping lines.
const (
	beginScreen = "\x1b[?1049h\x1b[?25l\x1b[?7l"
	endScreen   = "\x1b[?7h\x1b[?25h\x1b[?1049l"
)

func (l *listing[T]) open(ctx context.Context) *screenView[T] {
	v := &screenView[T]{listing: l, done: make(chan struct{})}
	io.WriteString(l.program.out, beginScreen)
	v.work.Go(func() {
		tick := time.NewTicker(redrawEvery)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-v.done:
				return
			case <-tick.C:
				v.draw()
			}
		}
	})
	return v
}

// close leaves the screen, and what it showed last on the one before.
func (v *screenView[T]) close() {
	close(v.done)
	v.work.Wait()
	io.WriteString(v.program.out, endScreen)
	if v.last != nil {
		v.table(v.last.items, time.Now()).print(v.program.out, v.program.width())
	}
}

func (v *screenView[T]) lose() {
	v.mu.Lock()
	v.away = time.Now()
	v.mu.Unlock()
	v.draw()
}

func (v *screenView[T]) show(s snapshot[T]) error {
	v.mu.Lock()
	v.last, v.away = &s, time.Time{}
	v.mu.Unlock()
	v.draw()
	return nil
}

func (v *screenView[T]) draw() {
	cols, rows, err := term.GetSize(int(v.program.out.Fd()))
	if err != nil || rows <= 0 {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	var b strings.Builder
	b.WriteString("\x1b[H")
	for i, line := range v.lines(time.Now(), cols, rows) {
		if i > 0 {
			b.WriteString("\r\n")
		}
		b.WriteString(line)
		b.WriteString("\x1b[K")
	}
	b.WriteString("\x1b[J")
	io.WriteString(v.program.out, b.String())
}

// lines is what a screen of a size shows: a title, the table as far as there is room, and warnings.
func (v *screenView[T]) lines(now time.Time, cols, rows int) []string {
	name := clean(v.agent)
	switch {
	case v.last == nil && v.away.IsZero():
		return []string{fmt.Sprintf("waiting for the %s of %s…", v.what, name)}
	case v.last == nil:
		return []string{fmt.Sprintf("lost %s %s; trying again…", v.from(), ago(now, v.away))}
	}
	title := fmt.Sprintf("%s of %s: %d   (%s, Ctrl-C ends)", v.what, name, len(v.last.items), now.Format(time.TimeOnly))
	if !v.away.IsZero() {
		title = fmt.Sprintf("%s of %s: %d   (lost %s %s; trying again…)", v.what, name, len(v.last.items), v.from(), ago(now, v.away))
	}
	lines := []string{title, ""}
	t := v.table(v.last.items, now)
	var b strings.Builder
	t.print(&b, cols)
	body := strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
	var notes []string
	for _, w := range v.last.warnings {
		notes = append(notes, "note: "+clean(w))
	}
	room := max(rows-len(lines)-len(notes), 2)
	if len(body) > room {
		hidden := len(body) - room + 1
		body = append(body[:room-1], fmt.Sprintf("… and %d more", hidden))
	}
	lines = append(append(lines, body...), notes...)
	return lines[:min(len(lines), rows)]
}
