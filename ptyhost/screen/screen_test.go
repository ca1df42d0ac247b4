package screen

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// dump is all of a terminal's state that a viewer can tell, in a form that compares: interned values are written out.
func dump(t *Terminal) string {
	var b strings.Builder
	pen := func(s style) string {
		x := t.extras.at(int(s.extra))
		return fmt.Sprintf("%x/%x/%x/%x/%s", s.fg, s.bg, s.attr, x.underline, x.link)
	}
	cur := func(name string, c cursor) {
		fmt.Fprintf(&b, "%s %d,%d wrap=%t %s %s gl=%d origin=%t\n", name, c.y, c.x, c.wrapNext, pen(c.pen), c.charset, c.gl, c.origin)
	}
	grid := func(name string, g *grid) {
		if g == nil {
			return
		}
		for y := range t.rows {
			r := g.row(y)
			fmt.Fprintf(&b, "%s %2d %t ", name, y, y > 0 && r.cont)
			var line strings.Builder
			last := style{}
			for x := range r.cells {
				c := r.cells[x]
				if c.glyph&glyphTail != 0 {
					continue
				}
				if c.style != last {
					fmt.Fprintf(&line, "{%s}", pen(c.style))
					last = c.style
				}
				text := t.text(c.glyph)
				if text == "" {
					text = " " // drawn the same
				}
				line.WriteString(text)
			}
			b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
		}
	}
	grid("main", t.main)
	if t.screen == t.alt {
		grid("alt", t.alt)
	}
	cur("cursor", t.cursor)
	cur("saved", t.screen.saved)
	fmt.Fprintf(&b, "alt=%t region=%d,%d modes=%+v shape=%d title=%q cwd=%q palette=%v keyboard=%v keypad=%t tabs=%v state=%d\n",
		t.screen == t.alt, t.top, t.bot, t.modes, t.cursorShape, t.title, t.cwd, t.palette, *t.keys(), t.keypad, t.tabs, t.state)
	return b.String()
}

// history returns the scrollback's lines as text.
func history(t *Terminal) []string {
	var lines []string
	t.history.each(t.history.lines, func(line []byte, end lineEnd) { lines = append(lines, string(line)) })
	return lines
}

func fed(cfg Config, s string) *Terminal {
	t := New(cfg)
	t.Write([]byte(s))
	return t
}

