package screen

import (
	"bytes"
	"slices"
	"unicode/utf8"
)

// state is where the parser is. The machine is the one of vt100.net/emu/dec_ansi_parser, with UTF-8 instead of 8-bit controls and with bytes
// from 0x80 on passing through strings, so that a title may hold any text.
type state uint8

const (
	stateGround state = iota
	stateEscape
	stateEscapeInter
	stateCSI
	stateCSIIgnore
	stateOSC
	stateString // DCS, SOS, PM and APC: nothing in them is state that a snapshot could show
)

const (
	maxParams  = 32       // xterm reads 30
	maxParam   = 1 << 16  // no parameter of meaning is larger
	maxOSC     = 8 << 10  // collected of an OSC string; hyperlinks are at most 2 KiB, titles far less
	maxPending = 64 << 10 // kept of an unfinished sequence for viewers who attach in its middle
)

// parser holds a sequence while it comes in.
type parser struct {
	state state
	inter byte // last intermediate byte, 0 if none
	mark  byte // private marker: one of <=>? or 0

	params  [maxParams]int // -1 where the parameter was left out
	colon   uint32         // bit i: a colon, not a semicolon, stands before params[i]
	nparams int

	osc []byte

	// pending is the raw text of the unfinished rune or sequence: what a new viewer must get so that the bytes that follow make sense to it.
	pending []byte
	// swallow is set when pending grew too long and was replaced by the start of a string that viewers ignore.
	swallow bool
}

// hold adds to pending. Control characters are left out: inside a sequence they have been obeyed already, and inside a string they mean nothing.
func (p *parser) hold(b []byte) {
	if p.swallow {
		return
	}
	if bytes.ContainsFunc(b, obeyed) {
		b = slices.DeleteFunc(bytes.Clone(b), func(c byte) bool { return obeyed(rune(c)) })
	}
	if len(p.pending)+len(b) <= maxPending {
		p.pending = append(p.pending, b...)
		return
	}
	p.swallow = true
	p.pending = append(p.pending[:0], "\x1b_"...)
	if p.state == stateOSC {
		p.pending = append(p.pending[:0], "\x1b]7777;"...) // an OSC, since only those may end in BEL
	}
}

// obeyed tells whether a byte of an unfinished sequence is a control character, but not the escape that begins it.
func obeyed(c rune) bool { return c < 0x20 && c != 0x1b }

func (p *parser) release() {
	p.pending = p.pending[:0]
	p.swallow = false
}

// Write feeds program output to the terminal. It never fails.
func (t *Terminal) Write(p []byte) (int, error) {
	n := len(p)
	if n > 0 {
		t.pristine = false
	}
	if t.state == stateGround && len(t.pending) > 0 {
		p = t.finishRune(p)
	}
	start := 0 // where the unfinished sequence begins in p
	for i := 0; i < len(p); {
		if t.state == stateGround {
			i += t.ground(p[i:])
			start = i
			if t.state == stateEscape {
				start--
				t.release()
			}
			continue
		}
		if p[i] == 0x1b {
			start = i
			t.release()
		}
		i += t.sequence(p[i:])
		if t.state == stateGround {
			start = i
			t.release()
		}
	}
	if t.state != stateGround {
		t.hold(p[start:])
	}
	return n, nil
}

// finishRune completes a rune whose first bytes came in an earlier write, and returns what is left of p.
func (t *Terminal) finishRune(p []byte) []byte {
	for len(p) > 0 {
		t.pending = append(t.pending, p[0])
		if !utf8.FullRune(t.pending) {
			p = p[1:]
			continue
		}
		r, size := utf8.DecodeRune(t.pending)
		if r != utf8.RuneError || size > 1 {
			p = p[1:]
		}
		t.release()
		t.printRune(r)
		break
	}
	return p
}

// decodeRune decodes the first rune of p. An invalid start is one U+FFFD as long as the longest prefix that could have become a rune, which
// makes the result independent of where writes were cut. size is 0 if p holds only the beginning of a rune.
func decodeRune(p []byte) (r rune, size int) {
	r, size = utf8.DecodeRune(p)
	if r != utf8.RuneError || size != 1 {
		return r, size
	}
	for n := 1; n <= len(p); n++ {
		if utf8.FullRune(p[:n]) {
			return utf8.RuneError, max(1, n-1)
		}
	}
	return utf8.RuneError, 0
}

// ground consumes text and controls up to and including an ESC, and returns how much that was.
func (t *Terminal) ground(p []byte) int {
	looked := 0 // up to where lines were looked for that stay on the screen
	for i := 0; i < len(p); {
		b := p[i]
		switch {
		case b >= 0x20 && b < 0x7f:
			if i >= looked && t.atBottom() {
				var n int
				n, looked = t.passing(p[i:])
				i, looked = i+n, i+looked
				if n > 0 {
					continue
				}
			}
			j := i + 1
			for j < len(p) && p[j] >= 0x20 && p[j] < 0x7f {
				j++
			}
			t.printASCII(p[i:j])
			i = j
		case b == 0x1b:
			t.enter(stateEscape)
			return i + 1
		case b < 0x20:
			t.control(b)
			t.last = 0
			i++
		case b == 0x7f:
			i++
		default:
			r, size := decodeRune(p[i:])
			if size == 0 {
				t.hold(p[i:])
				return len(p)
			}
			i += size
			t.printRune(r)
		}
	}
	return len(p)
}

