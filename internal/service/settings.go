package service

import (
	"maps"
	"slices"
	"strings"
)

// Settings are variables by name, as they stand in the file that systemd reads for berthd (systemd.exec(5), EnvironmentFile=).
type Settings map[string]string

// parseSettings reads what berthd reads of such a file. A value over several lines is read up to the end of its first.
func parseSettings(text []byte) Settings {
	s := Settings{}
	for _, line := range lines(text) {
		if name, value, ok := setting(line); ok {
			s[name] = unquote(value)
		}
	}
	return s
}

// setting splits a line that sets a variable.
func setting(line string) (name, value string, ok bool) {
	line = strings.TrimSpace(line)
	if strings.HasPrefix(line, "#") || strings.HasPrefix(line, ";") {
		return "", "", false
	}
	name, value, ok = strings.Cut(line, "=")
	return strings.TrimSpace(name), strings.TrimSpace(value), ok
}

// apply returns the text with the settings in it: in the place of the line that sets one, else at the end. All else stays as it is.
func (s Settings) apply(text []byte) []byte {
	var b strings.Builder
	left := maps.Clone(s)
	for _, line := range lines(text) {
		if name, value, ok := setting(line); ok {
			if want, ours := s[name]; ours {
				delete(left, name)
				if unquote(value) != want {
					line = name + "=" + quote(want)
				}
			}
		}
		b.WriteString(line + "\n")
	}
	for _, name := range slices.Sorted(maps.Keys(left)) {
		b.WriteString(name + "=" + quote(left[name]) + "\n")
	}
	return []byte(b.String())
}

// escaped is what a backslash makes itself of within double quotes.
const escaped = "\"\\`$"

// quote writes a value so that systemd reads it as it is.
func quote(value string) string {
	plain := func(r rune) bool {
		return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("_-./:=@,%+~", r)
	}
	if !strings.ContainsFunc(value, func(r rune) bool { return !plain(r) }) {
		return value
	}
	var b strings.Builder
	b.WriteByte('"')
	for i := range len(value) {
		if strings.IndexByte(escaped, value[i]) >= 0 {
			b.WriteByte('\\')
		}
		b.WriteByte(value[i])
	}
	b.WriteByte('"')
	return b.String()
}

// unquote reads a value as systemd does.
func unquote(value string) string {
	if len(value) >= 2 && value[0] == '\'' && value[len(value)-1] == '\'' {
		return value[1 : len(value)-1]
	}
	within := len(value) >= 2 && value[0] == '"' && value[len(value)-1] == '"'
	if within {
		value = value[1 : len(value)-1]
	}
	var b strings.Builder
	for i := 0; i < len(value); i++ {
		if value[i] == '\\' && i+1 < len(value) && (!within || strings.IndexByte(escaped, value[i+1]) >= 0) {
			i++
		}
		b.WriteByte(value[i])
	}
	return b.String()
}

// masked hides the value in a line of settings that may hold a credential: headers, and tokens that somebody put there.
func masked(line string) string {
	name, value, ok := strings.Cut(line, "=")
	secret := strings.Contains(name, "HEADER") || strings.HasSuffix(name, "TOKEN")
	if !ok || !secret || value == "" {
		return line
	}
	return name + "=(not shown)"
}