// streams are program outputs that together use what the model knows.
func streams(tb testing.TB) map[string]string {
	tb.Helper()
	var seq, long, rgb strings.Builder
	for i := range 200 {
		fmt.Fprintf(&seq, "%d\r\n", i)
		fmt.Fprintf(&long, "%d %s\r\n", i, strings.Repeat("wrap ", i%50))
		fmt.Fprintf(&rgb, "\x1b[38;2;%d;%d;%dm\x1b[48;5;%dmx\x1b[m", i, 255-i, i*7%256, i)
	}
	all := map[string]string{
		"seq":       seq.String(),
		"long":      long.String(),
		"rgb":       rgb.String() + "\x1b[1;3;4:3;58:2::1:2:3mcurly\x1b[22;24;59m plain\x1b[0m\x1b[7mrev\x1b[27;9;53m x",
		"wide":      strings.Repeat("漢字かなa", 40) + "e\u0301o\u0308 🇫🇷 ❤️ |\r\n" + strings.Repeat("한글", 39) + "a漢b",
		"alt":       "$ vim\r\n\x1b[?1049h\x1b[22;0;0t\x1b[?1h\x1b=\x1b[2J\x1b[H\x1b[1;23rfile\x1b[24;1H\x1b[7m-- INSERT --\x1b[m\x1b[2 q\x1b[10;5H\x1b[?2004h\x1b[?1002h\x1b[?1006h",
		"altleave":  "$ vim\r\nout\x1b7\x1b[?1049h\x1b[2Jin\x1b[?1049lback\x1b[?47hagain\x1b[?47l done",
		"region":    "\x1b[5;10r\x1b[?6h\x1b[2;3Hin" + strings.Repeat("\nscroll", 20) + "\x1bM\x1bM\x1b[2L\x1b[1M\x1b7\x1b[?6l\x1b[20;1H",
		"charset":   "\x1b(0lqqqk\r\nx   x\r\nmqqqj\x1b)0\x1b(B a\x0eq\x0fa\x0e",
		"tabs":      "\x1b[3g\x1b[5G\x1bH\x1b[20G\x1bH\r\tfive\ttwenty\t\x1b[Zback",
		"edit":      "0123456789\x1b[5D\x1b[2@ab\x1b[3P\x1b[4h ins\x1b[4l\x1b[2X\x1b[1K\r\n漢字漢字\x1b[3D\x1b[P\x1b[4Dx",
		"erase":     strings.Repeat("full line of text ", 100) + "\x1b[44m\x1b[10;10H\x1b[K\x1b[12;1H\x1b[J\x1b[5;5H\x1b[1J\x1b[m",
		"links":     "\x1b]8;id=1;https://a.example/\x1b\\link\x1b[31mred\x1b[m\x1b]8;;\x07 none \x1b]2;title ✓ x\x07\x1b]7;file://h/tmp\x1b\\\x1b]4;1;rgb:00/11/22\x07\x1b]10;#fff\x07",
		"keyboard":  "\x1b[>1u\x1b[>5u\x1b[=2;2u\x1b[?1049h\x1b[>3u\x1b[?1004h\x1b[?2026h",
		"wrapnext":  strings.Repeat("x", 80) + "\x1b7\x1b[3;1H" + strings.Repeat("y", 79) + "漢" + "\x1b[7;1H" + strings.Repeat("z", 80),
		"modes":     "\x1b[?25l\x1b[?7l" + strings.Repeat("n", 200) + "\x1b[?5h\x1b[?1003h\x1b[20h\x1b[3 q\x1b[10;20H",
		"rep":       "ab\x1b[90b\x1b#8\x1b[5;5H\x1b[3S\x1b[2T\x1b[3^x",
		"strings":   "a\x1bPq#0;2;0;0;0#0~~@@vv\x1b\\b\x1b_Gf=100;QUJD\x1b\\c\x1b^pm\x1b\\d\x1b]52;c;QUJD\x07e\x1b]133;A\x07f\x18g\x1b[1;2\x18h",
		"invalid":   "a\xff\xc3(\xe2\x82b\xf0\x9f\x98\x1b[31mc\xed\xa0\x80d\xc2\x9b31me",
		"softreset": "\x1b[3;5r\x1b[1;31m\x1b[?25l\x1b[4h\x1b[!pplain\x1bcreset",
	}
	for name, data := range recorded(tb) {
		all[name] = data
	}
	return all
}

// cuts is at how many points of each stream a viewer attaches.
const cuts = 100

// TestLateViewer attaches a viewer at every point of every stream, inside runes and sequences too, and wants it to end where one that saw
// everything ends.
func TestLateViewer(t *testing.T) {
	for name, s := range streams(t) {
		t.Run(name, func(t *testing.T) {
			want := dump(fed(Config{}, s))
			step := max(1, len(s)/cuts)
			if len(s) > 1<<14 { // recorded; TestOracleRecorded has more
				step *= 5
			}
			for cut := 0; cut <= len(s); cut += step {
				model := fed(Config{}, s[:cut])
				viewer := New(Config{})
				viewer.Write(model.Snapshot(View{}))
				if diff := cmp.Diff(dump(model), dump(viewer)); diff != "" {
					t.Fatalf("cut at %d after %q: the snapshot differs (-model +viewer):\n%s", cut, s[max(0, cut-20):cut], diff)
				}
				viewer.Write([]byte(s[cut:]))
				if diff := cmp.Diff(want, dump(viewer)); diff != "" {
					t.Fatalf("cut at %d after %q: (-stayed +late):\n%s", cut, s[max(0, cut-20):cut], diff)
				}
			}
		})
	}
}

