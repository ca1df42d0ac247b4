package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
)

func TestSessionInit(t *testing.T) {
	plain := sessionInit("demo", "", "")
	if diff := cmp.Diff(wire.PTYInit{ID: plain.ID, Name: "main", Ending: true}, plain); diff != "" || plain.ID.Version() != 5 {
		t.Errorf("the default (-want +got):\n%s", diff)
	}
	if again := sessionInit("demo", "main", ""); again.ID != plain.ID {
		t.Error("the default is not called main")
	}
	box := sessionInit("demo", "main", "web")
	if box.Name != "web/main" || box.Container != "web" {
		t.Errorf("in a container: %+v", box)
	}
	for _, tt := range [][3]string{{"build", "", "build"}, {"build", "web", "web/build"}, {plain.ID.String(), "web", plain.ID.String()}, {"", "web", ""}} {
		if got := sessionKey(tt[0], tt[1]); got != tt[2] {
			t.Errorf("session %q of container %q is asked for as %q, want %q", tt[0], tt[1], got, tt[2])
		}
	}
	seen := map[uuid.UUID]bool{}
	for _, init := range []wire.PTYInit{plain, box, sessionInit("demo", "build", ""), sessionInit("box", "main", ""), sessionInit("demo", "main", "db")} {
		if seen[init.ID] {
			t.Errorf("two sessions have id %v", init.ID)
		}
		seen[init.ID] = true
	}
	byID := sessionInit("demo", strings.ToUpper(plain.ID.String()), "")
	if diff := cmp.Diff(wire.PTYInit{ID: plain.ID, Existing: true, Ending: true}, byID); diff != "" {
		t.Errorf("by id (-want +got):\n%s", diff)
	}
}

func TestShowEnd(t *testing.T) {
	for name, tt := range map[string]struct {
		err  error
		code int
		text string
	}{
		"exit 0":        {&endedError{}, 0, ""},
		"exit 7":        {&endedError{wire.PTYEnding{Code: 7}}, 7, ""},
		"killed":        {&endedError{wire.PTYEnding{Code: 137, Signal: "KILL"}}, 137, "berth: the program was ended by SIGKILL\n"},
		"closed":        {&endedError{wire.PTYEnding{Code: 129, Signal: "HUP", Reason: "closed on request"}}, 129, "berth: the session ended: closed on request\n"},
		"hostile":       {&endedError{wire.PTYEnding{Code: 1, Reason: "a\x1b]0;x\x07\nb"}}, 1, `berth: the session ended: a\x1b]0;x\x07\nb` + "\n"},
		"none":          {&endedError{wire.PTYEnding{Code: 255, Reason: "there is no terminal"}}, 255, "berth: the session ended: there is no terminal\n"},
		"left":          {errLeave, 0, "left it running; take it up again with: berth shell box work\n"},
		"told to end":   {signalled{15}, 143, ""},
		"stock, ended":  {nil, 0, ""},
		"not reachable": {errors.New("cannot reach it"), 1, "berth: cannot reach it\n"},
	} {
		t.Run(name, func(t *testing.T) {
			errOut := create(t, filepath.Join(t.TempDir(), "err"))
			p := &program{in: devNull(t), out: devNull(t), errOut: errOut}
			s := &shell{mesh: &mesh{agent: wire.AgentSummary{Name: "box"}}}
			code := finish(p.showEnd(s, "work", tt.err), errOut)
			if got := readFile(t, errOut.Name()); code != tt.code || got != tt.text {
				t.Errorf("exit code %d and %q, want %d and %q", code, got, tt.code, tt.text)
			}
		})
	}
}

// TestEndedAtStock: with an agent that says no endings the end of a stream is the end of the program, with one that
// does it is a lost connection.
func TestEndedAtStock(t *testing.T) {
	long := strings.Repeat("there is no terminal ", 25)
	for name, tt := range map[string]struct {
		stock  bool
		stream string
		lost   bool
		want   *wire.PTYEnding
		shown  string
	}{
		"stock":             {true, "bye", false, nil, "bye"},
		"ours, ended":       {false, string(wire.AppendPTYEnding([]byte("bye"), wire.PTYEnding{Code: 3})), false, &wire.PTYEnding{Code: 3}, "bye"},
		"ours, cut off":     {false, "bye\x1b_berth-", true, nil, "bye\x1b_berth-"},
		"ours, no session":  {false, string(wire.AppendPTYEnding([]byte("there is none\r\n"), wire.PTYEnding{Code: 255, Reason: "there is none"})), false, &wire.PTYEnding{Code: 255, Reason: "there is none"}, ""},
		"ours, long reason": {false, string(wire.AppendPTYEnding([]byte(long+"\r\n"), wire.PTYEnding{Code: 255, Reason: long})), false, &wire.PTYEnding{Code: 255, Reason: long}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			out := create(t, filepath.Join(t.TempDir(), "out"))
			s := &shell{out: out}
			s.stock.Store(tt.stock)
			s.names.Store(!tt.stock)
			err := s.copyOut(context.Background(), strings.NewReader(tt.stream), "view", false)
			var ended *endedError
			if errors.As(err, &ended) != (tt.want != nil) || errors.Is(err, errAttachmentLost) != tt.lost || ended != nil && ended.PTYEnding != *tt.want {
				t.Errorf("ended with %v", err)
			}
			if got := readFile(t, out.Name()); got != tt.shown {
				t.Errorf("%q was shown, want %q", got, tt.shown)
			}
		})
	}
}

