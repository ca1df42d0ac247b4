package ptyhost

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/ptyhost/screen"
)

// TestByteForByte wants the creator of a session to get exactly what the program wrote.
func TestByteForByte(t *testing.T) {
	c := startTestHost(t)
	for _, raw := range []bool{false, true} {
		a := attach(t, c, AttachRequest{Create: shell(`stty -opost; printf 'a\033[31mb\377\000\033]2;t'; sleep 0.02; printf '\007\303\251end\n'; exit 7`), Raw: raw})
		if !a.Created() {
			t.Error("the session was not created")
		}
		if got, want := readAll(t, a), "a\x1b[31mb\xff\x00\x1b]2;t\aéend\n"; got != want {
			t.Errorf("raw=%t: read %q, want %q", raw, got, want)
		}
		wantExit(t, a, ExitStatus{Code: 7})
	}
}

func TestBulk(t *testing.T) {
	c := startTestHost(t)
	a := attach(t, c, AttachRequest{Create: shell(`stty -opost; seq 1 200000`), Raw: true})
	var want bytes.Buffer
	for i := 1; i <= 200_000; i++ {
		fmt.Fprintln(&want, i)
	}
	if got := readAll(t, a); got != want.String() {
		t.Errorf("read %d bytes, want %d exactly", len(got), want.Len())
	}
	wantExit(t, a, ExitStatus{})
}

func TestExitStatus(t *testing.T) {
	c := startTestHost(t)
	for script, want := range map[string]ExitStatus{
		"exit 3":        {Code: 3},
		"kill -9 $$":    {Code: 137, Signal: "KILL"},
		"kill -TERM $$": {Code: 143, Signal: "TERM"},
		// Something else keeps the terminal open, and still the end is the program's.
		"trap '' HUP; sleep 60 & echo started; exit 4": {Code: 4},
	} {
		a := attach(t, c, AttachRequest{Create: shell(script)})
		out := readAll(t, a)
		wantExit(t, a, want)
		if strings.Contains(script, "started") && out != "started\r\n" {
			t.Errorf("%s: read %q", script, out)
		}
	}
}

func TestReattach(t *testing.T) {
	c := startTestHost(t)
	id := uuid.NewString()
	first := watch(t, attach(t, c, AttachRequest{ID: id, Create: shell(`printf '\033]2;my title\007\033[1;32mgreen\033[m '; read line; echo "got $line"; exit 5`)}))
	first.expect(t, "green")
	first.Close()
	eventually(t, "no viewers", func() bool { return listed(t, c, id).Viewers == 0 })
	info := listed(t, c, id)
	if info.Title != "my title" || info.Size != (Size{24, 80}) || info.PID == 0 || info.Exited != nil {
		t.Errorf("listed as %+v", info)
	}
	second := watch(t, attach(t, c, AttachRequest{ID: strings.ToUpper(id)}))
	if second.Created() {
		t.Error("a second attach made a new session")
	}
	second.expect(t, "\x1b[1;32mgreen")
	second.expect(t, "\x1b]2;my title")
	if _, err := second.Write([]byte("hello\r")); err != nil {
		t.Fatal(err)
	}
	second.expect(t, "got hello")
	wantExit(t, second.Attachment, ExitStatus{Code: 5})
	if _, err := c.Attach(testContext(t), AttachRequest{ID: id}); !errors.Is(err, ErrNoSession) {
		t.Errorf("attach after the end: %v, want ErrNoSession", err)
	}
}

