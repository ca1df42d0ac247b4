package screen

import (
	"bytes"
	"strconv"
	"strings"
	"unicode/utf8"
)

// escape handles ESC b.
func (t *Terminal) escape(b byte) {
	c := &t.cursor
	switch b {
	case '7':
		t.screen.saved = *c
	case '8':
		t.restore()
	case '=':
		t.keypad = true
	case '>':
		t.keypad = false
	case 'D':
		t.lineFeed()
		c.wrapNext = false
	case 'E':
		t.lineFeed()
		c.x, c.wrapNext = 0, false
	case 'H':
		t.setTab(c.x, true)
	case 'M':
		t.reverseLineFeed()
		c.wrapNext = false
	case 'c':
		t.reset()
	case 'n':
		c.gl = 2
	case 'o':
		c.gl = 3
	}
}

// escapeInter handles ESC inter b.
func (t *Terminal) escapeInter(inter, b byte) {
	if i := strings.IndexByte("()*+", inter); i >= 0 {
		if b != '0' && b != 'A' {
			b = 'B'
		}
		t.cursor.charset[i] = b
		return
	}
	if inter == '#' && b == '8' { // DECALN: the screen full of E
		t.top, t.bot = 0, t.rows-1
		for y := range t.rows {
			r := t.screen.row(y)
			r.erase(0, t.cols, cell{glyph: 'E', style: t.cursor.pen})
			r.cont = false
		}
		t.cursor.x, t.cursor.y, t.cursor.wrapNext = 0, 0, false
	}
}

// moveTo places the cursor at y, x, relative to the region in origin mode.
func (t *Terminal) moveTo(y, x int) {
	c := &t.cursor
	lo, hi := 0, t.rows-1
	if c.origin {
		lo, hi = t.top, t.bot
	}
	c.y = max(lo, min(lo+y, hi))
	c.x = max(0, min(x, t.cols-1))
	c.wrapNext = false
}

// moveBy moves the cursor up or down; from inside the region it stays inside.
func (t *Terminal) moveBy(dy int) {
	c := &t.cursor
	lo, hi := 0, t.rows-1
	if c.y >= t.top && dy < 0 {
		lo = t.top
	}
	if c.y <= t.bot && dy > 0 {
		hi = t.bot
	}
	c.y = max(lo, min(c.y+dy, hi))
	c.wrapNext = false
}

func (t *Terminal) column(x int) {
	t.cursor.x = max(0, min(x, t.cols-1))
	t.cursor.wrapNext = false
}

// csi handles a control sequence with the final byte b.
func (t *Terminal) csi(b byte) {
	switch {
	case t.mark == 0 && t.inter == 0:
		t.csiPlain(b)
	case t.mark == '?' && t.inter == 0:
		t.csiPrivate(b)
	case t.inter == ' ' && t.mark == 0:
		switch b {
		case 'q':
			t.cursorShape = t.param(0, 0)
		case '@', 'A':
			t.shiftColumns(t.param(0, 1), b == '@')
		}
	case t.inter == '!' && b == 'p':
		t.softReset()
	case t.inter == 0 && b == 'u':
		t.sawKeyboard = true
		switch t.mark {
		case '>':
			t.keys().push(t.param(0, 0))
		case '<':
			t.keys().pop(t.param(0, 1))
		case '=':
			t.keys().change(t.param(0, 0), t.param(1, 1))
		}
	case t.inter == '\'' && t.mark == 0 && (b == '}' || b == '~'):
		t.editColumns(t.param(0, 1), b == '}')
	}
}

