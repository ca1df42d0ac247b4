package screen

import "slices"

// Resize changes the terminal's size as tmux and xterm.js do. Rows that are too many are taken from below the cursor, then from the top into the
// scrollback; rows that are missing come out of the scrollback if the cursor is in the last one, else they are blank. Lines of the main screen
// that were wrapped are then wrapped anew, which the alternate screen's program has to do itself.
func (t *Terminal) Resize(rows, cols int) {
	if rows <= 0 || cols <= 0 || (rows == t.rows && cols == t.cols) {
		return
	}
	if t.alt != nil {
		if t.cursor.wrapNext && cols > t.cols { // there is room now
			t.cursor.x++
			t.cursor.wrapNext = false
		}
		t.alt.cut(rows, cols, &t.cursor)
		t.resizeMain(rows, cols, &t.main.saved)
	} else {
		t.resizeMain(rows, cols, &t.cursor)
	}
	if t.tabs != nil {
		tabs := make([]bool, cols)
		for x := copy(tabs, t.tabs); x < cols; x++ {
			tabs[x] = x%8 == 0
		}
		t.tabs = tabs
	}
	if t.cursor.x >= cols { // what was printed last was cut off
		t.last = 0
	}
	t.rows, t.cols = rows, cols
	t.top, t.bot = 0, rows-1
	t.main.saved.clamp(rows, cols)
	t.cursor.clamp(rows, cols)
	if t.alt != nil {
		t.alt.saved.clamp(rows, cols)
	}
}

func (c *cursor) clamp(rows, cols int) {
	c.y = max(0, min(c.y, rows-1))
	if c.x >= cols {
		c.x, c.wrapNext = cols-1, false
	}
	c.wrapNext = c.wrapNext && c.x == cols-1
}

func blankRow(cols int) row { return row{cells: make([]cell, cols)} }

// cut crops or pads a screen without wrapping anything anew, keeping the row of its cursor.
func (g *grid) cut(rows, cols int, c *cursor) {
	g.normalize()
	for len(g.rows) > rows {
		if c.y < len(g.rows)-1 {
			g.rows = g.rows[:len(g.rows)-1]
			continue
		}
		g.rows = g.rows[1:]
		c.y--
	}
	for y := range g.rows {
		g.rows[y].resize(cols)
	}
	for len(g.rows) < rows {
		g.rows = append(g.rows, blankRow(cols))
	}
}

// resizeMain resizes the main screen, and moves the cursor c with the text it is on.
func (t *Terminal) resizeMain(rows, cols int, c *cursor) {
	t.main.normalize()
	lines := slices.Clone(t.main.rows)
	was := c.y
	if c.y == len(lines)-1 {
		lines = t.recall(lines, rows, t.cols, c)
	}
	for len(lines) < rows {
		lines = append(lines, blankRow(t.cols))
	}
	lines = t.crop(lines, rows, c, true)
	if cols != t.cols {
		top := t.history.lines == 0
		lines = reflow(t.unwrapHistory(lines, c), cols, c)
		lines = t.crop(lines, rows, c, top)
		lines = t.recall(lines, rows, cols, c)
		for len(lines) < rows {
			lines = append(lines, blankRow(cols))
		}
	}
	t.main.rows = lines
	if saved := &t.main.saved; c != saved && *saved != newCursor() { // DECSC of before follows; what never was stays at home
		saved.y += c.y - was
	}
}

// crop takes away rows over the given number: those below the cursor's first if they may go, then the topmost, which go into the scrollback.
func (t *Terminal) crop(lines []row, rows int, c *cursor, below bool) []row {
	for len(lines) > rows {
		if below && c.y < len(lines)-1 {
			lines = lines[:len(lines)-1]
			continue
		}
		t.keep(&lines[0], &lines[1])
		lines = lines[1:]
		c.y--
	}
	return lines
}

// maxUnwrap is how many rows of one line are taken out of the scrollback to be wrapped anew. What `base64 -w0` prints is longer; it stays in pieces.
const maxUnwrap = 1000