// TestComeBack breaks a viewer's connection again and again while a counter runs, and wants each line shown once, whatever was under way.
func TestComeBack(t *testing.T) {
	c := startTestHost(t)
	id := uuid.NewString()
	create := &CreateRequest{Argv: []string{"/bin/bash", "-c", `for ((i = 0; i < 2000; i++)); do echo "line $i"; ((i % 20)) || read -t 0.005; done; read x`}, Env: testEnv}
	var seen screenLog
	after, got := "", uint64(0)
	attached := 0
	for n := 0; !seen.has("line 1999"); n++ {
		attached++
		view := uuid.NewString()
		a := attach(t, c, AttachRequest{ID: id, Create: create, View: view, After: after, Got: got})
		after, got = view, 0
		// Of what is sent a part arrives; how much changes from time to time.
		buf := make([]byte, 3000+n*37)
		for read := 0; read < len(buf) && !seen.has("line 1999"); {
			n, err := a.Read(buf[read:])
			if err != nil {
				t.Fatal(err)
			}
			seen.Write(buf[read : read+n])
			read += n
			got += uint64(n)
		}
		if n%2 == 0 {
			a.Close() // else the host has not noticed yet
		}
	}
	lines := seen.lines()
	next := 0
	var twice int
	for _, line := range lines {
		var i int
		if _, err := fmt.Sscanf(line, "line %d", &i); err != nil {
			continue
		}
		switch {
		case i == next:
			next++
		case i < next:
			twice++
		default:
			t.Fatalf("line %d stands where %d belongs", i, next)
		}
	}
	t.Logf("%d lines were shown twice in %d attachments", twice, attached)
	if next != 2000 {
		t.Errorf("%d lines came, want 2000", next)
	}

	// Who was shown all, and the echo of what was typed then, is shown no more than the screen again.
	whole := attach(t, c, AttachRequest{ID: id, View: "whole"})
	if _, err := whole.Write([]byte("typed")); err != nil {
		t.Fatal(err)
	}
	last := func(a *Attachment, until string) []byte {
		var shown []byte
		buf := make([]byte, 4<<10)
		for !bytes.Contains(shown, []byte(until)) {
			n, err := a.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			shown = append(shown, buf[:n]...)
		}
		return shown
	}
	got = uint64(len(last(whole, "typed")))
	whole.Close()
	again := last(attach(t, c, AttachRequest{ID: id, After: "whole", Got: got}), "typed")
	begins := 0
	if m := regexp.MustCompile(`line (\d+)\r`).FindSubmatch(again); m != nil {
		begins, _ = strconv.Atoi(string(m[1]))
	}
	if begins < 1970 {
		t.Errorf("who comes back to 24 rows is shown %q", again[:min(len(again), 200)])
	}
	if _, err := c.Attach(testContext(t), AttachRequest{ID: id, After: "unknown", Got: 1 << 40}); err != nil {
		t.Error(err)
	}
}

// screenLog is a terminal with a scrollback without end.
type screenLog struct{ term *screen.Terminal }

func (l *screenLog) Write(p []byte) {
	if l.term == nil {
		l.term = screen.New(screen.Config{Lines: 1 << 20, Bytes: 1 << 30})
	}
	l.term.Write(p)
}

func (l *screenLog) lines() []string {
	if l.term == nil {
		return nil
	}
	return strings.Split(strings.ReplaceAll(string(l.term.Snapshot(screen.View{})), "\x1b[H\x1b[2J", "\r\n"), "\r\n")
}

func (l *screenLog) has(line string) bool {
	return l.term != nil && strings.Contains(string(l.term.Snapshot(screen.View{Lines: -1})), line)
}

// TestEndUnseen wants the last screen and the status kept for whoever comes next, once.
func TestEndUnseen(t *testing.T) {
	c := startTestHost(t)
	id := uuid.NewString()
	a := watch(t, attach(t, c, AttachRequest{ID: id, Create: shell(`echo ready; read x; echo last words; exit 9`)}))
	a.expect(t, "ready")
	fmt.Fprint(a, "x") // no line yet
	a.Close()
	eventually(t, "no viewers", func() bool { return listed(t, c, id).Viewers == 0 })
	if err := c.Kill(testContext(t), id, "KILL"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "ended", func() bool { return listed(t, c, id).Exited != nil })
	late := attach(t, c, AttachRequest{ID: id, Create: shell("echo new")})
	if out := readAll(t, late); !strings.Contains(out, "ready") {
		t.Errorf("the last screen is %q", out)
	}
	wantExit(t, late, ExitStatus{Code: 137, Signal: "KILL"})
	eventually(t, "forgotten", func() bool {
		_, err := c.Attach(testContext(t), AttachRequest{ID: id})
		return errors.Is(err, ErrNoSession)
	})
}

