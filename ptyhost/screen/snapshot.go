package screen

import (
	"bytes"
	"maps"
	"slices"
)

// View says for whom a snapshot is made.
type View struct {
	Rows, Cols int // the viewer's window; zero means the terminal's own size
	Lines      int // how many lines of scrollback to send at most; negative means none
}

// Snapshot returns the bytes that bring a viewer's terminal, whatever state it is in, to what this terminal shows: scrollback, screen, cursor, modes
// and titles, and the beginning of a sequence or rune the program has not finished. Output written afterwards may follow it directly.
// A terminal that was never written to gives no bytes at all.
//
// At the terminal's own size the result is exact. A window of another size shows the part of the screen around the cursor.
func (t *Terminal) Snapshot(v View) []byte {
	if t.pristine {
		return nil
	}
	if v.Rows <= 0 || v.Cols <= 0 {
		v.Rows, v.Cols = t.rows, t.cols
	}
	e := &encoder{t: t}
	e.prologue()
	e.history(v)
	e.grid(t.main, v)
	for _, flags := range t.keyboard[0] {
		e.csi(">", "u", flags)
	}
	if t.screen == t.main {
		e.region()
	} else {
		e.cursor(&t.main.saved, t.main)
		e.str("\x1b[?1049h") // saves that cursor on the way
		e.neutral()
		e.str("\x1b[H\x1b[2J")
		e.grid(t.alt, v)
		for _, flags := range t.keyboard[1] {
			e.csi(">", "u", flags)
		}
		e.region()
	}
	if t.screen.saved != newCursor() {
		e.cursor(&t.screen.saved, t.screen)
		e.str("\x1b7")
		e.neutral()
	}
	e.titles()
	e.tabs()
	e.cursor(&t.cursor, t.screen)
	e.modes()
	e.buf = append(e.buf, t.pending...)
	return e.buf
}

// prologue ends whatever the viewer's terminal was in the middle of and resets what programs change. It does not clear the viewer's own scrollback.
func (e *encoder) prologue() {
	e.str("\x18\x1b\\\x1b[?1049l\x1b[!p\x1b[?1;5;6;9;12;45;66;1000;1001;1002;1003;1004;1005;1006;1015;1016;2004;2026;2027;2031;2048l\x1b[?7;25h\x1b[4;20l\x1b>")
	if e.t.sawKeyboard {
		e.csi("<", "u", maxKeyboard)
	}
	if e.t.sawPalette {
		e.str("\x1b]104\x1b\\\x1b]110\x1b\\\x1b]111\x1b\\\x1b]112\x1b\\")
	}
	e.neutral()
	e.str("\x1b[r\x1b[H\x1b[2J")
}

// neutral puts pen, link, character sets and origin mode back to their defaults.
func (e *encoder) neutral() {
	e.str("\x1b[?6l\x1b(B\x1b)B\x1b*B\x1b+B\x0f\x1b[m")
	if len(e.t.extras.values) > 0 {
		e.str("\x1b]8;;\x1b\\")
	}
	e.pen = style{}
}

// history writes the scrollback and leaves the cursor where the first row of the screen belongs.
func (e *encoder) history(v View) {
	h := &e.t.history
	if v.Lines < 0 || h.lines == 0 {
		return
	}
	n := v.Lines
	if n == 0 {
		n = h.lines
	}
	joined, aligned := false, true
	h.each(n, func(line []byte, end lineEnd) {
		e.buf = append(e.buf, line...)
		if !end.wrapped {
			e.str("\r\n")
		}
		aligned = (aligned || !joined) && (int(end.cols) == v.Cols || int(end.cols) == v.Cols-1)
		joined = end.wrapped
	})
	switch {
	case v.Rows != e.t.rows || v.Cols != e.t.cols: // push it all out of the window, which is then drawn from the top
		e.move(v.Rows-1, 0)
		e.buf = append(e.buf, bytes.Repeat([]byte{'\n'}, v.Rows)...)
		e.str("\x1b[H")
	case joined && !(aligned && e.t.main.row(0).begins()):
		e.str("\r\n")
	}
}

// begins reports whether the row starts with a character, which a terminal then wraps to by itself.
func (r *row) begins() bool { return r.cells[0].glyph != 0 }

