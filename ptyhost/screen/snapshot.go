package screen

import (
	"bytes"
	"maps"
	"slices"
	"unicode/utf8"
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
// At the terminal's own size the result is exact. A window of another size shows the rows around the cursor, cut to its width, from its top left corner.
func (t *Terminal) Snapshot(v View) []byte {
	if t.pristine {
		return nil
	}
	if v.Rows <= 0 || v.Cols <= 0 {
		v.Rows, v.Cols = t.rows, t.cols
	}
	e := &encoder{t: t, view: v, exact: v.Rows == t.rows && v.Cols == t.cols}
	e.prologue()
	e.history()
	for _, flags := range t.keyboard[0] {
		e.csi(">", "u", flags)
	}
	if t.alt == nil {
		e.grid(t.main, &t.cursor)
	} else {
		e.grid(t.main, &t.main.saved)
		e.cursor(&t.main.saved, t.main)
		e.str("\x1b[?1049h") // saves that cursor on the way
		e.neutral()
		e.str("\x1b[H\x1b[2J")
		e.grid(t.alt, &t.cursor)
		for _, flags := range t.keyboard[1] {
			e.csi(">", "u", flags)
		}
	}
	if t.screen.saved != newCursor() {
		e.cursor(&t.screen.saved, t.screen)
		e.str("\x1b7")
		e.neutral()
	}
	e.region()
	e.titles()
	e.tabs()
	e.modes()
	e.graphemes = t.modes.is(modeGraphemes)
	e.cursor(&t.cursor, t.screen)
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
func (e *encoder) history() {
	t, v, h := e.t, e.view, &e.t.history
	if v.Lines < 0 {
		return
	}
	n := v.Lines
	if n == 0 {
		n = h.lines
	}
	if h.lines > 0 { // what the lines take, their ends, and something for the screen: growing as it comes would copy all of it several times
		n = min(n, h.lines)
		e.buf = slices.Grow(e.buf, h.bytes*n/h.lines+2*n+16*t.rows*t.cols)
	}
	joined, aligned := false, true
	rows, width := 0, 0 // of the viewer's window that are used; of the line so far
	colored := false    // a background is somewhere in the line so far
	trimmed := false    // the last column was left to something wide
	h.each(n, func(line []byte, end lineEnd) {
		if trimmed && !end.is(lineWide) { // what is there now is not
			e.str(" ")
			width++
		}
		trimmed = end.is(lineTrimmed)
		e.buf = append(e.buf, line...)
		width += int(end.cols)
		colored = colored || end.is(lineColored)
		if !end.is(lineWrapped) {
			if colored && width > v.Cols && width%v.Cols != 0 { // a row that came in by wrapping is filled with the background of that moment
				e.str("\x1b[K")
			}
			e.str("\r\n")
			rows += max(1, (width+v.Cols-1)/v.Cols)
			width, colored = 0, false
		}
		aligned = (aligned || !joined) && (int(end.cols) == v.Cols || trimmed && int(end.cols) == v.Cols-1)
		joined = end.is(lineWrapped)
	})
	first := t.main.row(0)
	cont := first.cont && joined
	if cont && trimmed && first.cells[0].glyph&glyphWide == 0 {
		e.str(" ")
	}
	if joined && !(cont && aligned && e.exact) {
		e.str("\r\n")
		rows += max(1, (width+v.Cols-1)/v.Cols)
	}
	if e.exact {
		e.joined = cont && aligned
		return
	}
	// What is above the window goes where it would be had the window been as small as it is all the time; then all is pushed out of the window.
	c := &t.cursor
	if t.alt != nil {
		c = &t.main.saved
	}
	e.str("\x1b[?7l")
	for y := range e.offset(c) {
		e.cut(t.main.row(y))
		e.str("\r\n")
		rows++
	}
	e.str("\x1b[?7h")
	if rows > 0 {
		e.move(v.Rows-1, 0)
		e.buf = append(e.buf, bytes.Repeat([]byte{'\n'}, min(rows, v.Rows))...)
		e.str("\x1b[H")
	}
}

// grid draws a screen from where the cursor is, row by row and without addressing, so that the viewer's terminal notes by itself which rows
// continue, and lines that are in its window now can be wrapped anew by it later. c is the screen's cursor.
func (e *encoder) grid(g *grid, c *cursor) {
	if !e.exact {
		e.window(g, c)
		return
	}
	joined := e.joined && g == e.t.main
	for y := range e.t.rows {
		r := g.row(y)
		var next *row
		if y+1 < e.t.rows {
			next = g.row(y + 1)
		}
		end := r.content(next)
		if joined { // it takes a character to make a terminal wrap to this row
			end = max(1, end)
		}
		e.row(r, end)
		e.setPen(style{})
		if joined && r.cells[0].bg != 0 && end < e.t.cols { // as in history
			e.str("\x1b[K")
		}
		joined = next != nil && next.cont
		if !joined && next != nil {
			e.str("\r\n")
		}
	}
}

// row draws one row, and puts the cursor right again after characters whose width terminals disagree on.
func (e *encoder) row(r *row, end int) {
	from := 0
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

// window draws the part of a screen around its cursor that fits a window of another size.
func (e *encoder) window(g *grid, c *cursor) {
	y0 := e.offset(c)
	e.str("\x1b[?7l")
	for y := y0; y < min(e.t.rows, y0+e.view.Rows); y++ {
		e.move(y-y0, 0)
		e.cut(g.row(y))
	}
	e.str("\x1b[?7h")
}

// cut draws as much of a row as the window has columns, in the default pen before and after.
func (e *encoder) cut(r *row) {
	end := min(r.used, e.view.Cols)
	half := end < r.used && r.cells[end].glyph&glyphTail != 0
	if half {
		end--
	}
	e.row(r, end)
	if half {
		e.setPen(r.cells[end].style)
		e.buf = append(e.buf, ' ')
	}
	e.setPen(style{})
}

// offset is how many rows of a screen are above the window.
func (e *encoder) offset(c *cursor) int {
	if e.exact {
		return 0
	}
	return max(0, min(c.y, e.t.rows-1)-e.view.Rows+1)
}

// region sets the scroll region. In a window with more rows than the terminal it is the terminal's rows, so that these scroll as they do there.
func (e *encoder) region() {
	y0 := e.offset(&e.t.cursor)
	top, bot := max(0, e.t.top-y0), min(e.t.bot-y0, e.view.Rows-1)
	if bot > top && (top != 0 || bot != e.view.Rows-1) {
		e.csi("", "r", top+1, bot+1)
	}
}

// cursor puts the viewer's cursor into the state c on screen g. If the last thing that happened to the terminal is a character that was printed, it
// is the last thing here too: what follows may combine with it or repeat it.
func (e *encoder) cursor(c *cursor, g *grid) {
	t := e.t
	y, x := min(c.y, t.rows-1), c.x
	e.setPen(c.pen)
	y -= e.offset(c)
	if c.origin {
		e.str("\x1b[?6h")
		if c == &t.cursor { // a saved one may be outside the region, which is set after it
			y -= t.top
		}
	}
	if !e.exact {
		if c.wrapNext {
			x++
		}
		e.move(y, min(x, e.view.Cols-1))
		e.charsets(c)
		return
	}
	r := g.row(min(c.y, t.rows-1))
	last := c == &t.cursor && t.last != 0
	if !c.wrapNext && (!last || x == 0) {
		e.move(y, x)
		e.charsets(c)
		return
	}
	// Only printing brings a terminal there.
	if !c.wrapNext {
		x--
	}
	if x > 0 && r.cells[x].glyph&glyphTail != 0 {
		x--
	}
	e.move(y, x)
	end := x + 1
	if r.cells[x].glyph&glyphWide != 0 {
		end++
	}
	insert := c == &t.cursor && t.modes.is(modeInsert)
	switch {
	case insert && last: // make the room that printing takes
		e.csi("", "P", end-x)
	case insert:
		e.str("\x1b[4l")
	}
	if text := t.printed(r.cells[x].glyph); !last && c.charset[c.gl] != 'B' && text[0] < utf8.RuneSelf { // printed in another set
		e.cells(r, x, end)
		e.charsets(c)
	} else {
		e.charsets(c)
		e.cells(r, x, end)
	}
	e.setPen(c.pen)
	switch {
	case insert && !last:
		e.str("\x1b[4h")
	case !last: // changes nothing, but nothing combines with what was printed
		e.buf = append(e.buf, 0x1b, '(', c.charset[0])
	}
}

func (e *encoder) charsets(c *cursor) {
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
}

func (e *encoder) titles() {
	t := e.t
	for _, title := range t.titles {
		e.str("\x1b]2;" + title + "\x1b\\\x1b[22;2t")
	}
	if t.title != "" || len(t.titles) > 0 {
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
