package screen

// glyph is what a cell shows: a rune, or the number of an interned cluster, plus flags. Zero is a cell that was never written or was erased.
type glyph uint32

const (
	glyphMask    glyph = 1<<21 - 1
	glyphWide    glyph = 1 << 21 // the left half of a wide character
	glyphTail    glyph = 1 << 22 // the right half; the rune is in the cell before
	glyphCluster glyph = 1 << 23 // the low bits number a string in Terminal.clusters
)

// color is 0 for the default, colorBasic|n for one of the sixteen that SGR names, colorIndexed|n for the palette, colorRGB|0xRRGGBB for a direct
// colour. The first sixteen of the palette are the same colours, but some terminals brighten only basic ones when text is bold.
type color uint32

const (
	colorBasic   color = 1 << 24
	colorIndexed color = 2 << 24
	colorRGB     color = 3 << 24
	colorKind    color = 0xff << 24
)

type attr uint16

const (
	attrBold attr = 1 << iota
	attrFaint
	attrItalic
	attrBlink
	attrInverse
	attrHidden
	attrStrike
	attrOverline
	attrUnderline          // lowest bit of a 3-bit style, 0 none to 5 dashed
	attrUnderlineMask attr = 7 << 8
)

// style is how a cell is drawn. The zero style is the terminal's default.
type style struct {
	fg, bg color
	attr   attr
	extra  uint16 // index into Terminal.extras, 0 for none
}

// cell is 16 bytes, so that two 200x50 screens stay under 320 KiB.
type cell struct {
	glyph glyph
	style
}

// extra is the rare part of a style, kept outside the cell.
type extra struct {
	underline color
	link      string // "params;uri" of OSC 8
}

// row is one line of the screen. Cells from used on are zero, so clearing and encoding touch only what was written.
type row struct {
	cells []cell
	used  int
	cont  bool // the text continues that of the row above
}

func (r *row) touch(end int) {
	if end > r.used {
		r.used = end
	}
}

// erase blanks columns [from, to) in the given style.
func (r *row) erase(from, to int, blank cell) {
	to = min(to, len(r.cells))
	if from >= to {
		return
	}
	r.splitAt(from, blank)
	r.splitAt(to, blank)
	if to == len(r.cells) && blank == (cell{}) {
		if from < r.used {
			clear(r.cells[from:r.used])
			r.used = from
		}
		return
	}
	for i := from; i < to; i++ {
		r.cells[i] = blank
	}
	r.touch(to)
}

// splitAt blanks both halves of a wide character that column x would cut in two.
func (r *row) splitAt(x int, blank cell) {
	if x <= 0 || x >= len(r.cells) || r.cells[x].glyph&glyphTail == 0 {
		return
	}
	r.cells[x-1], r.cells[x] = blank, blank
}

func (r *row) resize(cols int) {
	if cols < len(r.cells) {
		r.splitAt(cols, cell{style: r.cells[cols].style})
		r.cells = r.cells[:cols:cols]
		r.used = min(r.used, cols)
		return
	}
	cells := make([]cell, cols)
	copy(cells, r.cells[:r.used])
	r.cells = cells
}

// grid is one screen: a ring of rows, so that scrolling the whole screen moves nothing.
type grid struct {
	rows []row
	top  int
	// saved is what DECSC keeps, apart for each screen as xterm does.
	saved cursor
}

func newGrid(rows, cols int) *grid {
	g := &grid{rows: make([]row, rows)}
	cells := make([]cell, rows*cols)
	for i := range g.rows {
		g.rows[i].cells = cells[i*cols : (i+1)*cols : (i+1)*cols]
	}
	return g
}

func (g *grid) row(y int) *row {
	y += g.top
	if y >= len(g.rows) {
		y -= len(g.rows)
	}
	return &g.rows[y]
}

// normalize makes row(y) == &rows[y].
func (g *grid) normalize() {
	if g.top == 0 {
		return
	}
	g.rows = append(g.rows[g.top:len(g.rows):len(g.rows)], g.rows[:g.top]...)
	g.top = 0
}

// shift moves rows [top, bottom] by n towards the top (n > 0) or the bottom (n < 0) and blanks those that come free.
func (g *grid) shift(top, bottom, n int, blank cell) {
	height := bottom - top + 1
	n = max(-height, min(n, height))
	switch {
	case n > 0 && top == 0 && bottom == len(g.rows)-1:
		g.top = (g.top + n) % len(g.rows)
		for y := bottom - n + 1; y <= bottom; y++ {
			g.blank(y, blank)
		}
	case n > 0:
		for y := top; y+n <= bottom; y++ {
			a, b := g.row(y), g.row(y+n)
			*a, *b = *b, *a
		}
		for y := bottom - n + 1; y <= bottom; y++ {
			g.blank(y, blank)
		}
	case n < 0:
		for y := bottom; y+n >= top; y-- {
			a, b := g.row(y), g.row(y+n)
			*a, *b = *b, *a
		}
		for y := top; y < top-n; y++ {
			g.blank(y, blank)
		}
	}
}

func (g *grid) blank(y int, blank cell) {
	r := g.row(y)
	r.erase(0, len(r.cells), blank)
	r.cont = false
}

// cursor is the position and everything DECSC saves with it.
type cursor struct {
	x, y     int
	wrapNext bool // the last column was written; the next character wraps first
	pen      style
	charset  [4]byte // final byte of the designation of G0 to G3: 'B' ASCII, '0' line drawing, 'A' British
	gl       int     // which of them is in use
	origin   bool
}

func newCursor() cursor { return cursor{charset: [4]byte{'B', 'B', 'B', 'B'}} }