// TestRequestAgain: only a terminal that a person saw something of is asked for as one that exists.
func TestRequestAgain(t *testing.T) {
	s := &shell{out: devNull(t), init: sessionInit("box", "", "")}
	if err := s.copyOut(context.Background(), iotest.ErrReader(net.ErrClosed), "first", false); !errors.Is(err, errAttachmentLost) {
		t.Fatal(err)
	}
	if r := s.request(windowSize{30, 100}); r.Existing || r.After != "" || r.Height != 30 || r.Width != 100 {
		t.Errorf("after an attachment that showed nothing: %+v", r)
	}
	if err := s.copyOut(context.Background(), io.MultiReader(strings.NewReader("box> "), iotest.ErrReader(net.ErrClosed)), "second", true); !errors.Is(err, errAttachmentLost) {
		t.Fatal(err)
	}
	if r := s.request(windowSize{30, 100}); !r.Existing || r.After != "second" || r.Got != 5 {
		t.Errorf("after one that did: %+v", r)
	}
}

func TestShellFlags(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"--list --container web", "cannot use --container with --list"},
		{"--list --user me", "cannot use --user with --list"},
		{"work --close --read-only", "cannot use --read-only with --list, --rename or --close"},
		{"work --rename x --command vim", "cannot use --command with"},
	} {
		p := &program{in: devNull(t), out: devNull(t), errOut: devNull(t)}
		cmd := p.shellCommand()
		cmd.SetArgs(append([]string{"box"}, strings.Fields(tt.args)...))
		cmd.SilenceErrors, cmd.SilenceUsage = true, true
		if err := cmd.Execute(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.args, err, tt.want)
		}
	}
}

func TestCtrlC(t *testing.T) {
	for text, want := range map[string]bool{
		"\x03": true, "ab\x03": true, "c": false, "\x1b[99;5u": true, "\x1b[99;5:1u": true, "\x1b[99;69u": true, "\x1b[99:67:99;5u": true,
		"\x1b[99;5:3u": false, "\x1b[99;7u": false, "\x1b[98;5u": false, "\x1b[99u": false, "\x1b[99;1;3u": false,
	} {
		if got := ctrlC.MatchString(text); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}

func TestTerminalTable(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	id := uuid.MustParse("6d1c1d2c-5f0e-4a53-9a0c-1f1f3f1d7c52")
	all := []wire.Terminal{
		{Name: "build", Running: "make -j8", Title: "evil\x1b]0;owned\x07\r\n\u202etitle", Rows: 30, Cols: 100, Viewers: 2, CreatedAt: now.Add(-3 * time.Hour), ActiveAt: now},
		{ID: id, Command: "/bin/bash -l", Container: "web", Rows: 24, Cols: 80, CreatedAt: now.Add(-time.Minute), ActiveAt: now.Add(-30 * time.Second), EndsAt: now.Add(4 * time.Minute)},
		{Name: "done", Command: strings.Repeat("x", 50), Rows: 24, Cols: 80, CreatedAt: now, ActiveAt: now, Exited: &wire.PTYEnding{Code: 3}},
		{Name: "ssh-k3m9qa", Kind: "ssh", Command: "/bin/bash -l", Rows: 24, Cols: 80, CreatedAt: now.Add(-time.Hour), ActiveAt: now, EndsAt: now.Add(3 * time.Minute), CutOffAt: now.Add(-2 * time.Minute)},
	}
	var out bytes.Buffer
	if err := terminalTable(all, now).print(&out, 0); err != nil {
		t.Fatal(err)
	}
	const want = `SESSION                               AGE  IDLE  VIEWERS  SIZE    ENDS           RUNNING                           TITLE
build                                 3h   now   2        100x30  -              make -j8                          evil\x1b]0;owned\x07\x0d\n\u202etitle
6d1c1d2c-5f0e-4a53-9a0c-1f1f3f1d7c52  60s  30s   0        80x24   in 4m          web: /bin/bash -l                 -
done                                  now  now   0        80x24   ended, code 3  xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…  -
ssh-k3m9qa                            60m  now   0        80x24   in 3m          /bin/bash -l                      ssh, cut off 2m ago
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Error(diff)
	}
}

// TestGuard: when our process is gone, the terminal is put right; when it ends by itself, nothing is written.
func TestGuard(t *testing.T) {
	for name, tt := range map[string]struct {
		words   func(*guard)
		want    string
		without string
	}{
		"dismissed":     {(*guard).dismiss, "", undoModes},
		"killed":        {(*guard).abandon, undoModes, leaveAlt},
		"killed in vim": {func(g *guard) { g.switched(true); g.abandon() }, leaveAlt, "never"},
		"after vim":     {func(g *guard) { g.switched(true); g.switched(false); g.abandon() }, undoModes, leaveAlt},
	} {
		t.Run(name, func(t *testing.T) {
			out := create(t, filepath.Join(t.TempDir(), "out"))
			tt.words(startGuard(out, "modes"))
			if got := readFile(t, out.Name()); !strings.Contains(got, tt.want) || strings.Contains(got, tt.without) || tt.want == "" && got != "" {
				t.Errorf("%q was written", got)
			}
		})
	}
	if modes := modesOf(os.Stderr); strings.ContainsAny(modes, " \n") {
		t.Errorf("modes are %q", modes)
	}
}

// abandon is what the end of our process does to its guard.
func (g *guard) abandon() {
	g.in.Close()
	g.cmd.Wait()
}
