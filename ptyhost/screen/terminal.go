package screen

import (
	"strings"
	"unicode/utf8"
)

// Default bounds of the scrollback.
const (
	DefaultLines = 10_000
	DefaultBytes = 4 << 20
)

const (
	maxClusters = 1 << 16
	maxExtras   = 1 << 12 // links and underline colours alive on the screen at once
	maxCluster  = 64      // bytes of one character with its combining marks; longer ones lose the rest
	maxTitle    = 1 << 10
	maxTitles   = 10 // depth of the title stack (CSI 22 t); xterm has 10
)

// Config bounds a Terminal. Zero values mean the defaults.
type Config struct {
	Rows, Cols int // at least 1; 24x80 if zero
	Lines      int // lines of scrollback, negative for none
	Bytes      int // memory of the scrollback, approximately
}

// Terminal is the model of one terminal. It is not safe for concurrent use.
type Terminal struct {
	parser
	rows, cols int
	main, alt  *grid // alt is made when it is first used
	screen     *grid // one of the two
	history    scrollback
	cursor     cursor
	top, bot   int    // scroll region, inclusive
	tabs       []bool // nil means every eighth column
	last       rune   // last printed, for REP

	modes       modes
	cursorShape int // DECSCUSR, 0 default
	title       string
	titles      []string
	cwd         string // OSC 7, as sent
	palette     map[string]string
	keyboard    [2]keyboard // kitty keyboard flags of the main and the alternate screen
	keypad      bool

	clusters intern[string]
	extras   intern[extra]
	pristine bool // nothing was ever written

	// sawPalette and sawKeyboard are set once the program used these, so that snapshots for others need not reset them.
	sawPalette, sawKeyboard bool
}

// New returns an empty terminal.
func New(cfg Config) *Terminal {
	if cfg.Rows <= 0 || cfg.Cols <= 0 {
		cfg.Rows, cfg.Cols = 24, 80
	}
	if cfg.Lines == 0 {
		cfg.Lines = DefaultLines
	}
	if cfg.Bytes == 0 {
		cfg.Bytes = DefaultBytes
	}
	t := &Terminal{
		rows: cfg.Rows, cols: cfg.Cols,
		history:  scrollback{maxLines: max(0, cfg.Lines), maxBytes: cfg.Bytes},
		clusters: intern[string]{limit: maxClusters},
		extras:   intern[extra]{limit: maxExtras},
		pristine: true,
	}
	t.reset()
	return t
}

// Size returns the terminal's size.
func (t *Terminal) Size() (rows, cols int) { return t.rows, t.cols }

// Title returns what the program calls its window.
func (t *Terminal) Title() string { return t.title }

// Directory returns the directory that the program said it is in (OSC 7), as it said it: a file URL.
func (t *Terminal) Directory() string { return t.cwd }

// Lines returns how many lines ever went into the scrollback, so that a viewer's gap can be counted.
func (t *Terminal) Lines() uint64 { return t.history.total }

// reset is RIS: everything as at the start, scrollback included.
func (t *Terminal) reset() {
	t.main, t.alt = newGrid(t.rows, t.cols), nil
	t.screen = t.main
	t.main.saved = newCursor()
	t.history.clear()
	t.cursor = newCursor()
	t.tabs = nil
	t.title, t.titles, t.cwd, t.palette = "", nil, "", nil
	t.last = 0
	t.softReset()
	t.modes = defaultModes
}

// softReset is DECSTR.
func (t *Terminal) softReset() {
	t.top, t.bot = 0, t.rows-1
	t.cursor.pen = style{}
	t.cursor.charset, t.cursor.gl = newCursor().charset, 0
	t.cursor.origin = false
	t.cursorShape = 0
	t.keyboard = [2]keyboard{}
	t.keypad = false
	t.screen.saved = newCursor()
	for _, m := range []int{modeCursorKeys, modeInsert, modeVisible, modeAutowrap} {
		t.modes.set(m, defaultModes.is(m))
	}
}

func (t *Terminal) blank() cell { return cell{style: style{bg: t.cursor.pen.bg}} }

// wrap moves to the next line if the last column was written. wrapNext is never set while autowrap is off.
func (t *Terminal) wrap() {
	c := &t.cursor
	if !c.wrapNext {
		return
	}
	c.wrapNext = false
	t.screen.row(c.y).wrapped = true
	c.x = 0
	t.lineFeed()
}