// TestCatchUp gives a viewer who is in any state, even inside a sequence, a snapshot of another.
func TestCatchUp(t *testing.T) {
	all := streams(t)
	for _, from := range []string{"vim", "region", "charset", "links", "modes", "keyboard"} {
		was := all[from]
		for name, s := range all {
			model := fed(Config{}, s)
			viewer := fed(Config{}, was+"\x1b]2;torn")
			viewer.Write(model.Snapshot(View{Lines: -1}))
			if model.title == "" {
				viewer.title = "" // there is no way to unset a title
			}
			if model.cwd == "" {
				viewer.cwd = ""
			}
			viewer.tabs, model.tabs = nil, nil // nor to restore the default tab stops in one go
			viewer.cursorShape, model.cursorShape = 0, 0
			if len(viewer.palette) == 0 && len(model.palette) == 0 || !model.sawPalette {
				viewer.palette, model.palette = nil, nil
			}
			if !model.sawKeyboard {
				viewer.keyboard = model.keyboard
			}
			if diff := cmp.Diff(dump(model), dump(viewer)); diff != "" {
				t.Fatalf("from %s to %s (-model +viewer):\n%s", from, name, diff)
			}
		}
	}
}

// TestChunks wants the result to be the same however the output was cut.
func TestChunks(t *testing.T) {
	for name, s := range streams(t) {
		t.Run(name, func(t *testing.T) {
			want := dump(fed(Config{}, s))
			rng := rand.New(rand.NewPCG(1, 2))
			for range 20 {
				got := New(Config{})
				for rest := []byte(s); len(rest) > 0; {
					n := 1 + rng.IntN(min(len(rest), 7))
					got.Write(rest[:n])
					rest = rest[n:]
				}
				if diff := cmp.Diff(want, dump(got)); diff != "" {
					t.Fatalf("in pieces (-whole +pieces):\n%s", diff)
				}
			}
		})
	}
}

func TestPristineSnapshotIsEmpty(t *testing.T) {
	if got := New(Config{}).Snapshot(View{}); len(got) != 0 {
		t.Errorf("snapshot of a new terminal: %q, want nothing", got)
	}
}

func TestScrollback(t *testing.T) {
	term := New(Config{Rows: 5, Cols: 20, Lines: 100})
	for i := range 1000 {
		fmt.Fprintf(term, "line %d\r\n", i)
	}
	lines := history(term)
	if len(lines) != 100 || lines[0] != "line 896" || lines[99] != "line 995" {
		t.Errorf("scrollback holds %d lines from %q to %q", len(lines), lines[0], lines[len(lines)-1])
	}
	viewer := New(Config{Rows: 5, Cols: 20})
	viewer.Write(term.Snapshot(View{}))
	if diff := cmp.Diff(lines, history(viewer)); diff != "" {
		t.Errorf("a viewer's scrollback (-model +viewer):\n%s", diff)
	}
	viewer = New(Config{Rows: 5, Cols: 20})
	viewer.Write(term.Snapshot(View{Lines: 7}))
	if diff := cmp.Diff(lines[93:], history(viewer)); diff != "" {
		t.Errorf("a viewer's last seven lines (-model +viewer):\n%s", diff)
	}
}

func TestScrollbackBytesBounded(t *testing.T) {
	const bound = 256 << 10
	term := New(Config{Rows: 5, Cols: 200, Bytes: bound})
	long := []byte(strings.Repeat("0123456789", 19) + "\r\n")
	for range 20_000 {
		term.Write(long)
	}
	if got := term.history.bytes; got > bound+blockSize {
		t.Errorf("scrollback holds %d bytes, over its bound of %d", got, bound)
	}
	if term.history.lines < 1000 {
		t.Errorf("scrollback kept only %d lines", term.history.lines)
	}
	if term.Lines() != 20_000-4 {
		t.Errorf("scrollback counted %d lines", term.Lines())
	}
}