// unwrapHistory puts the scrolled-off beginning of the first row's line back before it, so that the line can be wrapped as a whole.
func (t *Terminal) unwrapHistory(lines []row, c *cursor) []row {
	var old [][]row
	n := 0
	for first := &lines[0]; n < maxUnwrap && first.cont && t.history.lastWrapped(); {
		rows := t.popRow()
		old = append(old, rows)
		n += len(rows)
		first = &rows[0]
	}
	if n == 0 {
		return lines
	}
	c.y += n
	all := make([]row, 0, n+len(lines))
	for _, rows := range slices.Backward(old) {
		all = append(all, rows...)
	}
	return append(all, lines...)
}

// recall takes lines back from the scrollback until there are enough for the screen.
func (t *Terminal) recall(lines []row, rows, cols int, c *cursor) []row {
	for len(lines) < rows && t.history.lines > 0 {
		old := t.unwrapHistory(t.popRow(), &cursor{})
		old = reflow(old, cols, &cursor{y: -1})
		c.y += len(old)
		lines = append(old, lines...)
	}
	return t.crop(lines, max(rows, 1), c, false)
}

// popRow takes the newest row out of the scrollback, at the width it had. It is several rows only if terminals' ideas of width differ.
func (t *Terminal) popRow() []row {
	line, end, ok := t.history.pop()
	if !ok {
		return nil
	}
	const height = 2
	cols := max(1, int(end.cols))
	if end.is(lineTrimmed) {
		cols++
	}
	scratch := &Terminal{rows: height, cols: cols, main: newGrid(height, cols), cursor: newCursor(), modes: defaultModes, bot: height - 1}
	scratch.screen = scratch.main
	scratch.clusters, scratch.extras = t.clusters, t.extras
	scratch.clusters.frozen, scratch.extras.frozen = true, true // scratch does not see the cells that use them
	scratch.Write(line)
	t.clusters, t.extras = scratch.clusters, scratch.extras
	t.clusters.frozen, t.extras.frozen = false, false
	scratch.main.normalize()
	rows := scratch.main.rows[:scratch.cursor.y+1]
	rows[0].cont = t.history.lastWrapped()
	return rows
}

// reflow wraps lines anew at the given width and moves the cursor with the text it was on.
func reflow(lines []row, cols int, c *cursor) []row {
	var out []row
	cy := c.y
	for y := 0; y < len(lines); {
		var text []cell
		at := -1 // the cursor's place in text
		cont := lines[y].cont
		for first := true; first || y < len(lines) && lines[y].cont; first = false {
			r := &lines[y]
			if y == cy {
				at = len(text) + c.x
				if c.wrapNext {
					at++
				}
			}
			var next *row
			if y++; y < len(lines) {
				next = &lines[y]
			}
			text = append(text, r.cells[:r.content(next)]...)
		}
		begin := len(out)
		out = fold(out, text, cols, at, c)
		out[begin].cont = cont
	}
	return out
}

// fold appends text as rows of the given width. If the cursor is at position at of it, at not being -1, c is placed there.
func fold(out []row, text []cell, cols, at int, c *cursor) []row {
	for start := 0; ; {
		end := min(len(text), start+cols)
		if end < len(text) && end > start+1 && text[end].glyph&glyphTail != 0 {
			end--
		}
		r := row{cells: make([]cell, cols), used: end - start, cont: start > 0}
		copy(r.cells, text[start:end])
		if cols == 1 && r.cells[0].glyph&(glyphWide|glyphTail) != 0 { // there is no room for it
			r.cells[0].glyph = 0
		}
		last := end >= len(text)
		if at >= start && (at < end || last) {
			c.y, c.x, c.wrapNext = len(out), min(at-start, cols-1), at-start == cols && at <= len(text)
		}
		out = append(out, r)
		if last {
			return out
		}
		start = end
	}
}