// printASCII prints bytes from 0x20 to 0x7e.
func (t *Terminal) printASCII(p []byte) {
	c := &t.cursor
	t.last = rune(p[len(p)-1])
	if c.charset[c.gl] != 'B' || t.modes.is(modeInsert) {
		for _, b := range p {
			t.printRune(rune(b))
		}
		return
	}
	for len(p) > 0 {
		t.wrap()
		r := t.screen.row(c.y)
		n := min(len(p), t.cols-c.x)
		cells := r.cells[c.x : c.x+n : c.x+n]
		if cells[0].glyph&glyphTail != 0 {
			r.splitAt(c.x)
		}
		if end := c.x + n; end < t.cols && r.cells[end].glyph&glyphTail != 0 {
			r.splitAt(end)
		}
		pen := c.pen
		for i := range cells {
			cells[i] = cell{glyph(p[i]), pen}
		}
		p = p[n:]
		c.x += n
		r.touch(c.x)
		if c.x == t.cols {
			c.x--
			c.wrapNext = t.modes.is(modeAutowrap)
			r.wrapped = false
			if !c.wrapNext && len(p) > 1 {
				p = p[len(p)-1:] // all but the last are overwritten in the last column
			}
		}
	}
}

// lineDrawing maps 0x60 to 0x7e of the DEC special graphics set.
var lineDrawing = []rune("◆▒␉␌␍␊°±␤␋┘┐┌└┼⎺⎻─⎼⎽├┤┴┬│≤≥π≠£·")

func (t *Terminal) printRune(r rune) {
	c := &t.cursor
	switch c.charset[c.gl] {
	case '0':
		if r >= 0x60 && r < 0x7f {
			r = lineDrawing[r-0x60]
		}
	case 'A':
		if r == '#' {
			r = '£'
		}
	}
	width := 1
	switch {
	case r >= 0x80 && r < 0xa0:
		return // 8-bit controls are not interpreted: in UTF-8 no program means them
	case r >= 0xa0:
		width = runeWidth(r)
	}
	if width == 0 {
		t.combine(r)
		return
	}
	t.last = r
	if width > t.cols {
		return
	}
	t.wrap()
	if c.x+width > t.cols { // a wide character in the last column
		if !t.modes.is(modeAutowrap) {
			return
		}
		c.wrapNext = true
		t.screen.row(c.y).erase(c.x, t.cols, cell{})
		t.wrap()
	}
	row := t.screen.row(c.y)
	if t.modes.is(modeInsert) {
		t.insertCells(width)
	}
	row.splitAt(c.x)
	row.splitAt(c.x + width)
	row.cells[c.x] = cell{glyph(r), c.pen}
	if width == 2 {
		row.cells[c.x].glyph |= glyphWide
		row.cells[c.x+1] = cell{glyphTail, c.pen}
	}
	c.x += width
	row.touch(c.x)
	if c.x == t.cols {
		c.x--
		c.wrapNext = t.modes.is(modeAutowrap)
		row.wrapped = false
	}
}

// combine adds a zero-width rune to the character before the cursor.
func (t *Terminal) combine(r rune) {
	c := &t.cursor
	x := c.x
	if !c.wrapNext {
		x--
	}
	row := t.screen.row(c.y)
	if x > 0 && row.cells[x].glyph&glyphTail != 0 {
		x--
	}
	if x < 0 || row.cells[x].glyph == 0 {
		return
	}
	g := &row.cells[x].glyph
	text := t.text(*g) + string(r)
	if len(text) > maxCluster {
		return
	}
	if n := t.clusters.add(strings.Clone(text), t.usedClusters); n != 0 {
		*g = glyph(n) | glyphCluster | *g&glyphWide
	}
}

func (t *Terminal) text(g glyph) string {
	switch {
	case g&glyphCluster != 0:
		return t.clusters.at(int(g & glyphMask))
	case g&glyphMask == 0:
		return ""
	}
	return string(utf8.AppendRune(nil, rune(g&glyphMask)))
}

func (t *Terminal) eachCell(f func(*cell)) {
	for _, g := range []*grid{t.main, t.alt} {
		if g == nil {
			continue
		}
		for y := range g.rows {
			for x := range g.rows[y].used {
				f(&g.rows[y].cells[x])
			}
		}
	}
}

