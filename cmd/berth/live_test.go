package main

import (
	"context"
	"encoding/json"
	"errors"
	"iter"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/berthd/berth/wire"
)

// watches yields from each of several watches in turn what is given, then its error; the last one waits.
func watches(given ...[]any) func(context.Context) iter.Seq2[int, error] {
	return func(ctx context.Context) iter.Seq2[int, error] {
		return func(yield func(int, error) bool) {
			if len(given) == 0 {
				<-ctx.Done()
				return
			}
			now := given[0]
			given = given[1:]
			for _, v := range now {
				if err, ok := v.(error); ok {
					yield(0, err)
					return
				}
				if !yield(v.(int), nil) {
					return
				}
			}
		}
	}
}

func TestFollow(t *testing.T) {
	broke := errors.New("broke")
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithTimeout(t.Context(), time.Minute)
		defer stop()
		var log []any
		err := follow(ctx, watches([]any{1, 2, broke}, []any{broke}, []any{broke}, []any{3, broke}), func(v int) error { log = append(log, v); return nil }, func() { log = append(log, "lost") })
		if diff := cmp.Diff([]any{1, 2, "lost", 3, "lost"}, log); diff != "" || err != nil {
			t.Errorf("%s, %v", diff, err)
		}
	})
	no := &wire.Error{StatusCode: 403, Message: "Dev Container feature not enabled."}
	if err := follow(t.Context(), watches([]any{no}), func(int) error { return nil }, func() { t.Error("a refusal counts as a loss") }); !errors.Is(err, no) {
		t.Errorf("a refusal gives %v", err)
	}
	if err := follow(t.Context(), watches([]any{1}), func(int) error { return broke }, func() {}); !errors.Is(err, broke) {
		t.Errorf("output that fails gives %v", err)
	}
}

func lineViewOf(t *testing.T, output format) (v *lineView[wire.ListeningPort], out, errOut func() string) {
	t.Helper()
	p := &program{out: create(t, t.TempDir()+"/out"), errOut: create(t, t.TempDir()+"/err")}
	l := &listing[wire.ListeningPort]{program: p, agent: "demo", what: "ports", key: portKey, table: portTable}
	v = &lineView[wire.ListeningPort]{listing: l, output: output, had: map[string]wire.ListeningPort{}, warned: map[string]bool{}}
	return v, func() string { return readFile(t, p.out.Name()) }, func() string { return readFile(t, p.errOut.Name()) }
}

