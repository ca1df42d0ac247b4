package screen

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/berthd/berth/internal/judge"
)

// What the oracle tests compare, and when. A cut is a random offset in a stream; a viewer attaches there. It is compared at once and again when
// it has had the output that follows, up to rest bytes of it.
const (
	rest      = 64 << 10
	kept      = 1000      // lines of scrollback that the model and the judges keep
	resizable = 256 << 10 // a viewer with another size attaches before this: each such cut needs a judge that saw everything before
)

// cutsPerStream is how many viewers attach to each stream: 1,000 with BERTH_LONG.
func cutsPerStream(short int) int {
	if os.Getenv("BERTH_LONG") != "" {
		return 1000
	}
	return short
}

// trial is one stream before one kind of judge.
type trial struct {
	name   string
	stream string
	widths judge.Widths
}

func newTrial(name, stream string) trial {
	if name == "graphemes" {
		return trial{name, stream, judge.Graphemes}
	}
	return trial{name, stream, judge.Unicode11}
}

func (tr trial) options(rows, cols int) judge.Options {
	return judge.Options{Rows: rows, Cols: cols, Scrollback: kept, Widths: tr.widths}
}

// after is the output that follows a cut.
func (tr trial) after(cut int) []byte { return []byte(tr.stream[cut:min(cut+rest, len(tr.stream))]) }

// context shows where a cut is.
func (tr trial) context(cut int) string {
	return fmt.Sprintf("%s, cut at %d after %q", tr.name, cut, tr.stream[max(0, cut-30):cut])
}

func randomCuts(n, length int) []int {
	rng := rand.New(rand.NewPCG(uint64(n), uint64(length)))
	cuts := make([]int, n)
	for i := range cuts {
		cuts[i] = rng.IntN(length + 1)
	}
	slices.Sort(cuts)
	return cuts
}

// windows are sizes people come back with.
var windows = [][2]int{{24, 100}, {30, 80}, {50, 132}, {24, 79}, {24, 81}, {10, 40}, {40, 120}, {12, 80}, {5, 20}, {60, 200}, {20, 60}}

// tally counts how often a late terminal was the same as one that saw everything.
type tally struct {
	cuts, same int
	differs    []string // explanations of the first few that were not the same
}

func (c *tally) add(same bool, explain func() string) {
	c.cuts++
	if same {
		c.same++
	} else if len(c.differs) < 2 {
		c.differs = append(c.differs, explain())
	}
}

func (c *tally) String() string { return fmt.Sprintf("%d/%d", c.same, c.cuts) }

func diff(a, b string) string { return cmp.Diff(strings.Split(a, "\n"), strings.Split(b, "\n")) }

// sameSize compares viewers that attach at the terminal's own size. One judge sees everything; its state at the moments of interest is noted.
func (tr trial) sameSize(j *judge.Judge, n int) (at, later tally) {
	type comparison struct {
		cut                                  int
		stayed, late, stayedAfter, lateAfter func() judge.State
	}
	type moment struct {
		offset int
		c      *comparison
		after  bool
	}
	var moments []moment
	for _, cut := range randomCuts(n, len(tr.stream)) {
		c := &comparison{cut: cut}
		moments = append(moments, moment{cut, c, false}, moment{cut + len(tr.after(cut)), c, true})
	}
	slices.SortStableFunc(moments, func(a, b moment) int { return a.offset - b.offset })
	stayed, model := j.New(tr.options(24, 80)), New(Config{Lines: kept})
	offset := 0
	for _, m := range moments {
		next := []byte(tr.stream[offset:m.offset])
		offset = m.offset
		stayed.Write(next)
		model.Write(next)
		if m.after {
			m.c.stayedAfter = stayed.State()
			continue
		}
		m.c.stayed = stayed.State()
		late := j.New(tr.options(24, 80))
		late.Write(model.Snapshot(View{}))
		m.c.late = late.State()
		late.Write(tr.after(m.offset))
		m.c.lateAfter = late.State()
		late.Close()
	}
	stayed.Close()
	for _, m := range moments {
		if !m.after {
			explain := func() string { return tr.explain(j, m.c.cut, 24, 80, false) }
			at.add(m.c.stayed() == m.c.late(), explain)
			later.add(m.c.stayedAfter() == m.c.lateAfter(), explain)
		}
	}
	return at, later
}