func listed(t testing.TB, c *Client, id string) SessionInfo {
	t.Helper()
	infos, err := c.List(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, info := range infos {
		if info.ID == id || info.Name == id {
			return info
		}
	}
	t.Fatalf("session %s is not listed: %+v", id, infos)
	return SessionInfo{}
}

func TestNames(t *testing.T) {
	c := startTestHost(t)
	a := attach(t, c, AttachRequest{ID: "build", Create: shell("read x")})
	if name := a.Info().Name; name != "build" {
		t.Errorf("named %q", name)
	}
	b := attach(t, c, AttachRequest{ID: "build"})
	if b.Info().ID != a.Info().ID {
		t.Error("the name led to another session")
	}
	if _, err := c.Attach(testContext(t), AttachRequest{ID: uuid.NewString(), Create: &CreateRequest{Name: "build", Argv: []string{"sh"}, Env: testEnv}}); !errors.Is(err, ErrStart) {
		t.Errorf("a second session of the same name: %v", err)
	}
}

// TestWhichSession has clients that make ids of names, and others that rename what they named.
func TestWhichSession(t *testing.T) {
	c := startTestHost(t)
	work := uuid.NewString()
	first := attach(t, c, AttachRequest{ID: work, Name: "work", View: "first", Create: shell("read x")})
	if got := first.Info(); got.ID != work || got.Name != "work" {
		t.Fatalf("the first is %+v", got)
	}
	if err := c.Rename(testContext(t), work, "test", 0); err != nil {
		t.Fatal(err)
	}
	second := attach(t, c, AttachRequest{ID: work, Name: "work", Create: shell("read x")})
	if second.Info().ID == work {
		t.Fatal("a renamed session was taken for a new one of its old name")
	}
	web := shell("read x")
	web.Container = "web"
	inside := attach(t, c, AttachRequest{Name: "web/work", Container: "web", Create: web})
	for name, tt := range map[string]struct {
		req  AttachRequest
		want string // id; empty if there is none
	}{
		"by name":               {AttachRequest{ID: work, Name: "work"}, second.Info().ID},
		"by its new name":       {AttachRequest{ID: uuid.NewString(), Name: "test"}, work},
		"a stock client's id":   {AttachRequest{ID: work}, work},
		"what it was shown":     {AttachRequest{ID: work, Name: "work", After: "first"}, work},
		"a stream nobody knows": {AttachRequest{ID: work, Name: "work", After: "third"}, second.Info().ID},
		"a name nobody has":     {AttachRequest{ID: work, Name: "play"}, ""},
		"in a container":        {AttachRequest{Name: "web/work", Container: "web"}, inside.Info().ID},
		"wherever it is":        {AttachRequest{Name: "web/work"}, inside.Info().ID},
		"in another container":  {AttachRequest{Name: "web/work", Container: "db"}, ""},
		"not on the machine":    {AttachRequest{Name: "work", Container: "web"}, ""},
	} {
		a, err := c.Attach(testContext(t), tt.req)
		switch {
		case err == nil && a.Info().ID != tt.want:
			t.Errorf("%s: attached to %s, named %q", name, a.Info().ID, a.Info().Name)
		case err != nil && tt.want != "":
			t.Errorf("%s: %v", name, err)
		}
		if err == nil {
			a.Close()
		}
	}
}

// TestSlowStart has a session whose program does not come up: who asks for it too waits, and nobody else does.
func TestSlowStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHost(HostConfig{})
		if _, busy := h.reserve("id", "slow"); busy {
			t.Fatal("a new host is busy")
		}
		begun := time.Now()
		_, _, _, err := h.enter(nil, AttachRequest{Name: "slow", Create: shell("read x")})
		if !errors.Is(err, ErrStart) || time.Since(begun) != handshakeTimeout {
			t.Errorf("after %v: %v", time.Since(begun), err)
		}
		if all := h.list(); len(all) != 0 {
			t.Errorf("listed: %+v", all)
		}
		if _, _, _, err := h.enter(nil, AttachRequest{Name: "other"}); !errors.Is(err, ErrNoSession) {
			t.Errorf("another: %v", err)
		}
	})
}

