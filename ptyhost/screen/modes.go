package screen

// Modes are numbered as programs number them: DEC private ones as they are, ANSI ones negative.
const (
	modeCursorKeys = 1
	modeOrigin     = 6 // kept in cursor.origin, since DECSC saves it
	modeAutowrap   = 7
	modeVisible    = 25
	modeInsert     = -4
	modeNewline    = -20
	modeSyncOutput = 2026
	modeGraphemes  = 2027
)

// tracked lists the modes that a snapshot restores, in the order in which it sets them: 2026 is last, because a terminal shows nothing while it is
// set. All but autowrap, cursor visibility, blinking as the terminal likes it and alternate scroll are off at the start.
var tracked = [...]int{
	modeCursorKeys, 5, modeAutowrap, 12, modeVisible, 45, 66, 1004, 1005, 1006, 1007, 1015, 1016, 1034, 1036, 2004, modeGraphemes, 2031, 2048, 9001,
	modeInsert, modeNewline, modeSyncOutput,
}

// mouse lists the modes that say what mouse events are reported; setting one replaces another.
var mouse = [...]int{9, 1000, 1001, 1002, 1003}

// modes is a set: bit i is tracked[i]; mouseMode is one of mouse or 0.
type modes struct {
	set32     uint32
	mouseMode int
}

var defaultModes = func() (m modes) {
	m.set(modeAutowrap, true)
	m.set(modeVisible, true)
	return m
}()

func bit(mode int) uint32 {
	for i, m := range tracked {
		if m == mode {
			return 1 << i
		}
	}
	return 0
}

var (
	bitAutowrap  = bit(modeAutowrap)
	bitInsert    = bit(modeInsert)
	bitNewline   = bit(modeNewline)
	bitGraphemes = bit(modeGraphemes)
)

func (m *modes) is(mode int) bool {
	switch mode { // asked for every run of text and every line
	case modeAutowrap:
		return m.set32&bitAutowrap != 0
	case modeInsert:
		return m.set32&bitInsert != 0
	case modeNewline:
		return m.set32&bitNewline != 0
	case modeGraphemes:
		return m.set32&bitGraphemes != 0
	}
	return m.set32&bit(mode) != 0
}

func (m *modes) set(mode int, on bool) {
	for _, n := range mouse {
		if n == mode {
			m.mouseMode = 0
			if on {
				m.mouseMode = mode
			}
			return
		}
	}
	if on {
		m.set32 |= bit(mode)
	} else {
		m.set32 &^= bit(mode)
	}
}

func (t *Terminal) setMode(mode int, on bool) {
	c := &t.cursor
	switch mode {
	case modeOrigin:
		c.origin = on
		t.moveTo(0, 0)
	case 47, 1047:
		t.useAlt(on)
	case 1048:
		if on {
			t.screen.saved = *c
		} else {
			t.restore()
		}
	case 1049:
		if on {
			t.screen.saved = *c
			t.useAlt(true)
			return
		}
		t.useAlt(false)
		t.restore()
	default:
		t.modes.set(mode, on)
	}
}

// useAlt switches between the main and the alternate screen. The alternate one is there only while it is shown, and blank when it comes: so do
// tmux and xterm.js, and no program counts on what xterm keeps of it for mode 47.
func (t *Terminal) useAlt(on bool) {
	if on == (t.alt != nil) {
		return
	}
	if !on {
		t.screen, t.alt = t.main, nil
		return
	}
	t.alt = newGrid(t.rows, t.cols)
	t.alt.saved = newCursor()
	t.screen = t.alt
	for y := range t.rows {
		t.alt.blank(y, t.blank())
	}
}

// restore is DECRC.
func (t *Terminal) restore() {
	t.cursor = t.screen.saved
	t.cursor.y = min(t.cursor.y, t.rows-1)
	t.cursor.x = min(t.cursor.x, t.cols-1)
	if t.cursor.origin {
		t.cursor.y = max(t.top, min(t.cursor.y, t.bot))
	}
}

// keyboard is the stack of kitty keyboard flags; the last is in force.
type keyboard []int

const maxKeyboard = 16

func (k *keyboard) push(flags int) {
	if len(*k) == maxKeyboard {
		*k = append((*k)[:0:0], (*k)[1:]...)
	}
	*k = append(*k, flags)
}

func (k *keyboard) pop(n int) { *k = (*k)[:max(0, len(*k)-n)] }

// change is CSI = flags ; how u.
func (k *keyboard) change(flags, how int) {
	if len(*k) == 0 {
		*k = append(*k, 0)
	}
	f := &(*k)[len(*k)-1]
	switch how {
	case 1:
		*f = flags
	case 2:
		*f |= flags
	case 3:
		*f &^= flags
	}
}

func (t *Terminal) keys() *keyboard {
	if t.screen == t.main {
		return &t.keyboard[0]
	}
	return &t.keyboard[1]
}