func TestPendingBounded(t *testing.T) {
	for _, start := range []string{"\x1b]52;c;", "\x1bP", "\x1b_"} {
		term := New(Config{})
		term.Write([]byte(start))
		chunk := bytes.Repeat([]byte("QUJD"), 1024)
		for range 1000 {
			term.Write(chunk)
		}
		if len(term.pending) > maxPending || len(term.osc) > maxOSC {
			t.Fatalf("%q: %d bytes are held", start, len(term.pending))
		}
		viewer := New(Config{})
		viewer.Write(term.Snapshot(View{}))
		viewer.Write([]byte("tail\x1b\\after"))
		if got := strings.TrimSpace(rowText(viewer, 0)); got != "after" {
			t.Errorf("%q: a viewer in the middle of the string shows %q", start, got)
		}
	}
}

func rowText(t *Terminal, y int) string {
	var b strings.Builder
	for _, c := range t.screen.row(y).cells {
		switch {
		case c.glyph&glyphTail != 0:
		case c.glyph == 0:
			b.WriteByte(' ')
		default:
			b.WriteString(t.text(c.glyph))
		}
	}
	return strings.TrimRight(b.String(), " ")
}

func TestResizeReflows(t *testing.T) {
	text := strings.Repeat("abcdefghij", 12) + "\r\n$ "
	term := fed(Config{Rows: 6, Cols: 40}, text)
	term.Resize(6, 60)
	want := []string{strings.Repeat("abcdefghij", 6), strings.Repeat("abcdefghij", 6), "$", "", "", ""}
	var got []string
	for y := range 6 {
		got = append(got, rowText(term, y))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("wider (-want +got):\n%s", diff)
	}
	if term.cursor.y != 2 || term.cursor.x != 2 {
		t.Errorf("cursor at %d,%d, want 2,2", term.cursor.y, term.cursor.x)
	}
	term.Resize(3, 40)
	term.Resize(6, 40)
	again := fed(Config{Rows: 6, Cols: 40}, text)
	for y := range 6 {
		if got, want := rowText(term, y), rowText(again, y); got != want {
			t.Errorf("after shrinking and growing, row %d is %q, want %q", y, got, want)
		}
	}
}

func TestResizeKeepsScrollback(t *testing.T) {
	term := New(Config{Rows: 10, Cols: 40})
	for i := range 50 {
		fmt.Fprintf(term, "line %d\r\n", i)
	}
	for _, s := range []struct{ rows, cols int }{{20, 40}, {5, 30}, {5, 3}, {1, 1}, {50, 200}, {10, 40}} {
		term.Resize(s.rows, s.cols)
	}
	var all []string
	all = append(all, history(term)...)
	for y := range term.rows {
		all = append(all, rowText(term, y))
	}
	text := strings.Join(all, "\n")
	for i := range 50 {
		if !strings.Contains(text, fmt.Sprintf("line %d", i)) {
			t.Fatalf("line %d is lost:\n%s", i, text)
		}
	}
}

func TestSnapshotForAnotherSize(t *testing.T) {
	term := New(Config{Rows: 24, Cols: 80})
	for i := range 100 {
		fmt.Fprintf(term, "line %d\r\n", i)
	}
	viewer := New(Config{Rows: 10, Cols: 40})
	viewer.Write(term.Snapshot(View{Rows: 10, Cols: 40}))
	if got := rowText(viewer, 8); got != "line 99" {
		t.Errorf("the line above the cursor is %q, want line 99", got)
	}
	if len(history(viewer)) < 77 {
		t.Errorf("only %d lines of scrollback", len(history(viewer)))
	}
}

// fuzzed makes a terminal of any size, feeds it, resizes it in between, and bounds what it may keep.
func fuzzed(s []byte, cut uint16, rows, cols, rows2, cols2 uint8) *Terminal {
	t := New(Config{Rows: int(rows%60) + 1, Cols: int(cols%140) + 1, Lines: 50, Bytes: 64 << 10})
	at := min(int(cut), len(s))
	t.Write(s[:at])
	t.Resize(int(rows2%60), int(cols2%140)) // zero is none
	t.Write(s[at:])
	return t
}

