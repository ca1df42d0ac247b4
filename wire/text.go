package wire

import "strings"

// Unreadable stands for bytes of a program's output that are no text (docs/protocol.md#names).
const Unreadable = "❌"

// Text makes output fit for the protocol: each run of invalid UTF-8 and each NUL, which servers
// cannot store, becomes [Unreadable].
func Text(output string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(output, Unreadable), "\x00", Unreadable)
}