func (t *Terminal) csiPlain(b byte) {
	c := &t.cursor
	n := t.param(0, 1)
	switch b {
	case '@':
		t.insertCells(n)
		c.wrapNext = false
	case 'A':
		t.moveBy(-n)
	case 'B', 'e':
		t.moveBy(n)
	case 'C', 'a':
		t.column(c.x + n)
	case 'D':
		t.column(c.x - n)
	case 'E':
		t.moveBy(n)
		t.column(0)
	case 'F':
		t.moveBy(-n)
		t.column(0)
	case 'G', '`':
		t.column(n - 1)
	case 'H', 'f':
		t.moveTo(n-1, t.param(1, 1)-1)
	case 'I':
		t.tab(n)
	case 'J':
		t.eraseDisplay(t.param(0, 0))
	case 'K':
		t.eraseLine(t.param(0, 0))
	case 'L', 'M':
		t.editLines(n, b == 'L')
	case 'P':
		t.deleteCells(n)
		c.wrapNext = false
	case 'S':
		t.scrollUp(n, false)
	case 'T':
		if t.nparams <= 1 { // with more it is mouse highlight tracking
			t.screen.shift(t.top, t.bot, -n, t.blank())
		}
	case '^':
		t.screen.shift(t.top, t.bot, -n, t.blank())
	case 'X':
		t.screen.row(c.y).erase(c.x, c.x+n, t.blank())
		c.wrapNext = false
	case 'Z':
		t.backTab(n)
	case 'b':
		if t.last != 0 {
			n = min(n, t.rows*t.cols) // more changes nothing but the time it takes
			for r := t.last; n > 0; n-- {
				t.printRune(r)
			}
		}
	case 'd':
		t.moveTo(n-1, c.x)
	case 'g':
		t.clearTabs(t.param(0, 0))
	case 'h', 'l':
		for i := range t.nparams {
			t.setMode(-t.params[i], b == 'h')
		}
	case 'm':
		t.sgr()
	case 'r':
		t.setRegion(n-1, t.param(1, t.rows)-1)
	case 's':
		t.screen.saved = *c
	case 't':
		t.window(n)
	case 'u':
		t.restore()
	}
}

func (t *Terminal) csiPrivate(b byte) {
	switch b {
	case 'h', 'l':
		for i := range t.nparams {
			if t.params[i] > 0 {
				t.setMode(t.params[i], b == 'h')
			}
		}
	case 'J': // selective erase; protection is not modelled, and programs do not use it
		t.eraseDisplay(t.param(0, 0))
	case 'K':
		t.eraseLine(t.param(0, 0))
	}
}

func (t *Terminal) eraseDisplay(how int) {
	c := &t.cursor
	from, to := 0, t.rows
	switch how {
	case 0:
		t.eraseLine(0)
		from = c.y + 1
	case 1:
		t.eraseLine(1)
		t.screen.row(c.y).cont = false
		if c.x == t.cols-1 && c.y+1 < t.rows { // all of the line is gone
			t.screen.row(c.y + 1).cont = false
		}
		to = c.y
	case 2:
	case 3:
		t.history.clear()
		t.main.row(0).cont = false
		return
	default:
		return
	}
	for y := from; y < to; y++ {
		t.screen.blank(y, t.blank())
	}
	c.wrapNext = false
}

func (t *Terminal) eraseLine(how int) {
	c := &t.cursor
	from, to := c.x, t.cols
	switch how {
	case 0:
	case 1:
		from, to = 0, c.x+1
	case 2:
		from = 0
	default:
		return
	}
	r := t.screen.row(c.y)
	r.erase(from, to, t.blank())
	if from == 0 && to == t.cols {
		r.cont = false
	}
	c.wrapNext = false
}

// editLines inserts or deletes n lines at the cursor, inside the region.
func (t *Terminal) editLines(n int, insert bool) {
	c := &t.cursor
	if c.y < t.top || c.y > t.bot {
		return
	}
	if insert {
		n = -n
	}
	t.screen.shift(c.y, t.bot, n, t.blank())
	c.x, c.wrapNext = 0, false
}

// shiftColumns is SL and SR: the region's columns move sideways.
func (t *Terminal) shiftColumns(n int, left bool) {
	was := t.cursor
	for t.cursor.y = t.top; t.cursor.y <= t.bot; t.cursor.y++ {
		t.cursor.x = 0
		if left {
			t.deleteCells(n)
		} else {
			t.insertCells(n)
		}
		t.screen.row(t.cursor.y).cont = false
	}
	t.cursor = was
}