func TestScrollback(t *testing.T) {
	c := startTestHost(t)
	create := shell("seq 100; read x")
	create.Scrollback = 7
	a := attach(t, c, AttachRequest{Size: Size{24, 80}, Create: create})
	watch(t, a).expect(t, "100\r\n")
	late := watch(t, attach(t, c, AttachRequest{ID: a.Info().ID, Size: Size{24, 80}}))
	late.expect(t, "100")
	// The cursor stands below the last line, so the window has 23 of them.
	if shown, _ := late.output(); !bytes.Contains(shown, []byte("71\r\n72\r\n")) || bytes.Contains(shown, []byte("70\r\n")) {
		t.Errorf("who comes late is shown %q", shown)
	}
}

// TestLongCommands lists sessions whose commands would not fit a frame.
func TestLongCommands(t *testing.T) {
	c := startTestHost(t)
	const sessions = 8
	argument := strings.Repeat("<", 100<<10) // six bytes each in JSON
	for range sessions {
		create := shell("read x")
		create.Argv = append(create.Argv, argument)
		attach(t, c, AttachRequest{Create: create})
	}
	infos, err := c.List(testContext(t))
	if err != nil || len(infos) != sessions {
		t.Fatalf("%d sessions are listed: %v", len(infos), err)
	}
	for _, info := range infos {
		if !strings.HasPrefix(info.Command, "/bin/sh -c read x <<<") || len(info.Command) > maxShown {
			t.Errorf("the command is told in %d bytes: %.40q", len(info.Command), info.Command)
		}
	}
}

func TestStartErrors(t *testing.T) {
	c := startTestHost(t)
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("no program"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		create *CreateRequest
		want   string
	}{
		"no session":  {nil, `no such terminal session: ".*" has ended or never was`},
		"no argv":     {&CreateRequest{}, "no program was named"},
		"no program":  {&CreateRequest{Argv: []string{"/no/zsh"}}, "/no/zsh does not exist"},
		"not in PATH": {&CreateRequest{Argv: []string{"nosuch"}, Env: testEnv}, "nosuch is not in the session's PATH"},
		"no dir":      {&CreateRequest{Argv: []string{"/bin/sh"}, Dir: "/no/dir"}, "the directory /no/dir does not exist"},
		"dir is file": {&CreateRequest{Argv: []string{"/bin/sh"}, Dir: text}, "is not a directory"},
		"no exec":     {&CreateRequest{Argv: []string{"/etc/passwd"}}, "/etc/passwd may not be executed"},
		"no format":   {&CreateRequest{Argv: []string{text}}, "is not a program this machine can run"},
		"long name":   {&CreateRequest{Name: strings.Repeat("n", 200), Argv: []string{"/bin/sh"}}, "this name for a terminal: it is longer than 128 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.Attach(testContext(t), AttachRequest{ID: uuid.NewString(), Create: tc.create})
			if err == nil || !regexp.MustCompile(tc.want).MatchString(err.Error()) {
				t.Fatalf("error %v, want one that matches %q", err, tc.want)
			}
			if want := map[bool]error{true: ErrNoSession, false: ErrStart}[tc.create == nil]; !errors.Is(err, want) {
				t.Errorf("%v is not %v", err, want)
			}
		})
	}
	infos, err := c.List(testContext(t))
	if err != nil || len(infos) != 0 {
		t.Errorf("left behind: %+v, %v", infos, err)
	}
}

