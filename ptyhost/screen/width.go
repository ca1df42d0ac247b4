package screen

import "github.com/mattn/go-runewidth"

// widths counts columns per code point, as xterm, xterm.js and the C library's wcwidth do: programs move their cursor by that count, so a
// model that measured whole graphemes would disagree with every program that does not ask for mode 2027.
var widths = &runewidth.Condition{StrictEmojiNeutral: true}

func runeWidth(r rune) int {
	switch {
	case r < 0x300:
		return 1 // the soft hyphen too, as wcwidth has it
	case r >= 0x4e00 && r <= 0x9fff, r >= 0xac00 && r <= 0xd7a3:
		return 2
	case r >= 0x2500 && r <= 0x25fc: // boxes and blocks, the bread of TUIs
		return 1
	}
	return widths.RuneWidth(r)
}