// editColumns is DECIC and DECDC.
func (t *Terminal) editColumns(n int, insert bool) {
	was := t.cursor
	for t.cursor.y = t.top; t.cursor.y <= t.bot; t.cursor.y++ {
		if insert {
			t.insertCells(n)
		} else {
			t.deleteCells(n)
		}
		t.screen.row(t.cursor.y).cont = false
	}
	t.cursor = was
}

func (t *Terminal) clearTabs(how int) {
	switch how {
	case 0:
		t.setTab(t.cursor.x, false)
	case 3:
		t.tabs = make([]bool, t.cols)
	}
}

func (t *Terminal) setRegion(top, bot int) {
	bot = min(bot, t.rows-1)
	if top >= bot {
		return
	}
	t.top, t.bot = top, bot
	t.moveTo(0, 0)
}

// window handles the title stack of CSI t; the rest of it asks or moves windows.
func (t *Terminal) window(op int) {
	if t.param(1, 0) == 1 { // the icon's title only
		return
	}
	switch op {
	case 22:
		if len(t.titles) < maxTitles {
			t.titles = append(t.titles, t.title)
		}
	case 23:
		if n := len(t.titles); n > 0 {
			t.title, t.titles = t.titles[n-1], t.titles[:n-1]
		}
	}
}

// sgr changes the pen.
func (t *Terminal) sgr() {
	if t.nparams == 0 {
		t.setPen(style{}, extra{})
		return
	}
	pen, ex := t.cursor.pen, t.extras.at(int(t.cursor.pen.extra))
	for i := 0; i < t.nparams; i++ {
		p := max(0, t.params[i])
		sub := i + 1 // parameters joined by colons belong together
		for sub < t.nparams && t.colon&(1<<sub) != 0 {
			sub++
		}
		switch {
		case p == 38 || p == 48 || p == 58:
			c, next, ok := t.sgrColor(i, sub)
			i = next - 1
			if !ok {
				continue
			}
			switch p {
			case 38:
				pen.fg = c
			case 48:
				pen.bg = c
			case 58:
				ex.underline = c
			}
			continue
		case p == 0:
			pen, ex = style{}, extra{link: ex.link}
		case p == 4 && sub > i+1:
			pen.attr = pen.attr&^attrUnderlineMask | attr(max(0, min(t.params[i+1], 5)))*attrUnderline
		default:
			sgrPlain(&pen, &ex, p)
		}
		i = sub - 1
	}
	t.setPen(pen, ex)
}

// setPen makes s the pen, with x in place of s.extra; a hyperlink is not SGR's to end.
func (t *Terminal) setPen(s style, x extra) {
	if x == (extra{}) {
		x.link = t.extras.at(int(t.cursor.pen.extra)).link
	}
	s.extra = uint16(t.extras.add(x, t.usedExtras))
	t.cursor.pen = s
}

func sgrPlain(pen *style, ex *extra, p int) {
	set := func(a attr) { pen.attr |= a }
	unset := func(a attr) { pen.attr &^= a }
	switch p {
	case 1:
		set(attrBold)
	case 2:
		set(attrFaint)
	case 3:
		set(attrItalic)
	case 4:
		unset(attrUnderlineMask)
		set(attrUnderline)
	case 5, 6:
		set(attrBlink)
	case 7:
		set(attrInverse)
	case 8:
		set(attrHidden)
	case 9:
		set(attrStrike)
	case 21:
		unset(attrUnderlineMask)
		set(2 * attrUnderline)
	case 22:
		unset(attrBold | attrFaint)
	case 23:
		unset(attrItalic)
	case 24:
		unset(attrUnderlineMask)
	case 25:
		unset(attrBlink)
	case 27:
		unset(attrInverse)
	case 28:
		unset(attrHidden)
	case 29:
		unset(attrStrike)
	case 39:
		pen.fg = 0
	case 49:
		pen.bg = 0
	case 53:
		set(attrOverline)
	case 55:
		unset(attrOverline)
	case 59:
		ex.underline = 0
	}
	switch {
	case p >= 30 && p < 38:
		pen.fg = colorBasic | color(p-30)
	case p >= 40 && p < 48:
		pen.bg = colorBasic | color(p-40)
	case p >= 90 && p < 98:
		pen.fg = colorBasic | color(p-90+8)
	case p >= 100 && p < 108:
		pen.bg = colorBasic | color(p-100+8)
	}
}

