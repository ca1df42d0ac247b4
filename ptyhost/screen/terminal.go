package screen

import "unicode/utf8"

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
	last       rune   // printed just before, for REP and to combine with; 0 if anything else came after

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

// wrap moves to the next line if the last column was written, unless autowrap is off.
func (t *Terminal) wrap() {
	c := &t.cursor
	if !c.wrapNext {
		return
	}
	c.wrapNext = false
	if !t.modes.is(modeAutowrap) {
		return
	}
	c.x = 0
	switch {
	case c.y == t.bot:
		t.scrollUp(1, true)
	case c.y < t.rows-1:
		c.y++
	}
	t.screen.row(c.y).cont = true
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
			r.splitAt(c.x, cell{style: c.pen})
		}
		if end := c.x + n; end < t.cols && r.cells[end].glyph&glyphTail != 0 {
			r.splitAt(end, cell{style: c.pen})
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
			c.wrapNext = true
			if len(p) > 1 && !t.modes.is(modeAutowrap) {
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
		if t.modes.is(modeGraphemes) && t.last != 0 && t.join(r) {
			return
		}
		width = runeWidth(r)
	}
	if width == 0 {
		t.combine(r)
		return
	}
	if width > t.cols {
		return
	}
	t.wrap()
	if c.x+width > t.cols { // a wide character in the last column
		if !t.modes.is(modeAutowrap) {
			t.last = 0
			return
		}
		c.wrapNext = true
		t.screen.row(c.y).erase(c.x, t.cols, cell{style: c.pen})
		t.wrap()
	}
	t.last = r
	row := t.screen.row(c.y)
	if t.modes.is(modeInsert) {
		t.insertCells(width)
	}
	row.splitAt(c.x, cell{style: c.pen})
	row.splitAt(c.x+width, cell{style: c.pen})
	row.cells[c.x] = cell{glyph(r), c.pen}
	if width == 2 {
		row.cells[c.x].glyph |= glyphWide
		row.cells[c.x+1] = cell{glyphTail, c.pen}
	}
	c.x += width
	row.touch(c.x)
	if c.x == t.cols {
		c.x--
		c.wrapNext = true
	}
}

// before returns the column of the character before the cursor, or -1.
func (t *Terminal) before() int {
	c := &t.cursor
	x := c.x
	if !c.wrapNext {
		x--
	}
	cells := t.screen.row(c.y).cells
	if x > 0 && cells[x].glyph&glyphTail != 0 {
		x--
	}
	return x
}

// combine adds a zero-width rune to the character before the cursor.
func (t *Terminal) combine(r rune) {
	if x := t.before(); x >= 0 {
		t.extend(t.screen.row(t.cursor.y), x, r)
	}
}

// extend adds r to what is in column x. In insert mode no more can follow: a snapshot could not print such a character without moving others.
func (t *Terminal) extend(row *row, x int, r rune) {
	if t.modes.is(modeInsert) {
		t.last = 0
	}
	g := &row.cells[x].glyph
	text := t.printed(*g) + string(r)
	if len(text) > maxCluster {
		return
	}
	if n := t.clusters.add(text, t.usedClusters); n != 0 {
		*g = glyph(n) | glyphCluster | *g&glyphWide
		row.touch(x + 1)
	}
}

// join adds r to the character before the cursor if both are one grapheme cluster, and reports whether they are. The cluster is as wide as its
// widest part; flags, and what is to be drawn as a picture, have two columns.
func (t *Terminal) join(r rune) bool {
	c := &t.cursor
	x := t.before()
	if x < 0 {
		return false
	}
	row := t.screen.row(c.y)
	g := &row.cells[x].glyph
	if !joins(t.printed(*g), r) {
		return false
	}
	flag := r >= 0x1f1e6 && r <= 0x1f1ff
	widens := *g&glyphWide == 0 && (runeWidth(r) == 2 || r == emojiStyle || flag)
	if widens && x+2 > t.cols && (!t.modes.is(modeAutowrap) || t.cols < 2) {
		return true // there is no room for it
	}
	t.extend(row, x, r)
	if !widens {
		return true
	}
	grown := row.cells[x]
	grown.glyph |= glyphWide
	if x+2 > t.cols { // it moves to the next line
		row.cells[x] = cell{style: c.pen}
		c.wrapNext = true
		t.wrap()
		row, x = t.screen.row(c.y), 0
	}
	row.splitAt(x, cell{style: c.pen})
	row.splitAt(x+2, cell{style: c.pen})
	row.cells[x], row.cells[x+1] = grown, cell{glyphTail, grown.style}
	c.x = x + 2
	row.touch(c.x)
	if c.x == t.cols {
		c.x--
		c.wrapNext = true
	}
	return true
}

// printed is what a terminal has to print for a cell to look as it does: a space for one that was never written to.
func (t *Terminal) printed(g glyph) string {
	if text := t.text(g); text != "" {
		return text
	}
	return " "
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
		y := c.y
		t.lineFeed()
		if c.y != y { // what is below is a line of its own from now on
			t.screen.row(c.y).cont = false
		}
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
		t.scrollUp(1, false)
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

// scrollUp scrolls the region, keeping what leaves the top of the main screen. cont tells whether what will be written into the row that comes
// in continues the one above.
func (t *Terminal) scrollUp(n int, cont bool) {
	n = min(n, t.bot-t.top+1)
	if t.screen == t.main && t.top == 0 {
		r := t.main.row(0)
		for y := range n {
			next := &row{cont: cont}
			if y+1 < t.rows {
				next = t.main.row(y + 1)
			}
			t.keep(r, next)
			r = next
		}
	}
	t.screen.shift(t.top, t.bot, n, t.blank())
}

// keep moves a row into the scrollback; next is the one below it.
func (t *Terminal) keep(r, next *row) {
	if !r.cont {
		t.history.endLine()
	}
	b := t.history.open()
	e := encoder{t: t, buf: b.data}
	end := r.content(next)
	e.cells(r, 0, end)
	e.setPen(style{})
	b.data = e.buf
	var flags lineFlags
	if next.cont {
		flags |= lineWrapped
		if end < len(r.cells) {
			flags |= lineTrimmed
		}
	}
	if e.colored {
		flags |= lineColored
	}
	if r.cells[0].glyph&glyphWide != 0 {
		flags |= lineWide
	}
	t.history.close(b, lineEnd{cols: uint16(end), flags: flags})
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

// tab moves to the nth tab stop. In the last column it does nothing: what is printed next still wraps.
func (t *Terminal) tab(n int) {
	c := &t.cursor
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
	r.splitAt(c.x, t.blank())
	r.splitAt(t.cols-n, t.blank())
	copy(r.cells[c.x+n:], r.cells[c.x:])
	r.used = min(t.cols, max(r.used, c.x)+n)
	for i := c.x; i < c.x+n; i++ {
		r.cells[i] = t.blank()
	}
}

// deleteCells removes n cells at the cursor and moves the rest of the line left.
func (t *Terminal) deleteCells(n int) {
	c := &t.cursor
	r := t.screen.row(c.y)
	n = min(n, t.cols-c.x)
	r.splitAt(c.x, t.blank())
	r.splitAt(c.x+n, t.blank())
	copy(r.cells[c.x:], r.cells[c.x+n:])
	blank := t.blank()
	for i := t.cols - n; i < t.cols; i++ {
		r.cells[i] = blank
	}
	if blank != (cell{}) {
		r.used = t.cols
	} else if r.used > c.x {
		r.used = max(c.x, r.used-n)
	}
}
