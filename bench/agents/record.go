package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/google/uuid"
)

// record gathers what happens to all agents. Its methods may be called at the same time.
type record struct {
	mu      sync.Mutex
	calls   map[string][]time.Duration
	linked  int
	dials   []time.Time
	back    map[uuid.UUID]time.Time // when each agent arrived, since the server was killed
	away    bool                    // losing the link is expected: the server was killed
	serving bool                    // the server answers: failing to link is not expected
	lostNow int                     // links lost while the server was away
	errors  map[string]int
	changed chan struct{} // closed at each arrival
}

func newRecord() *record {
	return &record{calls: map[string][]time.Duration{}, errors: map[string]int{}, back: map[uuid.UUID]time.Time{}, serving: true, changed: make(chan struct{})}
}

func (r *record) took(what string, d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls[what] = append(r.calls[what], d)
}

func (r *record) dialled() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dials = append(r.dials, time.Now())
}

func (r *record) arrived(id uuid.UUID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.linked++
	if _, ok := r.back[id]; !ok {
		r.back[id] = time.Now()
	}
	close(r.changed)
	r.changed = make(chan struct{})
}

// lost notes the end of an attempt. Links end and dials fail when the server is killed; anything else is
// an error.
func (r *record) lost(linked bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case linked:
		r.linked--
		if r.away {
			r.lostNow++
			return
		}
	case !r.serving:
		return
	}
	r.errors[err.Error()]++
}

// killed begins an outage, and returned ends it.
func (r *record) killed() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.away, r.serving = true, false
	r.dials = nil
	clear(r.calls)
	clear(r.back)
}

func (r *record) returned() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.serving = true
}

// steady makes the loss of a link an error again.
func (r *record) steady() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.away = false
	clear(r.calls)
}

// links tells how many agents are linked, and when to ask again.
func (r *record) links() (int, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.linked, r.changed
}

// failures lists what went wrong, most frequent first.
func (r *record) failures() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var list []string
	for _, text := range slices.SortedFunc(maps.Keys(r.errors), func(a, b string) int { return r.errors[b] - r.errors[a] }) {
		list = append(list, fmt.Sprintf("%d times: %s", r.errors[text], text))
	}
	return list
}

// printCalls prints how long each kind of call took.
func (r *record) printCalls(out io.Writer, over time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "call\tcount\ta second\tp50 ms\tp99 ms\tmost ms\t")
	for _, name := range slices.Sorted(maps.Keys(r.calls)) {
		all := r.calls[name]
		slices.Sort(all)
		at := func(q float64) float64 { return ms(all[min(len(all)-1, int(q*float64(len(all))))]) }
		fmt.Fprintf(table, "%s\t%d\t%.1f\t%.1f\t%.1f\t%.1f\t\n", name, len(all), float64(len(all))/over.Seconds(), at(0.5), at(0.99), at(1))
	}
	table.Flush()
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// printArrivals draws when agents dialled and arrived, counted from the moment the server was back.
func (r *record) printArrivals(out io.Writer, since time.Time) {
	const bar = 50
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.back) == 0 {
		return
	}
	dials, arrivals := map[int]int{}, map[int]int{}
	last, most := 0, 1
	bin := func(t time.Time) int { return int(t.Sub(since) / (500 * time.Millisecond)) }
	for _, t := range r.dials {
		if t.After(since) {
			dials[bin(t)]++
		}
	}
	for _, t := range r.back {
		b := bin(t)
		arrivals[b]++
		last, most = max(last, b), max(most, arrivals[b])
	}
	fmt.Fprintln(out, "seconds after the server was back: dials, arrivals")
	for b := range last + 1 {
		fmt.Fprintf(out, "%5.1f %5d %5d %s\n", float64(b)/2, dials[b], arrivals[b], strings.Repeat("#", (arrivals[b]*bar+most-1)/most))
	}
}

// peak is the most events within any window of that length.
func peak(times []time.Time, window time.Duration) int {
	slices.SortFunc(times, time.Time.Compare)
	most, from := 0, 0
	for to := range times {
		for times[to].Sub(times[from]) > window {
			from++
		}
		most = max(most, to-from+1)
	}
	return most
}