// sgrColor reads the colour that parameter i announces, either in its own colon parameters, which end before sub, or in the ones that follow.
// next is the first parameter after it.
func (t *Terminal) sgrColor(i, sub int) (c color, next int, ok bool) {
	args, next := t.params[i+1:sub], sub
	if len(args) == 0 {
		args = t.params[i+1 : t.nparams]
		switch {
		case len(args) > 0 && args[0] == 5:
			next = min(i+3, t.nparams)
		case len(args) > 0 && args[0] == 2:
			next = min(i+5, t.nparams)
		}
		args = t.params[i+1 : max(i+1, next)]
	} else if len(args) >= 5 && args[0] == 2 {
		args = append([]int{2}, args[2:]...) // 38:2:colourspace:r:g:b
	}
	if len(args) >= 2 && args[0] == 5 && args[1] <= 255 {
		return colorIndexed | color(max(0, args[1])), next, true
	}
	if len(args) >= 4 && args[0] == 2 {
		c = colorRGB
		for k, v := range args[1:4] {
			if v > 255 {
				return 0, next, false
			}
			c |= color(max(0, v)) << (16 - 8*k)
		}
		return c, next, true
	}
	return 0, next, false
}

// dispatchOSC handles an operating system command: titles, the directory, links and colours are state; the rest passes viewers by.
func (t *Terminal) dispatchOSC() {
	num, text, _ := bytes.Cut(t.osc, []byte{';'})
	n, err := strconv.Atoi(string(num))
	if err != nil || !utf8.Valid(text) {
		return
	}
	switch n {
	case 0, 2:
		t.title = string(text[:min(len(text), maxTitle)])
		for !utf8.ValidString(t.title) {
			t.title = t.title[:len(t.title)-1]
		}
	case 7:
		t.cwd = string(text)
	case 8:
		link := string(text)
		if strings.HasSuffix(link, ";") || !strings.Contains(link, ";") {
			link = "" // no URI: the link ends
		}
		ex := t.extras.at(int(t.cursor.pen.extra))
		ex.link = link
		t.cursor.pen.extra = uint16(t.extras.add(ex, t.usedExtras))
	case 4:
		index, spec, ok := strings.Cut(string(text), ";")
		if i, err := strconv.ParseUint(index, 10, 8); ok && err == nil && spec != "?" && !strings.Contains(spec, ";") {
			t.setPalette("4;"+strconv.FormatUint(i, 10), spec)
		}
	case 10, 11, 12:
		if spec := string(text); spec != "?" && !strings.Contains(spec, ";") {
			t.setPalette(strconv.Itoa(n), spec)
		}
	case 104:
		for key := range t.palette {
			if index, ok := strings.CutPrefix(key, "4;"); ok && (len(text) == 0 || index == string(text)) {
				delete(t.palette, key)
			}
		}
	case 110, 111, 112:
		delete(t.palette, strconv.Itoa(n-100))
	}
}

// setPalette remembers a colour the program changed. There are at most 259 of them; a longer spec is none.
func (t *Terminal) setPalette(key, spec string) {
	if len(spec) > 64 {
		return
	}
	t.sawPalette = true
	if t.palette == nil {
		t.palette = make(map[string]string)
	}
	t.palette[key] = spec
}