func TestSizes(t *testing.T) {
	c := startTestHost(t)
	id := uuid.NewString()
	// bash runs the trap when read times out.
	script := `stty -echo; trap 'stty size' WINCH; stty size; while :; do read -t 0.05 x && echo "read $x"; done`
	a := watch(t, attach(t, c, AttachRequest{ID: id, Create: &CreateRequest{Argv: []string{"/bin/bash", "-c", script}, Env: testEnv}, Size: Size{30, 100}}))
	a.expect(t, "30 100\r\n")
	if err := a.Resize(Size{31, 101}); err != nil {
		t.Fatal(err)
	}
	a.expect(t, "31 101\r\n")

	b := watch(t, attach(t, c, AttachRequest{ID: id, Size: Size{20, 60}}))
	if err := b.Resize(Size{21, 61}); err != nil {
		t.Fatal(err)
	}
	readOnly := watch(t, attach(t, c, AttachRequest{ID: id, Size: Size{5, 5}, ReadOnly: true}))
	fmt.Fprintln(readOnly, "ignored")
	fmt.Fprintln(a, "mine")
	a.expect(t, "read mine")
	if size := listed(t, c, id).Size; size != (Size{31, 101}) {
		t.Errorf("a viewer that did not type made the size %v", size)
	}
	fmt.Fprintln(b, "now me")
	b.expect(t, "read now me")
	eventually(t, "the typist's size", func() bool { return listed(t, c, id).Size == (Size{21, 61}) })
	b.Close()
	eventually(t, "the size of who is left", func() bool { return listed(t, c, id).Size == (Size{31, 101}) })
	if out, _ := a.output(); bytes.Contains(out, []byte("ignored")) {
		t.Error("a read-only viewer typed")
	}
	if err := a.Resize(Size{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a size for an unknown one", func() bool { return listed(t, c, id).Size == (Size{24, 80}) })
	if err := a.Resize(Size{65535, 65535}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a bounded size", func() bool { return listed(t, c, id).Size == (Size{MaxRows, MaxCols}) })
}

// TestCtrlC floods viewers that read all they get, and wants Ctrl-C to be felt: at the best of some tries within 100 ms if nothing else runs, and what was under way
// when it was typed bounded each time.
func TestCtrlC(t *testing.T) {
	limit := 2 * time.Second // on a busy machine
	if long {
		limit = 100 * time.Millisecond
	}
	c := startTestHost(t)
	for _, raw := range []bool{false, true} {
		best := time.Hour
		for range 5 {
			a := attach(t, c, AttachRequest{Create: &CreateRequest{Argv: []string{"/bin/bash", "-c", "trap 'echo STOPPED; exit 6' INT; yes"}, Env: testEnv}, Raw: raw})
			if _, err := io.ReadFull(a, make([]byte, 1<<20)); err != nil {
				t.Fatal(err)
			}
			typed := time.Now()
			if _, err := a.Write([]byte{3}); err != nil {
				t.Fatal(err)
			}
			rest := readAll(t, a)
			best = min(best, time.Since(typed))
			if !strings.Contains(rest, "STOPPED") {
				t.Errorf("raw=%t: no end after Ctrl-C: %q", raw, tail([]byte(rest)))
			}
			if len(rest) > 2<<20 {
				t.Errorf("raw=%t: %d bytes came after Ctrl-C", raw, len(rest))
			}
			wantExit(t, a, ExitStatus{Code: 6})
		}
		t.Logf("raw=%t: Ctrl-C took %v at best", raw, best)
		if best > limit {
			t.Errorf("raw=%t: Ctrl-C took %v at best, want %v", raw, best, limit)
		}
	}
}

// TestFlood wants a viewer, however fast it reads, sent the beginning of a flood, the screen now and then while it goes on, the last lines
// when it stops, and all that comes after.
func TestFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &session{screen: newPicture(Size{24, 80}, 0, slog.New(slog.DiscardHandler)), viewers: map[*viewer]struct{}{}, room: make(chan struct{}, 1)}
		v := &viewer{session: s, size: Size{24, 80}, ready: make(chan struct{}, 1)}
		s.viewers[v] = struct{}{}
		line := 0
		print := func(n int) { // at 40 MB a second, as fast as a terminal can be
			for range n / readSize {
				var p []byte
				for len(p) < readSize {
					p = fmt.Appendf(p, "line %08d, and some more of it\r\n", line)
					line++
				}
				s.output(p)
				time.Sleep(100 * time.Microsecond)
			}
		}
		take := func() (string, time.Duration) {
			_, out, _, pause := v.take(nil)
			return string(out), pause
		}
		var sent int
		for range 2 * floodBurst / readSize {
			print(readSize)
			out, _ := take()
			sent += len(out)
		}
		if sent < floodBurst-readSize || sent > floodBurst*11/10 || !v.stale {
			t.Errorf("%d bytes were sent of the flood", sent)
		}
		var drawn, size int
		begun := time.Now()
		for time.Since(begun) < 10*redrawPause {
			print(readSize)
			if out, _ := take(); out != "" {
				drawn, size = drawn+1, size+len(out)
			}
		}
		if drawn < 9 || drawn > 11 || size > drawn*24*81 {
			t.Errorf("while it went on the screen was drawn %d times, %d bytes in all", drawn, size)
		}
		out, pause := take()
		for out == "" {
			time.Sleep(pause)
			out, pause = take()
		}
		if quiet := time.Since(s.shown); quiet < calm || quiet > 2*calm {
			t.Errorf("it was caught up %v after the last output", quiet)
		}
		if n := strings.Count(out, "line "); n < screen.DefaultLines || n > screen.DefaultLines+24 || !strings.Contains(out, fmt.Sprintf("line %08d", line-1)) {
			t.Errorf("it was given %d lines, not all that the session keeps", n)
		}
		s.output([]byte("$ "))
		if out, _ := take(); out != "$ " {
			t.Errorf("then it was sent %q", out)
		}
	})
}