func seed(f *testing.F) {
	for _, s := range streams(f) {
		f.Add([]byte(s[:min(len(s), 2048)]), uint16(len(s)/2), uint8(23), uint8(79), uint8(30), uint8(60))
	}
}

// FuzzTerminal feeds a terminal anything: it keeps its shape and its bounds.
func FuzzTerminal(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, s []byte, cut uint16, rows, cols, rows2, cols2 uint8) {
		term := fuzzed(s, cut, rows, cols, rows2, cols2)
		for _, g := range []*grid{term.main, term.alt} {
			if g == nil {
				continue
			}
			if len(g.rows) != term.rows {
				t.Fatalf("%d rows, want %d", len(g.rows), term.rows)
			}
			for y, r := range g.rows {
				if len(r.cells) != term.cols || r.used > term.cols {
					t.Fatalf("row %d has %d columns, %d of them used, want %d", y, len(r.cells), r.used, term.cols)
				}
			}
		}
		if c := term.cursor; c.x < 0 || c.x >= term.cols || c.y < 0 || c.y >= term.rows {
			t.Fatalf("the cursor is at %d,%d", c.y, c.x)
		}
		if h := &term.history; h.lines > 50 || h.bytes > 64<<10+2*blockSize+8*len(s) {
			t.Fatalf("the scrollback holds %d lines and %d bytes", h.lines, h.bytes)
		}
		if len(term.pending) > maxPending || len(term.clusters.values) > maxClusters || len(term.extras.values) > maxExtras {
			t.Fatal("something grows without bound")
		}
		term.Snapshot(View{Rows: 10, Cols: 200})
		term.Snapshot(View{Rows: 3, Cols: 7, Lines: 5})
	})
}

// FuzzSnapshot gives a new terminal a snapshot of one that was fed anything, and wants it to be the same, and to stay so.
func FuzzSnapshot(f *testing.F) {
	seed(f)
	f.Fuzz(wantSnapshot)
}

func wantSnapshot(t *testing.T, s []byte, cut uint16, rows, cols, rows2, cols2 uint8) {
	term := fuzzed(s, cut, rows, cols, rows2, cols2)
	viewer := New(Config{Rows: term.rows, Cols: term.cols, Lines: 50, Bytes: 64 << 10})
	snapshot := term.Snapshot(View{})
	viewer.Write(snapshot)
	if diff := cmp.Diff(dump(term), dump(viewer)); diff != "" {
		t.Fatalf("%q: the snapshot differs (-model +viewer):\n%s\n%q", s, diff, snapshot)
	}
	term.Write(s)
	viewer.Write(s)
	if diff := cmp.Diff(dump(term), dump(viewer)); diff != "" {
		t.Fatalf("%q: after more output (-stayed +late):\n%s", s, diff)
	}
}