// atBottom reports whether the terminal is where programs that print line by line have it: in the empty last row of the whole main screen, with
// nothing special in force.
func (t *Terminal) atBottom() bool {
	c := &t.cursor
	return c.y == t.rows-1 && c.x == 0 && t.top == 0 && t.bot == t.rows-1 && t.alt == nil && c.pen == style{} && c.charset[c.gl] == 'B' &&
		!t.modes.is(modeInsert) && t.main.row(c.y).used == 0 && !t.main.row(c.y).cont && t.rows > 1
}

// passing takes from p the plain lines at its start that scroll through the screen before p ends: they go into the scrollback without becoming cells.
// It returns their length and that of all plain lines at the start of p. The terminal is atBottom, and is left with an empty screen if any were taken.
func (t *Terminal) passing(p []byte) (taken, plain int) {
	count := 0
	for {
		n := plainLine(p[plain:], t.cols)
		if n == 0 {
			break
		}
		plain += n
		count++
	}
	stay := t.rows - 1
	if count <= stay {
		return 0, plain
	}
	t.scrollUp(stay, false)
	for range count - stay {
		n := plainLine(p[taken:], t.cols)
		b := t.history.open()
		b.data = append(b.data, p[taken:taken+n-2]...)
		t.history.close(b, lineEnd{cols: uint16(n - 2)})
		taken += n
	}
	t.cursor.y, t.last = 0, 0
	return taken, plain
}

// plainLine returns the length of the line of at most cols printable ASCII characters, CR and LF that p starts with; 0 if it does not.
func plainLine(p []byte, cols int) int {
	for i, b := range p[:min(len(p), cols+1)] {
		if b < 0x20 || b >= 0x7f {
			if b == '\r' && i+1 < len(p) && p[i+1] == '\n' {
				return i + 2
			}
			return 0
		}
	}
	return 0
}

func (t *Terminal) enter(s state) {
	t.state = s
	switch s {
	case stateEscape:
		t.inter, t.mark = 0, 0
	case stateCSI:
		t.nparams, t.colon = 0, 0
		t.params[0] = -1
	case stateOSC:
		t.osc = t.osc[:0]
	}
}

// sequence consumes bytes while the parser is inside a sequence, up to its end or up to the next ESC, and returns how many.
func (t *Terminal) sequence(p []byte) int {
	for i := 0; i < len(p); i++ {
		if t.state == stateCSI && t.inter == 0 {
			i += t.parameters(p[i:])
			if i == len(p) {
				break
			}
		}
		b := p[i]
		switch {
		case b == 0x1b && i > 0:
			return i // the caller notes that a new sequence starts here
		case b == 0x1b:
			if t.state == stateOSC {
				t.dispatchOSC()
			}
			if t.state == stateOSC || t.state == stateString {
				t.last = 0
			}
			t.enter(stateEscape)
		case b == 0x18 || b == 0x1a: // CAN and SUB give up on a sequence
			t.state = stateGround
		case t.state == stateOSC:
			t.stringOSC(b)
		case t.state == stateString:
		case b < 0x20:
			t.control(b)
			t.last = 0
		case b >= 0x7f:
			// DEL is ignored, and no sequence outside strings has bytes from 0x80 on.
		case t.state == stateEscape || t.state == stateEscapeInter:
			t.escapeByte(b)
		default:
			t.csiByte(b)
		}
		if t.state == stateGround {
			return i + 1
		}
	}
	return len(p)
}

func (t *Terminal) stringOSC(b byte) {
	switch {
	case b == 0x07:
		t.dispatchOSC()
		t.last = 0
		t.state = stateGround
	case b < 0x20:
	case len(t.osc) < maxOSC:
		t.osc = append(t.osc, b)
	}
}

func (t *Terminal) escapeByte(b byte) {
	switch {
	case b < 0x30:
		t.inter = b
		t.state = stateEscapeInter
	case t.state == stateEscapeInter:
		t.state = stateGround
		t.escapeInter(t.inter, b)
		t.last = 0
	case b == '[':
		t.enter(stateCSI)
	case b == ']':
		t.enter(stateOSC)
	case b == 'P', b == 'X', b == '^', b == '_':
		t.enter(stateString)
	default:
		t.state = stateGround
		t.escape(b)
		t.last = 0
	}
}

func (t *Terminal) csiByte(b byte) {
	switch {
	case b >= 0x40:
		ignore := t.state == stateCSIIgnore
		t.state = stateGround
		if !ignore {
			if t.nparams > 0 || t.params[0] >= 0 {
				t.nparams = min(t.nparams+1, maxParams)
			}
			t.csi(b)
		}
		t.last = 0
	case t.state == stateCSIIgnore:
	case b < 0x30:
		t.inter = b
	case t.inter != 0:
		t.state = stateCSIIgnore // a parameter after an intermediate
	case t.mark == 0 && t.nparams == 0 && t.params[0] < 0:
		t.mark = b
	default:
		t.state = stateCSIIgnore
	}
}

// parameters takes the digits and separators that p starts with, and returns how many bytes they are.
func (t *Terminal) parameters(p []byte) int {
	n := t.nparams
	v := -1
	if n < maxParams {
		v = t.params[n]
	}
	i := 0
	for ; i < len(p); i++ {
		b := p[i]
		if b >= '0' && b <= '9' {
			v = min(max(v, 0)*10+int(b-'0'), maxParam)
			continue
		}
		if b != ';' && b != ':' {
			break
		}
		if n < maxParams {
			t.params[n] = v
			n++
			if b == ':' && n < maxParams {
				t.colon |= 1 << n
			}
		}
		v = -1
	}
	t.nparams = n
	if n < maxParams {
		t.params[n] = v
	}
	return i
}

// param returns parameter i, or def if it was left out or is zero.
func (p *parser) param(i, def int) int {
	if i >= p.nparams || p.params[i] <= 0 {
		return def
	}
	return p.params[i]
}