func TestLinesOfAWatch(t *testing.T) {
	evil := "x\x1b[2J\n\u202e"
	a := wire.ListeningPort{Network: "tcp", Port: 80, ProcessName: evil}
	b := wire.ListeningPort{Network: "udp", Port: 53, ProcessName: "dnsmasq"}
	moved := b
	moved.PID = 7
	steps := []snapshot[wire.ListeningPort]{
		{items: []wire.ListeningPort{b, a}, warnings: []string{"an engine\nhangs"}},
		{items: []wire.ListeningPort{b, a}, warnings: []string{"an engine\nhangs"}},
		{items: []wire.ListeningPort{moved}},
	}
	play := func(v *lineView[wire.ListeningPort]) {
		for i, s := range steps {
			if i == 2 {
				v.lose()
			}
			if err := v.show(s); err != nil {
				t.Fatal(err)
			}
		}
	}
	v, out, errOut := lineViewOf(t, formatText)
	play(v)
	var got []string
	for _, line := range strings.Split(strings.TrimSpace(out()), "\n") {
		_, change, _ := strings.Cut(line, " ") // the time
		got = append(got, change)
	}
	want := []string{
		"+ 53/udp  -  dnsmasq  -  -  -  -  -  -",
		`+ 80/tcp  -  x\x1b[2J\n\u202e  -  -  -  -  -  -`,
		`- 80/tcp  -  x\x1b[2J\n\u202e  -  -  -  -  -  -`,
		"~ 53/udp  -  dnsmasq  7  -  -  -  -  -",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff("berth: note: an engine\\nhangs\nberth: lost the connection to demo; trying again\nberth: demo is back\n", errOut()); diff != "" {
		t.Error(diff)
	}

	v, out, _ = lineViewOf(t, formatJSON)
	play(v)
	var changes []string
	for _, line := range strings.Split(strings.TrimSpace(out()), "\n") {
		var c changed[wire.ListeningPort]
		if err := json.Unmarshal([]byte(line), &c); err != nil || c.At.IsZero() {
			t.Fatalf("%q: %v", line, err)
		}
		if c.Item.Port == 80 && c.Item.ProcessName != evil {
			t.Errorf("the name became %q", c.Item.ProcessName)
		}
		changes = append(changes, c.Change)
	}
	if diff := cmp.Diff([]string{"added", "added", "removed", "changed"}, changes); diff != "" {
		t.Error(diff)
	}
}

// A port that a program and an editor's helper have, on two addresses, are two.
func TestPortsOfOneNumber(t *testing.T) {
	v, out, _ := lineViewOf(t, formatText)
	list := []wire.ListeningPort{{Network: "tcp", Port: 80, ProcessName: "nginx"}, {Network: "tcp", Port: 80, ProcessName: "node", Hidden: "VS Code"}}
	if err := v.show(snapshot[wire.ListeningPort]{items: list}); err != nil {
		t.Fatal(err)
	}
	if got := out(); !strings.Contains(got, "nginx") || !strings.Contains(got, "VS Code") {
		t.Errorf("it shows %q", got)
	}
}

func TestScreenOfAWatch(t *testing.T) {
	var ports []wire.ListeningPort
	for i := range 30 {
		ports = append(ports, wire.ListeningPort{Network: "tcp", Port: uint16(3000 + i), Command: strings.Repeat("long ", 40)})
	}
	v := &screenView[wire.ListeningPort]{listing: &listing[wire.ListeningPort]{agent: "de\x1bmo", what: "ports", table: portTable}}
	now := time.Now()
	if got := v.lines(now, 40, 10); len(got) != 1 || !strings.Contains(got[0], "waiting") {
		t.Errorf("before the first list: %q", got)
	}
	v.last = &snapshot[wire.ListeningPort]{items: ports, warnings: []string{"an engine\x1bhangs"}}
	got := v.lines(now, 40, 10)
	text := strings.Join(got, "\n")
	if len(got) != 10 || !strings.Contains(got[0], "30") || !strings.Contains(text, "and 25 more") || !strings.HasPrefix(got[9], "note: an engine") || strings.Contains(text, "\x1b") {
		t.Errorf("on a small screen:\n%s", text)
	}
	v.away = now.Add(-3 * time.Second)
	if got := v.lines(now, 40, 10); !strings.Contains(got[0], `lost de\x1bmo 3s ago`) {
		t.Errorf("while the agent is lost: %q", got[0])
	}
	for rows := 1; rows < 5; rows++ {
		if got := v.lines(now, 1, rows); len(got) > rows {
			t.Errorf("%d lines on a screen of %d", len(got), rows)
		}
	}
}

// FuzzLists shows what an agent may say of its ports and containers: no character may drive the
// terminal, and JSON carries all of it.
func FuzzLists(f *testing.F) {
	f.Add([]byte(`{"ports":[{"process_name":"a\u001b[2J","network":"tcp","port":80,"addresses":["::"],"started_at":"2024-01-01T00:00:00Z"}]}`))
	f.Add([]byte(`{"containers":[{"id":"0123456789abcdef","name":"x\n\u202e","labels":{"\u009b":"y"},"ports":[{"port":80,"network":"\u0007"}]}],"warnings":["\u001b"]}`))
	f.Add([]byte(`{"ports":null,"containers":[{"id":"\ud800é€"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var ports wire.ListeningPorts
		var containers wire.Containers
		if json.Unmarshal(data, &ports) != nil || json.Unmarshal(data, &containers) != nil {
			return
		}
		now := time.Now()
		shown := portFilter{}.of(ports.Ports)
		started := containerFilter{}.of(containers.Containers)
		if len(shown) != len(ports.Ports) || len(started) != len(containers.Containers) {
			t.Error("something is not shown")
		}
		autoPorts(shown, nil)
		for _, width := range []int{0, 1, 40, 200} {
			var b strings.Builder
			tables := []*table{portTable(shown, now), containerTable(started, now)}
			lines := 0
			for _, table := range tables {
				table.faint = nil // dimming is ours
				table.print(&b, width)
				lines += 1 + len(table.rows)
			}
			if strings.Count(b.String(), "\n") != lines || strings.ContainsFunc(strings.ReplaceAll(b.String(), "\n", ""), hidden) {
				t.Errorf("%q shows as %q", data, b.String())
			}
		}
		before, err := json.Marshal(containers)
		if err != nil {
			t.Fatal(err)
		}
		var after wire.Containers
		if err := json.Unmarshal(cleanJSON(before), &after); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(containers, after); diff != "" {
			t.Error(diff)
		}
	})
}
