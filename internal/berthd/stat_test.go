package berthd

import (
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"
)

func number(v float64) *float64 { return &v }

func TestAmountText(t *testing.T) {
	for _, tt := range []struct {
		amount amount
		prefix string
		want   string
	}{
		{amount{Used: 1.2, Total: number(4), Unit: "cores"}, "", "1.2/4 cores (30%)"},
		{amount{Used: 5.6 * (1 << 30), Total: number(16 << 30), Unit: "B"}, "Gi", "5.6/16 GiB (35%)"},
		{amount{Used: 0.04, Unit: "cores"}, "", "0 cores"},
		{amount{Used: 3 << 20, Total: number(0), Unit: "B"}, "Mi", "3/0 MiB"},
	} {
		if got := tt.amount.text(tt.prefix); got != tt.want {
			t.Errorf("%q, want %q", got, tt.want)
		}
	}
}

// TestStatVerb measures this machine.
func TestStatVerb(t *testing.T) {
	env := []string{envSelf + "=1", "HOME=/"}
	for args, want := range map[string]string{
		"cpu":                         `^[\d.]+(/[\d.]+)? cores( \(\d+%\))?\n$`,
		"cpu --host":                  `^[\d.]+/\d+ cores \(\d+%\)\n$`,
		"mem":                         `^[\d.]+(/[\d.]+)? GiB( \(\d+%\))?\n$`,
		"mem --host --prefix Mi":      `^[1-9][\d.]*/[\d.]+ MiB \(\d+%\)\n$`,
		"disk":                        `^[\d.]+/[\d.]+ GiB \(\d+%\)\n$`,
		"disk --path /proc":           `^0/0 GiB\n$`,
		"disk --path / --output json": `^\{"total":\d+(e\+\d+)?,"unit":"B","used":[\d.e+]+\}\n$`,
		"":                            `(?s)^host processor .*\nhost memory .*\nhome disk .*`,
	} {
		code, stdout, stderr := command(t, env, os.Args[0], append([]string{"stat"}, strings.Fields(args)...)...)
		if code != 0 || !regexp.MustCompile(want).MatchString(stdout) {
			t.Errorf("stat %s: %d %q %q, want %s", args, code, stdout, stderr, want)
		}
	}
	var all map[string]amount
	if _, stdout, _ := command(t, env, os.Args[0], "stat", "--output", "json"); json.Unmarshal([]byte(stdout), &all) != nil || all["host_memory"].Used == 0 {
		t.Errorf("stat as JSON: %s", stdout)
	}
	for args, want := range map[string]int{"gpu": 64, "cpu --prefix Gi": 64, "mem --prefix Xi": 64, "disk --path /no/such": 1, "--output yaml": 64, "cpu extra": 64} {
		if code, _, stderr := command(t, env, os.Args[0], append([]string{"stat"}, strings.Fields(args)...)...); code != want || stderr == "" {
			t.Errorf("stat %s: %d %q, want %d", args, code, stderr, want)
		}
	}
}