// words are what programs are made of; digits in them are replaced by others.
var words = []string{
	"text", "x", "漢", "e\u0301", "👩\u200d🚀", "❤️", "🇫🇷", "a longer piece of text that wraps in most terminals ", "\r\n", "\n", "\r", "\b", "\t", "\x0e", "\x0f",
	"\x1b7", "\x1b8", "\x1bD", "\x1bE", "\x1bH", "\x1bM", "\x1bc", "\x1b(0", "\x1b)0", "\x1b(B", "\x1b*A", "\x1bn", "\x1b#8", "\x1b=", "\x1b>",
	"\x1b[9@", "\x1b[9A", "\x1b[9B", "\x1b[9C", "\x1b[9D", "\x1b[9G", "\x1b[9;9H", "\x1b[2J", "\x1b[1J", "\x1b[J", "\x1b[3J", "\x1b[K", "\x1b[1K", "\x1b[2K", "\x1b[9L", "\x1b[9M",
	"\x1b[9P", "\x1b[9S", "\x1b[9T", "\x1b[9X", "\x1b[9Z", "\x1b[9I", "\x1b[9b", "\x1b[9d", "\x1b[g", "\x1b[3g", "\x1b[9;19r", "\x1b[r", "\x1b[s", "\x1b[u", "\x1b[9 @", "\x1b[9 A", "\x1b[9'}", "\x1b[9'~",
	"\x1b[m", "\x1b[1m", "\x1b[4:9m", "\x1b[7m", "\x1b[39m", "\x1b[49m", "\x1b[38;5;9m", "\x1b[48;2;9;9;9m", "\x1b[41m", "\x1b[58;5;9m", "\x1b[22m", "\x1b[95m",
	"\x1b[4h", "\x1b[4l", "\x1b[20h", "\x1b[20l", "\x1b[?6h", "\x1b[?6l", "\x1b[?7h", "\x1b[?7l", "\x1b[?25l", "\x1b[?25h", "\x1b[?47h", "\x1b[?47l", "\x1b[?1049h", "\x1b[?1049l", "\x1b[?1048h", "\x1b[?1048l",
	"\x1b[?1h", "\x1b[?1003h", "\x1b[?1006h", "\x1b[?2004h", "\x1b[?2026h", "\x1b[?2026l", "\x1b[?2027h", "\x1b[?2027l", "\x1b[!p", "\x1b[9 q", "\x1b[>9u", "\x1b[<9u", "\x1b[=9;1u",
	"\x1b]2;title 9\x07", "\x1b]8;;http://9\x07", "\x1b]8;;\x07", "\x1b]7;file:///9\x1b\\", "\x1b]4;9;#123\x07", "\x1b]104\x07", "\x1b]10;#999\x07", "\x1b[22;0t", "\x1b[23;0t", "\x1bP9q\x1b\\",
}

// program makes output of pairs of bytes: one names a word, the other what number is in it.
func program(p []byte) []byte {
	var out []byte
	for ; len(p) >= 2; p = p[2:] {
		out = append(out, strings.ReplaceAll(words[int(p[0])%len(words)], "9", strconv.Itoa(int(p[1])%30))...)
	}
	return out
}

// FuzzProgram does what FuzzSnapshot does with output that consists of whole words, cut anywhere.
func FuzzProgram(f *testing.F) {
	rng := rand.New(rand.NewPCG(5, 6))
	for range 20 {
		p := make([]byte, 120)
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		f.Add(p, uint16(100), uint8(9), uint8(29), uint8(12), uint8(25))
	}
	f.Fuzz(func(t *testing.T, p []byte, cut uint16, rows, cols, rows2, cols2 uint8) {
		wantSnapshot(t, program(p), cut, rows, cols, rows2, cols2)
	})
}

// BenchmarkWrite feeds a terminal whose scrollback is full as fast as it takes output, 4 KiB at a time as the kernel gives it.
func BenchmarkWrite(b *testing.B) {
	all := recorded(b)
	var listing strings.Builder
	for i := range 2000 { // as ls --color -lR prints
		fmt.Fprintf(&listing, "-rw-r--r-- 1 user user %7d Jan %2d 10:%02d \x1b[0m\x1b[01;3%dmfile_%d.go\x1b[0m\r\n", i*77, i%28+1, i%60, i%7+1, i)
	}
	for _, data := range []struct{ name, text string }{
		{"plain", strings.Repeat("the quick brown fox jumps over the lazy dog 0123456789 abcdefghij\r\n", 1000)},
		{"yes", strings.Repeat("y\r\n", 10000)},
		{"seq", sequence(50_000)},
		{"listing", listing.String()},
		{"build", all["build"]},
		{"truecolor", all["truecolor"]},
		{"vim", all["vim"]},
		{"cjk", all["cjk"]},
		{"emoji", all["emoji"]},
	} {
		b.Run(data.name, func(b *testing.B) {
			term := fed(Config{}, sequence(DefaultLines+100))
			p := []byte(data.text)
			b.SetBytes(int64(len(p)))
			b.ReportAllocs()
			for b.Loop() {
				for rest := p; len(rest) > 0; {
					n := min(len(rest), 4<<10)
					term.Write(rest[:n])
					rest = rest[n:]
				}
			}
		})
	}
}