// TestSlowViewer wants a viewer that does not read to hold up neither the program nor another viewer, and to see the screen as it is when it reads.
func TestSlowViewer(t *testing.T) {
	c := startTestHost(t)
	id := uuid.NewString()
	fast := watch(t, attach(t, c, AttachRequest{ID: id, Create: shell(`read x; seq 1 300000; printf '\033]2;done\007'; read x`)}))
	slow := attach(t, c, AttachRequest{ID: id})
	fmt.Fprintln(fast)
	fast.expect(t, "\r\n300000\r\n")
	eventually(t, "the title", func() bool { return listed(t, c, id).Title == "done" })

	w := watch(t, slow)
	w.expect(t, "\x1b]2;done\x1b\\")
	out, _ := w.output()
	if len(out) > 1<<20 {
		t.Errorf("the slow viewer was sent %d bytes", len(out))
	}
	if !bytes.Contains(out, []byte("\r\n300000\r\n")) || !bytes.Contains(out, []byte("299500\r\n")) {
		t.Errorf("the slow viewer misses recent lines: %q", tail(out))
	}
}

// TestRawViewerHoldsProgram wants every byte for a raw viewer that is slow, while another viewer watches.
func TestRawViewerHoldsProgram(t *testing.T) {
	c := startTestHost(t)
	id := uuid.NewString()
	raw := attach(t, c, AttachRequest{ID: id, Raw: true, Create: shell(`stty -opost -echo; read x; seq 1 200000; echo end; read x`)})
	other := watch(t, attach(t, c, AttachRequest{ID: id}))
	fmt.Fprintln(other)
	other.expect(t, "\n100\n")
	if out, _ := other.output(); bytes.Contains(out, []byte("end\n")) {
		t.Error("the program did not wait for the raw viewer")
	}
	w := watch(t, raw)
	w.expect(t, "\nend\n")
	var want bytes.Buffer
	for i := 1; i <= 200_000; i++ {
		fmt.Fprintln(&want, i)
	}
	if out, _ := w.output(); !bytes.Contains(out, want.Bytes()) {
		t.Error("the raw viewer did not get every byte")
	}
	other.expect(t, "end\n")
}