// otherSize compares viewers who attach with a window of another size, and so change the terminal's before they see it. Where xterm.js treats the
// cursor in a way of its own only cells are compared, and only at once.
func (tr trial) otherSize(j *judge.Judge, n int) (at, later, cells tally) {
	var compare []func()
	for i, cut := range randomCuts(n, min(len(tr.stream), resizable)) {
		rows, cols := windows[i%len(windows)][0], windows[i%len(windows)][1]
		before, after := []byte(tr.stream[:cut]), tr.after(cut)
		model := New(Config{Lines: kept})
		model.Write(before)
		own, reflow := model.ownWay(cols)
		model.Resize(rows, cols)
		o := tr.options(24, 80)
		o.ReflowCursorLine = reflow
		stayed, late := j.New(o), j.New(tr.options(rows, cols))
		stayed.Write(before)
		stayed.Resize(rows, cols)
		late.Write(model.Snapshot(View{}))
		stayedAt, lateAt := stayed.State(), late.State()
		stayed.Write(after)
		late.Write(after)
		stayedAfter, lateAfter := stayed.State(), late.State()
		stayed.Close()
		late.Close()
		explain := func() string { return tr.explain(j, cut, rows, cols, reflow) }
		compare = append(compare, func() {
			a, b, c, d := stayedAt(), lateAt(), stayedAfter(), lateAfter()
			if own {
				cells.add(a.Cells == b.Cells && a.Scrollback == b.Scrollback, explain)
				return
			}
			at.add(a == b, explain)
			later.add(c == d, explain)
		})
	}
	for _, f := range compare {
		f()
	}
	return at, later, cells
}

// ownWay tells whether xterm.js has a way of its own with the cursor in a resize to cols columns. It forgets that the next character wraps; it takes
// the cursor off its text if lines below it are wrapped anew; and the line that the cursor is on, or that comes to be where it was when those above
// are wrapped anew, it leaves as it is wrapped, and so cuts off what has no room. reflow asks for a judge that does not, which still leaves the cursor's column.
func (t *Terminal) ownWay(cols int) (own, reflow bool) {
	c := &t.cursor
	if t.alt != nil {
		c = &t.main.saved
	}
	r := t.main.row(c.y)
	reflow = cols != t.cols && (r.cont || r.used > cols || c.x >= cols)
	for y := c.y + 1; y < t.rows && cols != t.cols; y++ {
		reflow = reflow || t.main.row(y).cont || t.main.row(y).used > cols
	}
	return reflow || t.cursor.wrapNext && cols <= t.cols, reflow
}

// explain shows how a late viewer's terminal differs.
func (tr trial) explain(j *judge.Judge, cut, rows, cols int, reflow bool) string {
	before := []byte(tr.stream[:cut])
	model := New(Config{Lines: kept})
	model.Write(before)
	model.Resize(rows, cols)
	o := tr.options(24, 80)
	o.ReflowCursorLine = reflow
	stayed, late := j.New(o), j.New(tr.options(rows, cols))
	stayed.Write(before)
	stayed.Resize(rows, cols)
	late.Write(model.Snapshot(View{}))
	at := diff(stayed.Dump()(), late.Dump()())
	stayed.Write(tr.after(cut))
	late.Write(tr.after(cut))
	return fmt.Sprintf("%s, %dx%d, at once (-stayed +late):\n%s\nand after the output that follows:\n%s",
		tr.context(cut), rows, cols, at, diff(stayed.Dump()(), late.Dump()()))
}

