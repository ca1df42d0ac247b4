package control

import (
	"regexp"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/berthd/berth/wire"
)

// What programs in a workspace print is hostile input: it is shown in terminals and on pages of
// people who did not run them.

// unreadable stands for what is no text.
const unreadable = "❌"

// sgr matches an escape sequence that sets colours and weight, the only kind a log line keeps.
var sgr = regexp.MustCompile(`^\x1b\[[0-9;:]*m`)

// logText makes a line of output fit to be stored and shown: invalid UTF-8 and NUL become a visible
// mark, as on stock servers. Of control characters only tab, carriage return and colour sequences
// stay, and a line break within becomes a space; the others move a reader's cursor, set his window title,
// write to his clipboard, or let him read a line in another order than it was written in.
func logText(line string) string {
	line = strings.ReplaceAll(strings.ToValidUTF8(strings.TrimSuffix(line, "\n"), unreadable), "\x00", unreadable)
	if !strings.ContainsFunc(line, isControl) {
		return line
	}
	var b strings.Builder
	b.Grow(len(line))
	for i := 0; i < len(line); {
		r, size := utf8.DecodeRuneInString(line[i:])
		switch {
		case !isControl(r):
			b.WriteString(line[i : i+size])
		case r == '\n' || r == lineSeparator || r == paragraphSeparator:
			b.WriteByte(' ') // what follows shall not pass for a line of its own
		case r == '\x1b':
			if keep := sgr.FindString(line[i:]); keep != "" {
				b.WriteString(keep)
				size = len(keep)
			} else {
				size = escapeLength(line[i:])
			}
		}
		i += size
	}
	return b.String()
}

const lineSeparator, paragraphSeparator = '\u2028', '\u2029'

func isControl(r rune) bool {
	switch {
	case r == '\t' || r == '\r':
		return false
	case '\u202a' <= r && r <= '\u202e', '\u2066' <= r && r <= '\u2069': // what sets a direction for all that follows
		return true
	case r == lineSeparator || r == paragraphSeparator:
		return true
	}
	return unicode.IsControl(r)
}

// escapeLength is how many bytes the escape sequence at the start of s takes: at least the escape
// itself, at most all of s.
func escapeLength(s string) int {
	if len(s) < 2 {
		return len(s)
	}
	switch s[1] {
	case '[': // CSI: parameters, then one final byte
		for i := 2; i < len(s); i++ {
			if s[i] >= 0x40 && s[i] <= 0x7e {
				return i + 1
			}
			if s[i] < 0x20 || s[i] > 0x7e {
				return i
			}
		}
		return len(s)
	case ']', 'P', 'X', '^', '_': // strings, ended by BEL or ESC \
		for i := 2; i < len(s); i++ {
			if s[i] == '\a' {
				return i + 1
			}
			if s[i] == '\x1b' && i+1 < len(s) && s[i+1] == '\\' {
				return i + 2
			}
		}
		return len(s)
	}
	if s[1] >= 0x20 && s[1] <= 0x7e {
		return 2
	}
	return 1
}

// tag matches what a browser would take for markup.
var tag = regexp.MustCompile(`<[/!?A-Za-z][^>]*>?`)

// statusText makes the message of an app status one plain line: unescaped as a Go string if it is
// one, without markup and escape sequences, white space collapsed.
func statusText(message string) string {
	message = strings.ToValidUTF8(message, "")
	if plain, err := strconv.Unquote(`"` + message + `"`); err == nil {
		message = strings.ToValidUTF8(plain, "")
	}
	// First what is not shown, so that nothing of it stands inside of what looks like a tag.
	var b strings.Builder
	for i := 0; i < len(message); {
		r, size := utf8.DecodeRuneInString(message[i:])
		switch {
		case r == '\x1b':
			size = escapeLength(message[i:])
		case unicode.IsSpace(r):
			b.WriteByte(' ')
		case unicode.IsPrint(r):
			b.WriteRune(r)
		}
		i += size
	}
	message = b.String()
	// What remains after a tag is cut out may be a tag again.
	for tag.MatchString(message) {
		message = tag.ReplaceAllString(message, "")
	}
	return strings.Join(strings.Fields(message), " ")
}

// statusURI keeps a link that can be shown, and drops one that would run in the page that shows it.
func statusURI(uri string) string {
	uri = strings.TrimSpace(uri)
	if !utf8.ValidString(uri) || strings.ContainsFunc(uri, unicode.IsControl) || len(uri) > wire.MaxURI {
		return ""
	}
	scheme, _, _ := strings.Cut(strings.ToLower(uri), ":")
	switch scheme {
	case "javascript", "vbscript", "data":
		return ""
	}
	return uri
}