// grid draws a screen from where the cursor is, row by row and without addressing, so that the viewer's terminal notes by itself which rows
// continue, and lines that are in its window now can be wrapped anew by it later.
func (e *encoder) grid(g *grid, v View) {
	if v.Rows != e.t.rows || v.Cols != e.t.cols {
		e.window(g, v)
		return
	}
	for y := range e.t.rows {
		r := g.row(y)
		join := r.wrapped && y+1 < e.t.rows && g.row(y+1).begins()
		e.row(r, y, g)
		e.setPen(style{})
		if !join && y+1 < e.t.rows {
			e.str("\r\n")
		}
	}
}

// row draws one row, and puts the cursor right again after characters whose width terminals disagree on.
func (e *encoder) row(r *row, y int, g *grid) {
	from, end := 0, r.content()
	if !r.wrapped || y+1 >= e.t.rows || !g.row(y+1).begins() {
		end = r.used
	}
	for x := range end {
		if r.cells[x].glyph&glyphCluster == 0 {
			continue
		}
		next := x + 1
		if r.cells[x].glyph&glyphWide != 0 {
			next++
		}
		if next >= end {
			break
		}
		e.cells(r, from, next)
		e.csi("", "G", next+1)
		from = next
	}
	e.cells(r, from, end)
}

// window draws the part of a screen around the cursor that fits a window of another size.
func (e *encoder) window(g *grid, v View) {
	y0 := e.offset(v)
	e.str("\x1b[?7l")
	for y := y0; y < min(e.t.rows, y0+v.Rows); y++ {
		r := g.row(y)
		e.move(y-y0, 0)
		e.cells(r, 0, min(r.used, v.Cols))
	}
	e.setPen(style{})
	e.str("\x1b[?7h")
}

func (e *encoder) offset(v View) int { return max(0, e.t.cursor.y-v.Rows+1) }

func (e *encoder) region() {
	if e.t.top != 0 || e.t.bot != e.t.rows-1 {
		e.csi("", "r", e.t.top+1, e.t.bot+1)
	}
}

// cursor puts the viewer's cursor into the state c on screen g.
func (e *encoder) cursor(c *cursor, g *grid) {
	y, x, top := min(c.y, e.t.rows-1), c.x, 0
	if c.origin {
		e.str("\x1b[?6h")
		top = e.t.top
	}
	if c.wrapNext { // only printing in the last column brings a terminal there
		r := g.row(y)
		if x > 0 && r.cells[x].glyph&glyphTail != 0 {
			x--
		}
		e.move(y-top, x)
		e.cells(r, x, e.t.cols)
	} else {
		e.move(y-top, x)
	}
	for i, set := range c.charset {
		if set != 'B' {
			e.buf = append(e.buf, 0x1b, "()*+"[i], set)
		}
	}
	switch c.gl {
	case 1:
		e.str("\x0e")
	case 2:
		e.str("\x1bn")
	case 3:
		e.str("\x1bo")
	}
	e.setPen(c.pen)
}

func (e *encoder) titles() {
	t := e.t
	if t.title != "" {
		e.str("\x1b]2;" + t.title + "\x1b\\")
	}
	if t.cwd != "" {
		e.str("\x1b]7;" + t.cwd + "\x1b\\")
	}
	for _, key := range slices.Sorted(maps.Keys(t.palette)) {
		e.str("\x1b]" + key + ";" + t.palette[key] + "\x1b\\")
	}
}

func (e *encoder) tabs() {
	if e.t.tabs == nil {
		return
	}
	e.str("\x1b[3g")
	for x, set := range e.t.tabs {
		if set {
			e.csi("", "G", x+1)
			e.str("\x1bH")
		}
	}
}

func (e *encoder) modes() {
	t := e.t
	if t.cursorShape != 0 {
		e.csi("", " q", t.cursorShape)
	}
	if t.keypad {
		e.str("\x1b=")
	}
	if t.modes.mouseMode != 0 {
		e.csi("?", "h", t.modes.mouseMode)
	}
	for _, m := range tracked {
		on := t.modes.is(m)
		if on == defaultModes.is(m) {
			continue
		}
		final := "l"
		if on {
			final = "h"
		}
		if m < 0 {
			e.csi("", final, -m)
		} else {
			e.csi("?", final, m)
		}
	}
}
