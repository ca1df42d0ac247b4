package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestEscapes(t *testing.T) {
	for _, tt := range []struct {
		name  string
		in    []string // as separate reads
		want  string
		leave bool
	}{
		{"plain", []string{"ls -l\r"}, "ls -l\r", false},
		{"at the start", []string{"~."}, "", true},
		{"after enter", []string{"ls\r~.ignored"}, "ls\r", true},
		{"in two reads", []string{"\r~", "."}, "\r", true},
		{"within a line", []string{"cd ~.\r"}, "cd ~.\r", false},
		{"two tildes", []string{"~~.\r"}, "~.\r", false},
		{"home", []string{"~/bin\r"}, "~/bin\r", false},
		{"held back", []string{"~"}, "", false},
		{"newline counts too", []string{"x\n~."}, "x\n", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var e escapes
			var got []byte
			leave := false
			for _, in := range tt.in {
				send, l := e.feed([]byte(in))
				got, leave = append(got, send...), leave || l
			}
			if string(got) != tt.want || leave != tt.leave {
				t.Errorf("got %q, leave %v; want %q, %v", got, leave, tt.want, tt.leave)
			}
		})
	}
}

func TestCopyInput(t *testing.T) {
	var out bytes.Buffer
	if err := copyInput(&out, strings.NewReader("echo\r~.more")); !errors.Is(err, errLeave) || out.String() != "echo\r" {
		t.Errorf("got %q, %v", out.String(), err)
	}
	out.Reset()
	if err := copyInput(&out, strings.NewReader("echo")); err != nil || out.String() != "echo" {
		t.Errorf("got %q, %v", out.String(), err)
	}
}

func TestRunes(t *testing.T) {
	const text = "aä大😀z"
	for size := 1; size <= len(text); size++ {
		var got []string
		r := &runes{send: func(s string) { got = append(got, s) }}
		for i := 0; i < len(text); i += size {
			r.Write([]byte(text[i:min(i+size, len(text))]))
		}
		if joined := strings.Join(got, ""); joined != text {
			t.Errorf("in pieces of %d: %q", size, joined)
		}
		for _, piece := range got {
			if piece != strings.ToValidUTF8(piece, "?") {
				t.Errorf("in pieces of %d: %q is cut within a character", size, piece)
			}
		}
	}
	// What is no character at all must not be held back for ever.
	var got []string
	r := &runes{send: func(s string) { got = append(got, s) }}
	r.Write([]byte("\xff\x80x"))
	if diff := cmp.Diff([]string{"\xff\x80x"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestTraces(t *testing.T) {
	const output = "a\x1b[?1049hb\x1b[?25l\x1b[>1u\x1b[4 q\x1b]11;#fff\x07\x1b]8;;http://x\x07\x1b[?7;6h"
	undone := []string{leaveAlt, "\x1b[<99u", "\x1b[0 q", "\x1b]111\x1b\\", "\x1b]8;;\x1b\\", undoOrigin}
	for cut := range len(output) {
		var switches []bool
		tr := traces{switched: func(alt bool) { switches = append(switches, alt) }}
		tr.see([]byte(output[:cut]))
		tr.see([]byte(output[cut:]))
		for _, want := range undone {
			if !strings.Contains(tr.undo(), want) {
				t.Errorf("cut at %d: no %q in %q", cut, want, tr.undo())
			}
		}
		tr.see([]byte("x\x1b[?1049l$ "))
		if strings.Contains(tr.undo(), leaveAlt) {
			t.Errorf("cut at %d: the switch back is not seen", cut)
		}
		if diff := cmp.Diff([]bool{true, false}, switches); diff != "" {
			t.Errorf("cut at %d: switches (-want +got):\n%s", cut, diff)
		}
	}
	var combined traces
	combined.see([]byte("\x1b[?1006;1002;2004;25;1049h"))
	if !strings.Contains(combined.undo(), leaveAlt) {
		t.Error("the alternate screen among other modes is not seen")
	}
	combined.see([]byte("\x1b[?1049;25l"))
	if strings.Contains(combined.undo(), leaveAlt) {
		t.Error("leaving it among other modes is not seen")
	}
	var none traces
	none.see([]byte("plain \x1b[1mtext\x1b[m\x1b[?1006h\x1b[?6l and more than a sequence may have\n"))
	for _, want := range undone {
		if strings.Contains(none.undo(), want) {
			t.Errorf("%q undoes what was not done", want)
		}
	}
	if strings.HasSuffix(none.undo(), "\n") {
		t.Error("an empty line is left behind")
	}
}