func (t *Terminal) usedClusters(used func(int)) {
	t.eachCell(func(c *cell) {
		if c.glyph&glyphCluster != 0 {
			used(int(c.glyph & glyphMask))
		}
	})
}

func (t *Terminal) usedExtras(used func(int)) {
	t.eachCell(func(c *cell) { used(int(c.extra)) })
	for _, g := range []*grid{t.main, t.alt} {
		if g != nil {
			used(int(g.saved.pen.extra))
		}
	}
	used(int(t.cursor.pen.extra))
}

func (t *Terminal) control(b byte) {
	c := &t.cursor
	switch b {
	case '\b':
		c.x = max(0, c.x-1)
		c.wrapNext = false
	case '\t':
		t.tab(1)
	case '\n', '\v', '\f':
		t.lineFeed()
		if t.modes.is(modeNewline) {
			c.x = 0
		}
		c.wrapNext = false
	case '\r':
		c.x = 0
		c.wrapNext = false
	case 0x0e:
		c.gl = 1
	case 0x0f:
		c.gl = 0
	}
}

// lineFeed moves down, scrolling at the bottom of the region.
func (t *Terminal) lineFeed() {
	c := &t.cursor
	switch {
	case c.y == t.bot:
		t.scrollUp(1)
	case c.y < t.rows-1:
		c.y++
	}
}

func (t *Terminal) reverseLineFeed() {
	c := &t.cursor
	switch {
	case c.y == t.top:
		t.screen.shift(t.top, t.bot, -1, t.blank())
	case c.y > 0:
		c.y--
	}
}

// scrollUp scrolls the region, keeping what leaves the top of the main screen.
func (t *Terminal) scrollUp(n int) {
	n = min(n, t.bot-t.top+1)
	if t.screen == t.main && t.top == 0 {
		for y := range n {
			t.keep(t.main.row(y))
		}
	}
	t.screen.shift(t.top, t.bot, n, t.blank())
}

// keep moves a row into the scrollback.
func (t *Terminal) keep(r *row) {
	t.history.push(r.content(), r.wrapped, func(b []byte) []byte { return t.appendLine(b, r) })
}

func (t *Terminal) isTab(x int) bool {
	if t.tabs == nil {
		return x%8 == 0
	}
	return x < len(t.tabs) && t.tabs[x]
}

func (t *Terminal) setTab(x int, on bool) {
	if t.tabs == nil {
		t.tabs = make([]bool, t.cols)
		for i := range t.tabs {
			t.tabs[i] = i%8 == 0
		}
	}
	t.tabs[x] = on
}

func (t *Terminal) tab(n int) {
	c := &t.cursor
	c.wrapNext = false
	for ; n > 0 && c.x < t.cols-1; n-- {
		for c.x++; c.x < t.cols-1 && !t.isTab(c.x); c.x++ {
		}
	}
}

func (t *Terminal) backTab(n int) {
	c := &t.cursor
	c.wrapNext = false
	for ; n > 0 && c.x > 0; n-- {
		for c.x--; c.x > 0 && !t.isTab(c.x); c.x-- {
		}
	}
}

// insertCells makes room for n blanks at the cursor.
func (t *Terminal) insertCells(n int) {
	c := &t.cursor
	r := t.screen.row(c.y)
	n = min(n, t.cols-c.x)
	r.splitAt(c.x)
	r.splitAt(t.cols - n)
	copy(r.cells[c.x+n:], r.cells[c.x:])
	r.used = min(t.cols, max(r.used, c.x)+n)
	r.wrapped = false
	for i := c.x; i < c.x+n; i++ {
		r.cells[i] = t.blank()
	}
}

// deleteCells removes n cells at the cursor and moves the rest of the line left.
func (t *Terminal) deleteCells(n int) {
	c := &t.cursor
	r := t.screen.row(c.y)
	n = min(n, t.cols-c.x)
	r.splitAt(c.x)
	r.splitAt(c.x + n)
	copy(r.cells[c.x:], r.cells[c.x+n:])
	r.touch(min(t.cols, r.used))
	r.erase(t.cols-n, t.cols, t.blank())
	r.wrapped = false
}