// TestStuckInput wants sizes, signals and leaving to get through while the program reads nothing and its input is full.
func TestStuckInput(t *testing.T) {
	c := startTestHost(t)
	a := watch(t, attach(t, c, AttachRequest{Create: &CreateRequest{Argv: []string{"/bin/bash", "-c", "stty raw -echo; trap 'stty size' WINCH; echo ready; while :; do sleep 0.01; done"}, Env: testEnv, KillOnDetach: true}}))
	a.expect(t, "ready")
	typed := make(chan error, 1)
	go func() {
		_, err := a.Write(bytes.Repeat([]byte("x"), 1<<20))
		typed <- err
	}()
	eventually(t, "a full window", func() bool {
		a.Attachment.mu.Lock()
		defer a.Attachment.mu.Unlock()
		return a.room == 0
	})
	if err := a.Resize(Size{11, 22}); err != nil {
		t.Fatal(err)
	}
	a.expect(t, "11 22")
	if err := a.Signal("KILL"); err != nil {
		t.Fatal(err)
	}
	wantExit(t, a.Attachment, ExitStatus{Code: 137, Signal: "KILL"})
	if err := <-typed; err == nil {
		t.Error("the write of what nobody read succeeded")
	}
}

func TestModes(t *testing.T) {
	c := startTestHost(t)
	create := shell("stty -a")
	create.Modes = map[uint8]uint32{1: 7, 53: 0, 72: 0, 3: 255, 199: 1}
	a := attach(t, c, AttachRequest{Create: create})
	out := readAll(t, a)
	for _, want := range []string{"intr = ^G;", "-echo ", "-onlcr", "erase = <undef>;", "iutf8", "rows 24; columns 80"} {
		if !strings.Contains(out, want) {
			t.Errorf("stty does not say %q:\n%s", want, out)
		}
	}
}

func TestIdle(t *testing.T) {
	c := startTestHost(t)
	id := uuid.NewString()
	create := shell("echo up; read x")
	create.IdleTimeout = 50 * time.Millisecond
	a := watch(t, attach(t, c, AttachRequest{ID: id, Create: create}))
	a.expect(t, "up")
	a.Close()
	eventually(t, "ended", func() bool { return listed(t, c, id).Exited != nil })
	late := attach(t, c, AttachRequest{ID: id})
	readAll(t, late)
	wantExit(t, late, ExitStatus{Code: 129, Signal: "HUP", Reason: "nobody was attached for 50ms"})
}

func TestKillOnDetach(t *testing.T) {
	c := startTestHost(t)
	// The child ignores being hung up and must be killed.
	create := shell("trap '' HUP; echo $$; while :; do sleep 0.1; done")
	create.KillOnDetach = true
	a := watch(t, attach(t, c, AttachRequest{Create: create}))
	a.expect(t, "\r\n")
	pid := a.Info().PID
	a.Close()
	eventually(t, "the program is dead and reaped", func() bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) })
}

func TestKill(t *testing.T) {
	c := startTestHost(t)
	a := watch(t, attach(t, c, AttachRequest{Create: shell("echo up; sleep 60")}))
	a.expect(t, "up")
	if err := c.Kill(testContext(t), a.Info().ID, ""); err != nil {
		t.Fatal(err)
	}
	wantExit(t, a.Attachment, ExitStatus{Code: 129, Signal: "HUP", Reason: "closed on request"})
	if err := c.Kill(testContext(t), "nobody", "TERM"); !errors.Is(err, ErrNoSession) {
		t.Errorf("kill of nobody: %v", err)
	}
}

func TestClose(t *testing.T) {
	c := startTestHost(t)
	a := attach(t, c, AttachRequest{Create: shell("read x")})
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); !isClosed(err) {
		t.Errorf("second Close: %v", err)
	}
	if _, err := a.Read(make([]byte, 1)); !isClosed(err) {
		t.Errorf("Read: %v", err)
	}
	if _, err := a.Write([]byte("x")); !isClosed(err) {
		t.Errorf("Write: %v", err)
	}
	if _, err := a.Wait(); !isClosed(err) {
		t.Errorf("Wait: %v", err)
	}
}

