package wire

import (
	"strings"
	"unicode"
)

// Unreadable stands for bytes of a program's output that are no text (docs/protocol.md#names).
const Unreadable = "❌"

// Text makes output fit for the protocol: each run of invalid UTF-8 and each NUL, which servers
// cannot store, becomes [Unreadable].
func Text(output string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(output, Unreadable), "\x00", Unreadable)
}

// Line makes one line of text that may have come from anywhere: what would end the line, steer a terminal or is no UTF-8
// becomes a space, and there is none at either end.
func Line(text string) string {
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == '\u2028' || r == '\u2029' || r == unicode.ReplacementChar {
			return ' '
		}
		return r
	}, text))
}
