package reporter

import (
	"bytes"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/berthd/berth/mask"
	"github.com/berthd/berth/wire/agentpb"
)

// cut returns the lines of parts, written one after the other.
func cut(parts ...string) []string { return cutMasked(nil, parts...) }

func cutMasked(m *mask.Masker, parts ...string) []string {
	c := cutter{mask: m}
	var lines []string
	emit := func(line []byte) { lines = append(lines, string(line)) }
	for _, p := range parts {
		c.feed([]byte(p), emit)
	}
	c.end(emit)
	return lines
}

func TestLines(t *testing.T) {
	long := strings.Repeat("x", maxLine)
	for _, c := range []struct {
		name  string
		parts []string
		want  []string
	}{
		{"nothing", []string{""}, nil},
		{"one", []string{"a\n"}, []string{"a"}},
		{"no end", []string{"a\nb"}, []string{"a", "b"}},
		{"empty lines", []string{"\n\na\n\n"}, []string{"", "", "a", ""}},
		{"in parts", []string{"a", "b\nc", "\n"}, []string{"ab", "c"}},
		{"CRLF", []string{"a\r\nb\r", "\n"}, []string{"a", "b"}},
		{"progress bar", []string{"10%\r20", "%\r\r30%", "\nend"}, []string{"30%", "end"}},
		{"CR at the end", []string{"a\r"}, []string{"a"}},
		{"lone CR", []string{"\r\n"}, []string{""}},
		{"NUL", []string{"a\x00b"}, []string{"a❌b"}},
		{"invalid UTF-8", []string{"a\xff\xfeb", "\xc3\n"}, []string{"a❌b❌"}},
		{"UTF-8 in parts", []string{"\xc3", "\xa9\n"}, []string{"é"}},
		{"as long as may be", []string{long + "\n"}, []string{long}},
		{"too long", []string{long, "yz\na\n"}, []string{long + "… [berth: 2 more bytes]", "a"}},
		{"cut in a character", []string{long[1:] + "é!\n"}, []string{long[1:] + "… [berth: 3 more bytes]"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, cut(c.parts...)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestSecretsAreHiddenInLines(t *testing.T) {
	m := mask.New("s3cret-value", "BEGIN PRIVATE\nMIIEabcdefgh\n")
	long := strings.Repeat("x", maxLine)
	for _, c := range []struct {
		name  string
		parts []string
		want  []string
	}{
		{"in two writes", []string{"a s3cr", "et-value b\n"}, []string{"a [hidden] b"}},
		{"without an end", []string{"s3cret-value"}, []string{"[hidden]"}},
		{"several lines", []string{"BEGIN PRIVATE\r\nMIIEabcdefgh\n"}, []string{"[hidden]", "[hidden]"}},
		{"overwritten in part", []string{"s3cret-\rs3cret-value\n"}, []string{"[hidden]"}},
		{"across the cut", []string{long[12:], "s3cret-", "value\n"}, []string{long[12:] + "[hidden]"}},
		{"behind the cut", []string{long[5:], "s3cret-value\n"}, []string{long[5:] + "… [berth: 12 more bytes]"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, cutMasked(m, c.parts...)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestHugeLineIsHeldInLittleMemory(t *testing.T) {
	var c cutter
	part := bytes.Repeat([]byte("x"), 1<<20)
	for range 10 {
		c.feed(part, func([]byte) { t.Error("a line without end was passed on") })
	}
	if cap(c.line) > 4*maxLine {
		t.Errorf("%d bytes are held", cap(c.line))
	}
	c.end(func(line []byte) {
		if !strings.HasSuffix(string(line), "… [berth: 10469376 more bytes]") {
			t.Errorf("mark %q", line[maxLine:])
		}
	})
}

func FuzzLines(f *testing.F) {
	const secret = "s3cret-value"
	masker := mask.New(secret)
	f.Add([]byte("a "+secret+"\n"+strings.Repeat("x", maxLine-5)+secret), maxLine)
	f.Add([]byte("a\r\nb\rc\x00\xff\n"), 3)
	f.Add([]byte(strings.Repeat("é", maxLine)+"\n"), maxLine)
	f.Add(bytes.Repeat([]byte{0}, 2*maxLine), 7)
	f.Fuzz(func(t *testing.T, b []byte, at int) {
		at = min(max(at, 0), len(b))
		lines := cutMasked(masker, string(b))
		if diff := cmp.Diff(lines, cutMasked(masker, string(b[:at]), string(b[at:]))); diff != "" {
			t.Errorf("in two parts it is other lines (-one +two):\n%s", diff)
		}
		if want := bytes.Count(b, []byte("\n")); len(lines) < want || len(lines) > want+1 {
			t.Errorf("%d lines of %d line ends", len(lines), want)
		}
		for _, line := range lines {
			if !utf8.ValidString(line) || strings.ContainsAny(line, "\x00\n\r") || len(line) > maxLine+maxMark || strings.Contains(strings.ReplaceAll(line, mask.Hidden, "\n"), secret) {
				t.Errorf("line %q", line)
			}
		}
	})
}

func FuzzWalk(f *testing.F) {
	r := record{kind: kindLine, level: agentpb.Log_INFO, source: sourceA, sequence: 7, count: 1, time: time.Unix(0, 99), text: []byte("text")}
	gap := record{kind: kindGap, source: sourceB, sequence: 1, count: 5, time: time.Unix(0, 1), text: []byte{}}
	var lines batches
	lines.add([]byte("one"), 4)
	lines.add(bytes.Repeat([]byte("x"), fullBatch), 5+fullBatch)
	lines.add(nil, 6+fullBatch)
	lines.seal(record{level: agentpb.Log_ERROR, source: sourceA, sequence: 8, time: time.Unix(0, 99)}, sourceB)
	f.Add(lines.encoded, []byte{}, true)
	f.Add(r.appendTo(nil), []byte{}, true)
	f.Add(gap.appendTo(r.appendTo([]byte("noise"))), []byte(recordMagic), false)
	f.Add(r.appendTo([]byte(recordMagic+"\x2b\x00\x00\x00")), r.appendTo(nil)[:20], false)
	f.Fuzz(func(t *testing.T, before, after []byte, end bool) {
		var got []record
		collect := func(r record) bool { got = append(got, r); return true }
		consumed, bad := walk(before, end, collect)
		if consumed > len(before) || bad > consumed || (end && consumed != len(before)) {
			t.Fatalf("consumed %d, damaged %d of %d", consumed, bad, len(before))
		}
		if len(before)-consumed >= maxRecord {
			t.Fatalf("%d bytes are left: more than a record", len(before)-consumed)
		}
		var again []byte
		for _, r := range got {
			again = r.appendTo(again)
			for n := range lineTexts(r, r.text) {
				if n < r.sequence || n > r.last() {
					t.Errorf("line %d of a record of %d to %d", n, r.sequence, r.last())
				}
			}
		}
		if len(again) != consumed-bad {
			t.Fatalf("%d bytes of records, %d were read as such", len(again), consumed-bad)
		}
		// A record is found behind and before whatever noise, unless the noise claims it as its own.
		if len(before) > 0 || len(after) > 0 {
			got = got[:0]
			whole := append(gap.appendTo(bytes.ReplaceAll(before, []byte(recordMagic[:1]), nil)), after...)
			walk(whole, true, collect)
			if len(got) == 0 || cmp.Diff(gap, got[0], cmp.AllowUnexported(record{})) != "" {
				t.Errorf("the record was not found: %v", got)
			}
		}
	})
}

func FuzzState(f *testing.F) {
	good, err := encodeNote(state{Boot: "b", Spool: sourceA, Acknowledged: []acknowledged{{sourceA, sourceB, 3}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte("00000000\n{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		st, err := decodeState(b)
		if err != nil {
			return
		}
		again, err := encodeNote(st)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := decodeState(again); err != nil || cmp.Diff(st, back) != "" {
			t.Errorf("%v becomes %v, %v", st, back, err)
		}
	})
}