// windowed compares viewers who join others, so that the terminal keeps its size: a window shows the part of the screen that fits around the
// cursor, and has the scrollback's lines wrapped to its own width.
func (tr trial) windowed(j *judge.Judge, n int) (cells, lines tally) {
	stayed, model := j.New(tr.options(24, 80)), New(Config{Lines: kept})
	var compare []func()
	offset := 0
	for i, cut := range randomCuts(n, len(tr.stream)) {
		rows, cols := windows[i%len(windows)][0], windows[i%len(windows)][1]
		next := []byte(tr.stream[offset:cut])
		offset = cut
		stayed.Write(next)
		model.Write(next)
		o := tr.options(rows, cols)
		o.Scrollback = 20 * kept // narrow windows need more rows for the same lines
		viewer := j.New(o)
		viewer.Write(model.Snapshot(View{Rows: rows, Cols: cols}))
		top := max(0, model.cursor.y-rows+1)
		stayedPart, part := stayed.Part(top, min(24, rows), cols), viewer.Part(0, rows, cols)
		stayedLines, seen := stayed.Lines(), viewer.Lines()
		viewer.Close()
		compare = append(compare, func() {
			text, cursor, _ := strings.Cut(stayedPart(), "cursor")
			want, got := text+strings.Repeat("\n", max(0, rows-24))+"cursor"+cursor, part()
			where := fmt.Sprintf("%s, window of %dx%d (-terminal +window):\n", tr.context(cut), rows, cols)
			cells.add(want == got, func() string { return where + diff(want, got) })
			all, have := stayedLines(), seen()
			lines.add(strings.HasPrefix(have, strings.TrimSuffix(all, "\n")), func() string { return where + diff(all, have) })
		})
	}
	for _, f := range compare {
		f()
	}
	stayed.Close()
	return cells, lines
}

// check runs all comparisons on a stream and returns its line of the table.
func (tr trial) check(t *testing.T, j *judge.Judge, n int) string {
	at, later := tr.sameSize(j, n)
	otherAt, otherLater, otherCells := tr.otherSize(j, n)
	cells, lines := tr.windowed(j, n)
	row := fmt.Sprintf("%-10s %8d", tr.name, len(tr.stream))
	for _, c := range []*tally{&at, &later, &otherAt, &otherLater, &otherCells, &cells, &lines} {
		for _, d := range c.differs {
			t.Error(d)
		}
		row += fmt.Sprintf(" %10s", c)
	}
	return row + "\n"
}

const heading = "                    |   same size         |   another size: also in the  | window of another size\n" +
	"stream        bytes |  at once      later |  at once      later    cells |    cells  scrollback\n"

// oracle checks streams as subtests and prints the table.
func oracle(t *testing.T, n int, trials ...trial) {
	j := judge.Start(t)
	table := heading
	for _, tr := range trials {
		t.Run(tr.name, func(t *testing.T) { table += tr.check(t, j, n) })
	}
	t.Logf("\n%s", table)
}

// TestOracleRecorded lets xterm.js compare terminals that attach late to recorded streams with one that saw everything.
func TestOracleRecorded(t *testing.T) {
	named := recorded(t)
	var trials []trial
	for _, s := range scenarios() {
		trials = append(trials, newTrial(s.name, named[s.name]))
	}
	oracle(t, cutsPerStream(20), append(trials, newTrial("seq", sequence(200_000)))...)
}

// TestOracleLive does the same with what the programs that are installed here print now.
func TestOracleLive(t *testing.T) {
	all := scenarios()
	trials := make([]trial, len(all))
	var wg sync.WaitGroup
	for i, s := range all {
		wg.Go(func() { trials[i] = newTrial(s.name, string(s.run(t))) })
	}
	wg.Wait()
	oracle(t, cutsPerStream(5), trials...)
}
