package main

import (
	"fmt"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Text that a server or a workspace chose must not drive the terminal it is shown on: no escape
// sequence, no second line, no right-to-left override that makes one name look like another.

// clean returns s as one line that is safe to print: what is not printable shows as in a Go string.
func clean(s string) string {
	if !strings.ContainsFunc(s, hidden) && utf8.ValidString(s) {
		return s
	}
	var b strings.Builder
	for len(s) > 0 {
		r, n := utf8.DecodeRuneInString(s)
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, s[0])
		case !hidden(r):
			b.WriteRune(r)
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\t':
			b.WriteByte(' ')
		case r < 0x80:
			fmt.Fprintf(&b, `\x%02x`, r)
		case r < 0x10000:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			fmt.Fprintf(&b, `\U%08x`, r)
		}
		s = s[n:]
	}
	return b.String()
}

// hidden tells whether a character is one that a terminal obeys rather than shows.
func hidden(r rune) bool { return !unicode.IsPrint(r) }

// style matches the sequences that set colours (SGR).
var style = regexp.MustCompile("\x1b\\[[0-9;:]*m")

// cleanLog is clean for a line of a log, where colours are common: they are dropped, as are carriage
// returns that moved a progress bar.
func cleanLog(s string) string {
	s = style.ReplaceAllString(strings.TrimRight(s, "\r\n"), "")
	return clean(strings.ReplaceAll(s, "\r", " "))
}

// cleanJSON escapes what [json.Marshal] leaves as it is but a terminal would obey: DEL, the C1
// controls and invisible formatting. Such characters stand only within strings, so the value is the same.
func cleanJSON(data []byte) []byte {
	var b strings.Builder
	for _, r := range string(data) {
		switch {
		case r == '\n' || !hidden(r):
			b.WriteRune(r)
		case r < 0x10000:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			high, low := (r-0x10000)>>10+0xd800, (r-0x10000)&0x3ff+0xdc00
			fmt.Fprintf(&b, `\u%04x\u%04x`, high, low)
		}
	}
	return []byte(b.String())
}

// plain is what needs no quoting in a POSIX shell.
var plain = regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`)

// shellQuote returns s as one word of a POSIX shell.
func shellQuote(s string) string {
	if plain.MatchString(s) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
