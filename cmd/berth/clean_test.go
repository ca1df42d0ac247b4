package main

import (
	"encoding/json"
	"os/exec"
	"strings"
	"testing"
	"unicode"

	"github.com/google/go-cmp/cmp"
)

func TestClean(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"demo", "demo"},
		{"größe 大", "größe 大"},
		{"a\x1b[2Jb", `a\x1b[2Jb`},
		{"a\nb\tc\r", `a\nb c\x0d`},
		{"\u009b31m", `\u009b31m`},
		{"abc\u202edcba", `abc\u202edcba`},
		{"a\xffb", `a\xffb`},
		{"\x7f", `\x7f`},
		{"tag \U000e0041", `tag \U000e0041`},
	} {
		if got := clean(tt.in); got != tt.want {
			t.Errorf("clean(%q) = %q, want %q", tt.in, got, tt.want)
		}
	}
}

func TestCleanLog(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"\x1b[1;32mok\x1b[0m done\r\n", "ok done"},
		{"10%\r20%\r30%", "10% 20% 30%"},
		{"\x1b]0;title\x07x", `\x1b]0;title\x07x`},
		{"\x1b]52;c;ZXZpbA==\x1b\\x", `\x1b]52;c;ZXZpbA==\x1b\x`},
		{"safe\u202eexe.\u2066x\u2028y", `safe\u202eexe.\u2066x\u2028y`},
		{"a\x1b[2J\x1b[1Ab", `a\x1b[2J\x1b[1Ab`},
	} {
		if got := cleanLog(tt.in); got != tt.want {
			t.Errorf("cleanLog(%q) = %q, want %q", tt.in, got, tt.want)
		}
	}
}

func FuzzClean(f *testing.F) {
	f.Add("\x1b[31m\u009b\u202e\xff\r\n")
	f.Add("plain")
	f.Fuzz(func(t *testing.T, s string) {
		for _, got := range []string{clean(s), cleanLog(s)} {
			if i := strings.IndexFunc(got, func(r rune) bool { return unicode.IsControl(r) || unicode.Is(unicode.Cf, r) }); i >= 0 {
				t.Errorf("%q lets %q through", s, got[i:])
			}
		}
		data, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		var want, back string
		json.Unmarshal(data, &want)
		if err := json.Unmarshal(cleanJSON(data), &back); err != nil || back != want {
			t.Errorf("JSON of %q became %q, %v", s, back, err)
		}
	})
}

func TestCleanJSON(t *testing.T) {
	got := string(cleanJSON([]byte("{\n  \"a\": \"\u009b\u202e\U000e0041é\"\n}")))
	want := "{\n  \"a\": \"\\u009b\\u202e\\udb40\\udc41é\"\n}"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestShellQuote(t *testing.T) {
	for _, s := range []string{"plain", "two words", "it's", "$(touch x)", "`x`", "a\\b", "", "-n", "*", "~", "a%h"} {
		out, err := exec.Command("sh", "-c", "printf %s "+shellQuote(s)).Output()
		if err != nil || string(out) != s && s != "-n" {
			t.Errorf("the shell reads %s as %q, want %q (%v)", shellQuote(s), out, s, err)
		}
	}
}

func TestTable(t *testing.T) {
	tab := table{head: []string{"NAME", "STATUS", "COMMAND"}}
	tab.add("ä", "ok", "a rather long command line")
	tab.add("build\x1b[2J", "", "x")
	var b strings.Builder
	if err := tab.print(&b, 40); err != nil {
		t.Fatal(err)
	}
	want := "" +
		"NAME          STATUS  COMMAND\n" +
		"ä             ok      a rather long com…\n" +
		"build\\x1b[2J  -       x\n"
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
}