// BenchmarkBulk compares output through the host, with its screen, to a loop that only reads a PTY.
func BenchmarkBulk(b *testing.B) {
	const size = 20 << 20
	file := filepath.Join(b.TempDir(), "bulk")
	line := []byte("the quick brown fox jumps over the lazy dog 0123456789 abcdefghijklmnop\n")
	if err := os.WriteFile(file, bytes.Repeat(line, size/len(line)), 0o600); err != nil {
		b.Fatal(err)
	}
	create := &CreateRequest{Argv: []string{"/bin/cat", file}, Env: testEnv}
	b.Run("bare", func(b *testing.B) {
		b.SetBytes(size)
		buf := make([]byte, 64<<10)
		for b.Loop() {
			tty, err := start(create, Size{24, 80})
			if err != nil {
				b.Fatal(err)
			}
			for err == nil {
				_, err = tty.master.Read(buf)
			}
			tty.master.Close()
			tty.cmd.Wait()
		}
	})
	for _, raw := range []bool{false, true} {
		b.Run(fmt.Sprintf("host/raw=%t", raw), func(b *testing.B) {
			c := startTestHost(b)
			b.SetBytes(size)
			for b.Loop() {
				a := attach(b, c, AttachRequest{Create: create, Raw: raw})
				if _, err := io.Copy(io.Discard, a); err != nil {
					b.Fatal(err)
				}
				a.Close()
			}
		})
	}
}

// TestLateTerminal drives vim with two viewers, one of whom comes and goes, and wants both to be shown the same.
func TestLateTerminal(t *testing.T) {
	if _, err := exec.LookPath("vim"); err != nil {
		t.Fatal("this test drives vim, which is not installed; ./test.sh installs it")
	}
	c := startTestHost(t)
	id := uuid.NewString()
	create := &CreateRequest{Argv: []string{"vim", "-u", "NONE", "-N", "-n", "-i", "NONE", "-c", "syntax on", "-c", "set ruler mouse=a", "session.go"}, Dir: ".", Env: testEnv}
	stayed := watch(t, attach(t, c, AttachRequest{ID: id, Create: create}))
	stayed.expect(t, "Top")
	keys := []string{"\x06", "/func\r", "dd", "o漢字 e\u0301 wörld\x1b", ":split\r", "\x15", "ggVG\x1b"}
	for i, key := range keys {
		fmt.Fprint(stayed, key)
		mark := fmt.Sprintf("mark %d", i)
		fmt.Fprintf(stayed, ":echo '%s' . nr2char(46)\r", mark)
		stayed.expect(t, mark+".") // as the command's output, not its echo
		late := watch(t, attach(t, c, AttachRequest{ID: id}))
		late.expect(t, mark+".")
		eventually(t, "both show the same", func() bool {
			a, _ := stayed.output()
			b, _ := late.output()
			return screenOf(a) == screenOf(b)
		})
		late.Close()
	}
	fmt.Fprint(stayed, ":qa!\r")
	wantExit(t, stayed.Attachment, ExitStatus{})
}

// screenOf renders output canonically. That the model reads it right is for the tests of package screen to show.
func screenOf(output []byte) string {
	term := screen.New(screen.Config{Lines: -1})
	term.Write(output)
	return string(term.Snapshot(screen.View{}))
}

// TestEndedSessionIsLetGo: once its end was told nothing holds on to a session, nor to its screen.
func TestEndedSessionIsLetGo(t *testing.T) {
	dir, err := os.MkdirTemp("", "ptyhost")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := Listen(filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	h := NewHost(HostConfig{})
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- h.Serve(ctx, l) }()
	defer func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	a := attach(t, Dial(filepath.Join(dir, "s")), AttachRequest{Create: shell("read line")})
	h.mu.Lock()
	s := h.sessions[a.Info().ID]
	h.mu.Unlock()
	if _, err := a.Write([]byte("\n")); err != nil {
		t.Fatal(err)
	}
	readAll(t, a)
	h.running.Wait()
	eventually(t, "the session is forgotten, and no timer keeps it", func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return len(h.sessions) == 0 && (s.kept == nil || !s.kept.Stop())
	})
}
