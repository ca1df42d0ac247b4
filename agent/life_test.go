package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/berthd/berth/usage"
)

// TestEnding: what a note and this moment say together of how a berthd ended.
func TestEnding(t *testing.T) {
	began := time.Date(2026, 11, 27, 10, 0, 0, 0, time.UTC)
	const boot, group = "0b7f5a11-aaaa-bbbb-cccc-0123456789ab-42", "/sys/fs/cgroup/memory/x/memory.oom_control"
	running := note{PID: 7, Boot: boot, Began: began, Kills: usage.Kills{group: 3, usage.MachineKills: 9}}
	with := func(change func(*note)) note {
		n := running
		change(&n)
		return n
	}
	for name, tt := range map[string]struct {
		left    note
		boot    string
		kills   usage.Kills
		crash   string
		orderly bool
		want    []string
	}{
		"told to stop": {left: with(func(n *note) { n.Ended, n.Why = began.Add(time.Hour), "was told to stop" }), orderly: true,
			want: []string{"ended 2026-11-27T11:00:00Z", "was told to stop"}},
		"orderly, though something else was killed": {left: with(func(n *note) { n.Ended, n.Why = began.Add(time.Hour), "was told to stop" }),
			kills: usage.Kills{group: 4}, orderly: true, want: []string{"was told to stop"}},
		"token refused": {left: with(func(n *note) { n.Ended, n.Why, n.Fix = began, "left because its token was refused: no", "give another" }), orderly: true,
			want: []string{"its token was refused"}},
		"OOM killer":           {left: running, kills: usage.Kills{group: 4, usage.MachineKills: 10}, want: []string{"(SIGKILL) by the OOM killer: oom_kill in " + group + " rose from 3 to 4"}},
		"OOM killer, machine":  {left: running, kills: usage.Kills{group: 3, usage.MachineKills: 10}, want: []string{"most likely by the OOM killer", "/proc/vmstat rose from 9 to 10"}},
		"OOM, group made anew": {left: running, kills: usage.Kills{group: 1, usage.MachineKills: 9}, want: []string{"by the OOM killer", "rose from 0 to 1"}},
		"killed":               {left: running, kills: running.Kills, want: []string{"was killed (SIGKILL) from outside"}},
		"killed as it stopped": {left: with(func(n *note) { n.Stopping = began.Add(time.Minute) }), want: []string{"told to stop at 2026-11-27T10:01:00Z and killed"}},
		"crashed":              {left: running, crash: "panic: oh \x1b[31mno\ngoroutine 1", want: []string{"crashed: panic: oh  [31mno"}},
		"rebooted":             {left: running, boot: "11111111-aaaa-bbbb-cccc-0123456789ab-42", kills: usage.Kills{group: 0}, want: []string{"rebooted or lost power"}},
		"container ended":      {left: running, boot: "0b7f5a11-aaaa-bbbb-cccc-0123456789ab-77", kills: running.Kills, want: []string{"ended with its container"}},
		"container ended, OOM": {left: running, boot: "0b7f5a11-aaaa-bbbb-cccc-0123456789ab-77", kills: usage.Kills{usage.MachineKills: 10}, want: []string{"ended with its container", "OOM killer"}},
		"in trouble": {left: with(func(n *note) { n.Trouble = &Trouble{Since: began, Cause: "no route to\nthe server"} }),
			want: []string{"had not reached its server since 2026-11-27T10:00:00Z: no route to the server"}},
	} {
		t.Run(name, func(t *testing.T) {
			if tt.boot == "" {
				tt.boot = boot
			}
			e := tt.left.ending(tt.boot, tt.kills, tt.crash)
			if e.Orderly != tt.orderly {
				t.Errorf("orderly = %v, want %v", e.Orderly, tt.orderly)
			}
			for _, part := range tt.want {
				if !strings.Contains(e.String(), part) {
					t.Errorf("%q lacks %q", e, part)
				}
			}
		})
	}
}

// TestLifeOverRestarts keeps notes in a real directory.
func TestLifeOverRestarts(t *testing.T) {
	s := openState(t)
	first := BeginLife(s)
	if first.Last() != nil {
		t.Fatalf("before the first berthd there was one: %v", first.Last())
	}
	at := time.Now()
	first.tell(Event{Time: at, Step: StepTrouble, Cause: "no route", Fix: "see the network"})
	first.tell(Event{Time: at.Add(time.Minute), Step: StepTrouble, Cause: "no name", Fix: "see DNS"})
	if tr := first.trouble(); tr == nil || tr.Cause != "no name" || !tr.Since.Equal(at.Round(0)) {
		t.Errorf("trouble %+v, want the newest cause since the first", tr)
	}

	second := BeginLife(s) // as after SIGKILL
	last := second.Last()
	if last == nil || last.Orderly || last.Trouble == nil || !strings.Contains(last.String(), "no name") {
		t.Fatalf("after a kill: %+v", last)
	}
	if notes := second.Notes(); len(notes) != 1 || notes[0] != last.String() {
		t.Errorf("notes %q", notes)
	}
	second.tell(Event{Step: StepTrouble, Cause: "x"})
	second.tell(Event{Step: StepLinked})
	second.stopping()
	second.end(parting(ErrRestart, nil))
	second.stopping() // too late to count

	third := BeginLife(s)
	if last := third.Last(); last == nil || !last.Orderly || last.Trouble != nil || last.Cause != "was told to leave for another start" || last.At.IsZero() {
		t.Errorf("after a restart: %+v", last)
	}
	if notes := third.Notes(); len(notes) != 0 {
		t.Errorf("notes of an orderly end: %q", notes)
	}
	f, err := third.CrashOutput()
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(f, "fatal error: all is lost")
	f.Close()
	if last := BeginLife(s).Last(); last == nil || !strings.Contains(last.String(), "crashed: fatal error: all is lost") {
		t.Errorf("after a crash: %+v", last)
	}
}

func TestPartingNamesTheRefusal(t *testing.T) {
	why, fix := parting(nil, fmt.Errorf("link: %w: %w", ErrRefused, errors.New("401")))
	if !strings.Contains(why, "token was refused: ") || fix != "" {
		t.Errorf("%q, %q", why, fix)
	}
}

func FuzzLastEnding(f *testing.F) {
	whole, err := json.Marshal(note{PID: 1, Boot: "a-1", Began: time.Unix(1, 0), Kills: usage.Kills{"/x": 1}, Trouble: &Trouble{Cause: "c"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole, []byte("panic: x\n"))
	f.Add([]byte(`{"began":"2026-01-01T00:00:00Z","trouble":{"cause":"\u001b]0;x\u0007\n"},"why":"\u009b"}`), []byte{})
	f.Add([]byte(`{"began":"2026-01-01T00:00:00Z","ended":"2026-01-01T00:00:00Z","oom_kills":null,"boot":"-"}`), []byte("\xff\x00\x1b"))
	f.Add([]byte("{"), []byte{})
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, life, crash []byte) {
		for name, data := range map[string][]byte{lifeFile: life, crashFile: crash} {
			if err := os.WriteFile(dir+"/"+name, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		e := lastEnding(dir, "b-2", usage.Kills{"/x": 2})
		if e == nil {
			return
		}
		if s := e.String() + e.Fix; len(s) > 4*maxSentence || strings.ContainsFunc(s, unicode.IsControl) {
			t.Errorf("%q", s)
		}
	})
}
