package screen

// Resize changes the terminal's size. Lines of the main screen that were wrapped are wrapped anew; rows that no longer fit go into the scrollback, and
// come back from it when there is room below the cursor's line. The alternate screen is cut or padded, as its program draws it anew.
func (t *Terminal) Resize(rows, cols int) {
	if rows <= 0 || cols <= 0 || (rows == t.rows && cols == t.cols) {
		return
	}
	c := &t.cursor
	if t.screen != t.main {
		c = &t.main.saved
	}
	t.resizeMain(rows, cols, c)
	if t.alt != nil {
		t.alt.cut(rows, cols)
	}
	if t.tabs != nil {
		tabs := make([]bool, cols)
		for x := copy(tabs, t.tabs); x < cols; x++ {
			tabs[x] = x%8 == 0
		}
		t.tabs = tabs
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
	c.y = min(c.y, rows-1)
	if c.x >= cols {
		c.x, c.wrapNext = cols-1, false
	}
	c.wrapNext = c.wrapNext && c.x == cols-1
}

// cut crops or pads a screen at the bottom and on the right.
func (g *grid) cut(rows, cols int) {
	g.normalize()
	g.rows = g.rows[:min(rows, len(g.rows))]
	for y := range g.rows {
		g.rows[y].resize(cols)
		g.rows[y].wrapped = false
	}
	for len(g.rows) < rows {
		g.rows = append(g.rows, row{cells: make([]cell, cols)})
	}
}

func (t *Terminal) resizeMain(rows, cols int, c *cursor) {
	g := t.main
	g.normalize()
	atBottom := c.y == t.rows-1
	lines := g.rows
	for len(lines) > c.y+1 && lines[len(lines)-1].used == 0 {
		lines = lines[:len(lines)-1]
	}
	if cols != t.cols {
		lines = t.unwrapHistory(lines, c)
		lines = reflow(lines, cols, c)
	}
	if atBottom {
		lines = t.recall(lines, rows, cols, c)
	}
	for len(lines) > rows && c.y > 0 {
		t.keep(&lines[0])
		lines = lines[1:]
		c.y--
	}
	lines = lines[:min(len(lines), rows)]
	g.rows = append(make([]row, 0, rows), lines...)
	for len(g.rows) < rows {
		g.rows = append(g.rows, row{cells: make([]cell, cols)})
	}
	g.rows[rows-1].wrapped = false
}

// maxUnwrap is how many rows of one line are taken out of the scrollback to be wrapped anew. What `base64 -w0` prints is longer; it stays in pieces.
const maxUnwrap = 1000

// unwrapHistory puts the scrolled-off beginning of the first row's line back before it, so that the line can be wrapped as a whole.
func (t *Terminal) unwrapHistory(lines []row, c *cursor) []row {
	var old []row
	for len(old) < maxUnwrap && t.history.lastWrapped() {
		old = append(t.popRow(), old...)
	}
	c.y += len(old)
	return append(old, lines...)
}

// recall takes lines back from the scrollback until there are enough for the screen.
func (t *Terminal) recall(lines []row, rows, cols int, c *cursor) []row {
	for len(lines) < rows && t.history.lines > 0 {
		old := t.unwrapHistory(t.popRow(), &cursor{})
		old = reflow(old, cols, &cursor{y: -1})
		c.y += len(old)
		lines = append(old, lines...)
	}
	return lines
}

// popRow takes the newest row out of the scrollback, at the width it had. It is several rows only if terminals' ideas of width differ.
func (t *Terminal) popRow() []row {
	line, end, ok := t.history.pop()
	if !ok {
		return nil
	}
	const height = 2
	cols := max(1, int(end.cols))
	scratch := &Terminal{rows: height, cols: cols, main: newGrid(height, cols), cursor: newCursor(), modes: defaultModes, bot: height - 1}
	scratch.screen = scratch.main
	scratch.clusters, scratch.extras = t.clusters, t.extras
	scratch.clusters.frozen, scratch.extras.frozen = true, true // scratch does not see the cells that use them
	scratch.Write(line)
	t.clusters, t.extras = scratch.clusters, scratch.extras
	t.clusters.frozen, t.extras.frozen = false, false
	scratch.main.normalize()
	rows := scratch.main.rows[:scratch.cursor.y+1]
	rows[len(rows)-1].wrapped = end.wrapped
	return rows
}

// reflow wraps lines anew at the given width and moves the cursor with the text it was on.
func reflow(lines []row, cols int, c *cursor) []row {
	var out []row
	cy := c.y
	for y := 0; y < len(lines); {
		var text []cell
		at := -1 // the cursor's place in text
		for {
			r := &lines[y]
			if y == cy {
				at = len(text) + c.x
				if c.wrapNext {
					at++
				}
			}
			text = append(text, r.cells[:r.content()]...)
			y++
			if !r.wrapped || y == len(lines) {
				break
			}
		}
		out = fold(out, text, cols, at, c)
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
		r := row{cells: make([]cell, cols), used: end - start}
		copy(r.cells, text[start:end])
		last := end >= len(text)
		r.wrapped = !last
		if at >= start && (at < end || last) {
			c.y, c.x, c.wrapNext = len(out), min(at-start, cols-1), at-start == cols
		}
		out = append(out, r)
		if last {
			return out
		}
		start = end
	}
}
