// Package golden reads the recorded frames in wire/testdata/golden, by which tests of several packages
// check what they write and what they read, byte for byte.
//
// The files were made by hand from the protocol's pages, not from what our encoders wrote; but those that
// begin with ptyhost are of a protocol that is ours alone, and recorded from the build that they name. They are
// text: hexadecimal bytes, "text" and `text` for themselves, and comments from a # on. Files are only
// added; a frame that turns out to be wrong stays, in a file that says so.
package golden

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Dir is where the files are, from the root of the repository.
const Dir = "wire/testdata/golden"

// Path returns the path of a file, wherever in the repository the test runs.
func Path(t testing.TB, name string) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return filepath.Join(dir, filepath.FromSlash(Dir), name)
		} else if !errors.Is(err, fs.ErrNotExist) || dir == filepath.Dir(dir) {
			t.Fatalf("cannot find the repository's root: %v", err)
		}
		dir = filepath.Dir(dir)
	}
}

// Bytes returns the frames of a file, one behind the other.
func Bytes(t testing.TB, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(Path(t, name+".golden"))
	if err != nil {
		t.Fatal(err)
	}
	var all []byte
	for line := range strings.Lines(string(text)) {
		b, err := parse(line)
		if err != nil {
			t.Fatalf("%s.golden: %v", name, err)
		}
		all = append(all, b...)
	}
	if len(all) == 0 {
		t.Fatalf("%s.golden holds nothing", name)
	}
	return all
}

// Step is one message of an exchange, as the side called Who sends it (Sent) or is sent it. End is the
// end of what it is sent; then there is no Message.
type Step struct {
	Who       string
	Sent, End bool
	Message   []byte
}

// Exchange returns the steps of an exchange, each a line of the form "who > bytes", "who < bytes" or
// "who < end".
func Exchange(t testing.TB, name string) []Step {
	t.Helper()
	f, err := os.Open(Path(t, name+".exchange"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var steps []Step
	for lines := bufio.NewScanner(f); lines.Scan(); {
		line, _, _ := strings.Cut(lines.Text(), "#")
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		if len(fields) < 3 || fields[1] != ">" && fields[1] != "<" {
			t.Fatalf("%s.exchange: cannot read %q", name, line)
		}
		s := Step{Who: fields[0], Sent: fields[1] == ">", End: fields[2] == "end"}
		if !s.End {
			if s.Message, err = parse(strings.Join(fields[2:], " ")); err != nil {
				t.Fatalf("%s.exchange: %v", name, err)
			}
		}
		steps = append(steps, s)
	}
	if len(steps) == 0 {
		t.Fatalf("%s.exchange holds nothing", name)
	}
	return steps
}

// parse reads one line.
func parse(line string) ([]byte, error) {
	var out []byte
	for rest := strings.TrimSpace(line); rest != "" && rest[0] != '#'; rest = strings.TrimSpace(rest) {
		if quote := rest[0]; quote == '"' || quote == '`' {
			text, after, ok := strings.Cut(rest[1:], string(quote))
			if !ok {
				return nil, fmt.Errorf("a text without an end: %q", line)
			}
			out, rest = append(out, text...), after
			continue
		}
		word, after, _ := strings.Cut(rest, " ")
		b, err := hex.DecodeString(word)
		if err != nil || len(b) != 1 {
			return nil, fmt.Errorf("%q in %q is no byte", word, line)
		}
		out, rest = append(out, b...), after
	}
	return out, nil
}
