package screen

import (
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// encoder writes cells as VT bytes, changing the pen only where it changes.
type encoder struct {
	t       *Terminal
	buf     []byte
	pen     style
	view    View
	exact   bool // view is the terminal's own size
	joined  bool // the screen's first row continues what was written before it
	colored bool // a background was used
	// graphemes is set when the viewer's terminal has been put into mode 2027
	graphemes bool
}

func (e *encoder) str(s string) { e.buf = append(e.buf, s...) }

// csi writes CSI params final, where prefix holds a private marker and suffix the intermediate and final bytes.
func (e *encoder) csi(prefix, suffix string, params ...int) {
	e.str("\x1b[")
	e.str(prefix)
	for i, p := range params {
		if i > 0 {
			e.buf = append(e.buf, ';')
		}
		e.buf = strconv.AppendInt(e.buf, int64(p), 10)
	}
	e.str(suffix)
}

// move places the cursor, counted from zero.
func (e *encoder) move(y, x int) { e.csi("", "H", y+1, x+1) }

// setPen emits what changes the pen into s.
func (e *encoder) setPen(s style) {
	if s == e.pen {
		return
	}
	was, is := e.t.extras.at(int(e.pen.extra)), e.t.extras.at(int(s.extra))
	if was.link != is.link {
		e.str("\x1b]8;")
		if is.link == "" {
			e.str(";")
		}
		e.str(is.link)
		e.str("\x1b\\")
	}
	plain := style{extra: s.extra}
	switch {
	case s == plain && is.underline == 0:
		if (e.pen != style{extra: e.pen.extra} || was.underline != 0) {
			e.str("\x1b[m")
		}
	default:
		e.sgr(s, is.underline, was.underline)
	}
	e.pen = s
}

func (e *encoder) sgr(s style, underline, wasUnderline color) {
	at := len(e.buf)
	e.str("\x1b[")
	from := e.pen
	if from.attr != s.attr {
		if from.attr != 0 { // what is to go has no code of its own that all terminals know
			e.str("0;")
			from, wasUnderline = style{}, 0
		}
		e.attrs(s.attr)
	}
	if from.fg != s.fg {
		e.color(30, s.fg)
	}
	if from.bg != s.bg {
		e.color(40, s.bg)
		e.colored = true
	}
	if wasUnderline != underline {
		e.color(50, underline)
	}
	if e.buf[len(e.buf)-1] != ';' { // only a link changed
		e.buf = e.buf[:at]
		return
	}
	e.buf[len(e.buf)-1] = 'm'
}

var attrCodes = [...]struct {
	attr attr
	code string
}{
	{attrBold, "1;"}, {attrFaint, "2;"}, {attrItalic, "3;"}, {attrBlink, "5;"}, {attrInverse, "7;"}, {attrHidden, "8;"},
	{attrStrike, "9;"}, {attrOverline, "53;"},
}

func (e *encoder) attrs(a attr) {
	for _, c := range attrCodes {
		if a&c.attr != 0 {
			e.str(c.code)
		}
	}
	switch u := (a & attrUnderlineMask) / attrUnderline; u {
	case 0:
	case 1:
		e.str("4;")
	default: // with a colon, so that terminals without underline styles draw a plain one or none, but misread nothing
		e.buf = append(e.buf, '4', ':', '0'+byte(u), ';')
	}
}

// color emits a colour parameter; base is 30 for the foreground, 40 for the background, 50 for the underline.
func (e *encoder) color(base int, c color) {
	num := func(n int) { e.buf = append(strconv.AppendInt(e.buf, int64(n), 10), ';') }
	n := int(c &^ colorKind)
	switch {
	case c == 0:
		num(base + 9)
	case c&colorKind == colorRGB:
		num(base + 8)
		num(2)
		num(n >> 16 & 0xff)
		num(n >> 8 & 0xff)
		num(n & 0xff)
	case c&colorKind == colorBasic && n < 8:
		num(base + n)
	case c&colorKind == colorBasic:
		num(base + 60 + n - 8)
	default:
		num(base + 8)
		num(5)
		num(n)
	}
}

// cells emits columns [from, to) of a row, blanks as spaces.
func (e *encoder) cells(r *row, from, to int) {
	for i := from; i < to; {
		c := &r.cells[i]
		if c.style != e.pen {
			e.setPen(c.style)
		}
		g := c.glyph
		switch {
		case g < utf8.RuneSelf && g > 0:
			i += e.ascii(r.cells[i:to])
			continue
		case g&glyphTail != 0:
		case g&glyphMask == 0 && g&glyphCluster == 0:
			e.buf = append(e.buf, ' ')
		case g&glyphCluster != 0:
			e.cluster(e.t.clusters.at(int(g&glyphMask)), g&glyphWide != 0)
		default:
			e.buf = utf8.AppendRune(e.buf, rune(g&glyphMask))
		}
		i++
	}
}

// cluster emits characters that share a cell. A terminal that counts by code points makes such a cell only of what has no width behind what has; the
// others were made in mode 2027, and are emitted in it.
func (e *encoder) cluster(text string, wide bool) {
	first, size := utf8.DecodeRuneInString(text)
	plain := runeWidth(first) == 2 == wide
	for _, r := range text[size:] {
		plain = plain && runeWidth(r) == 0
	}
	on, off := "\x1b[?2027h", "\x1b[?2027l"
	switch {
	case !plain && !e.graphemes:
		e.str(on + text + off)
	case plain && e.graphemes && !wide && strings.ContainsRune(text, emojiStyle):
		e.str(off + text + on)
	default:
		e.str(text)
	}
}

// ascii emits the ASCII characters at the start of cells that are in one style, and returns how many they are.
func (e *encoder) ascii(cells []cell) int {
	pen := e.pen
	at := len(e.buf)
	buf := slices.Grow(e.buf, len(cells))[:at+len(cells)]
	out := buf[at:]
	n := 0
	for n < len(cells) && n < len(out) {
		c := &cells[n]
		if c.glyph-1 >= utf8.RuneSelf-1 || c.fg != pen.fg || c.bg != pen.bg || c.attr != pen.attr || c.extra != pen.extra {
			break
		}
		out[n] = byte(c.glyph)
		n++
	}
	e.buf = buf[:at+n]
	return n
}

// content returns how many columns of a row must be drawn. A row that the next one continues is drawn in full, except for a last column left
// empty because the wide character that starts the next row did not fit. next is nil after the last row.
func (r *row) content(next *row) int {
	if next == nil || !next.cont {
		return r.used
	}
	last := len(r.cells) - 1
	if last > 0 && r.cells[last] == (cell{}) && len(next.cells) > 0 && next.cells[0].glyph&glyphWide != 0 && next.cells[0].style == (style{}) {
		return last
	}
	return len(r.cells)
}
