package screen

import (
	"runtime"
	"strings"
	"testing"
)

// full are scrollbacks filled to one of their bounds.
var full = []struct{ name, line string }{
	{"empty", ""},
	{"short", "a line\r\n"},
	{"prose", "the quick brown \x1b[32mfox\x1b[m jumps over the lazy dog, and the line is as long as most\r\n"},
	// Every cell has a colour of its own, so the bound in bytes is the one that is met.
	{"truecolor", strings.Repeat("\x1b[38;2;1;2;3m\x1b[48;2;4;5;6m▀\x1b[38;2;7;8;9m\x1b[48;2;10;11;12m▀", 40) + "\x1b[m\r\n"},
}

func filled(line string) *Terminal {
	t := New(Config{})
	if line != "" {
		t.Write([]byte(strings.Repeat(line, DefaultLines+100)))
	}
	return t
}

// BenchmarkMemory reports what a terminal holds.
func BenchmarkMemory(b *testing.B) {
	for _, f := range full {
		b.Run(f.name, func(b *testing.B) {
			var before, after runtime.MemStats
			var lines int
			for b.Loop() {
				runtime.GC()
				runtime.ReadMemStats(&before)
				t := filled(f.line)
				runtime.GC()
				runtime.ReadMemStats(&after)
				lines = t.history.lines
			}
			b.ReportMetric(float64(after.HeapAlloc)-float64(before.HeapAlloc), "B/terminal")
			b.ReportMetric(float64(lines), "lines")
		})
	}
}

// BenchmarkSnapshot makes the snapshot that an attach sends.
func BenchmarkSnapshot(b *testing.B) {
	for _, f := range full {
		b.Run(f.name, func(b *testing.B) {
			t := filled(f.line)
			b.SetBytes(int64(len(t.Snapshot(View{}))))
			b.ReportAllocs()
			for b.Loop() {
				t.Snapshot(View{})
			}
		})
	}
}

// BenchmarkResize makes a terminal with a full scrollback narrower and wider again.
func BenchmarkResize(b *testing.B) {
	t := filled(full[2].line)
	for b.Loop() {
		t.Resize(24, 60)
		t.Resize(24, 80)
	}
}
