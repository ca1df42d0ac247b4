package screen

import (
	"sync/atomic"
	"unicode"

	"github.com/clipperhouse/uax29/v2/graphemes"
	"github.com/mattn/go-runewidth"
)

// Columns are counted per code point, as the C library's wcwidth counts them: programs place their cursor by that count, so a model that measured
// whole graphemes would disagree with every program that has not asked for it with mode 2027.

// widths holds the widths of 256 code points, worked out when the first of them is printed.
var widths [(unicode.MaxRune + 1) >> 8]atomic.Pointer[[256]uint8]

func runeWidth(r rune) int {
	block := widths[r>>8].Load()
	if block == nil {
		block = new([256]uint8)
		for i := range block {
			block[i] = uint8(measure(r&^0xff | rune(i)))
		}
		widths[r>>8].Store(block)
	}
	return int(block[r&0xff])
}

var eastAsian = &runewidth.Condition{StrictEmojiNeutral: true}

// measure works out the width of r. The tables of go-runewidth know what is wide; for what has no width they lack the marks of most scripts.
func measure(r rune) int {
	switch {
	case r < 0x300: // the soft hyphen too
		return 1
	case unicode.Is(unicode.Cf, r) && unicode.Is(unicode.Prepended_Concatenation_Mark, r): // stand before the digits they enclose
		return 1
	case unicode.In(r, unicode.Mn, unicode.Me, unicode.Cf, unicode.Zl, unicode.Zp), r >= 0x1160 && r <= 0x11ff, r >= 0xd7b0 && r <= 0xd7ff: // vowels and finals of Hangul join
		return 0
	}
	return max(1, eastAsian.RuneWidth(r))
}

// joins tells whether r belongs to the same grapheme cluster as the text before it.
func joins(text string, r rune) bool {
	whole := text + string(r)
	clusters := graphemes.FromString(whole)
	return clusters.Next() && len(clusters.Value()) == len(whole)
}

// emojiStyle asks for the picture of the character before it, which has two columns.
const emojiStyle = 0xfe0f
