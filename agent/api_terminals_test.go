package agent

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
)

// ending reads a stream to its end, and takes what was said last off it.
func ending(t *testing.T, conn net.Conn) (text string, e *wire.PTYEnding) {
	t.Helper()
	all, err := io.ReadAll(conn)
	if err != nil {
		t.Fatalf("after %q: %v", all, err)
	}
	rest, last, ok := wire.CutPTYEnding(all)
	if !ok {
		return string(all), nil
	}
	return string(rest), &last
}

// TestTerminalEndings: who asks for it is told how a terminal ended, after its last byte, once.
func TestTerminalEndings(t *testing.T) {
	p := servePTY(t)
	for name, tt := range map[string]struct {
		init wire.PTYInit
		text string
		want *wire.PTYEnding
	}{
		"a stock client":   {wire.PTYInit{Command: "echo last; exit 7"}, "last\r\n", nil},
		"exit":             {wire.PTYInit{Command: "echo last; exit 7", Ending: true}, "last\r\n", &wire.PTYEnding{Code: 7}},
		"signal":           {wire.PTYInit{Command: "echo last; kill -9 $$", Ending: true}, "last\r\n", &wire.PTYEnding{Code: 137, Signal: "KILL"}},
		"no command":       {wire.PTYInit{Command: "fail", Ending: true}, "no manifest yet\r\n", &wire.PTYEnding{Code: 255, Reason: "no manifest yet"}},
		"none of the name": {wire.PTYInit{Name: "gone", Existing: true, Ending: true}, `there is no terminal gone: it has ended, or never was` + "\r\n", &wire.PTYEnding{Code: 255, Reason: "there is no terminal gone: it has ended, or never was"}},
		"none, stock":      {wire.PTYInit{Name: "gone", Existing: true}, `there is no terminal gone: it has ended, or never was` + "\r\n", nil},
		"a bad name": {wire.PTYInit{Name: "two\nlines", Ending: true},
			"cannot start the terminal: cannot use this name for a terminal: it has characters that cannot be printed\r\n",
			&wire.PTYEnding{Code: 255, Reason: "cannot start the terminal: cannot use this name for a terminal: it has characters that cannot be printed"}},
	} {
		t.Run(name, func(t *testing.T) {
			tt.init.ID, tt.init.Height, tt.init.Width = uuid.New(), 24, 80
			text, got := ending(t, p.open(t, tt.init))
			if diff := cmp.Diff(tt.want, got); diff != "" || text != tt.text {
				t.Errorf("%q, then (-want +got):\n%s", text, diff)
			}
		})
	}
	if all, err := p.host.list(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("terminals are left: %+v, %v", all, err)
	}

	// Nobody was there to see this one end; who comes next is told, and who comes then is not.
	id := uuid.New()
	unseen := p.open(t, wire.PTYInit{ID: id, Height: 24, Width: 80, Command: "echo up; read x; echo bye; exit 3"})
	readUntil(t, unseen, "up")
	io.WriteString(unseen, `{"data":"\r"}`)
	unseen.Close()
	eventually(t, "it ended", func() bool {
		all, err := p.host.list(t.Context())
		return err == nil && (len(all) == 0 || all[0].Exited != nil)
	})
	if all, err := p.host.list(t.Context()); err != nil || len(all) == 1 {
		text, got := ending(t, p.open(t, wire.PTYInit{ID: id, Height: 24, Width: 80, Existing: true, Ending: true}))
		if diff := cmp.Diff(&wire.PTYEnding{Code: 3}, got); diff != "" || !strings.Contains(text, "bye") {
			t.Errorf("unseen: %q, then (-want +got):\n%s", text, diff)
		}
	}
	if _, got := ending(t, p.open(t, wire.PTYInit{ID: id, Height: 24, Width: 80, Existing: true, Ending: true})); got == nil || !strings.Contains(got.Reason, "there is no terminal") {
		t.Errorf("told again: %+v", got)
	}
}

// TestTerminalsOfAStoppedWorkspace: clients are told that there is nothing to come back to, unless there is.
func TestTerminalsOfAStoppedWorkspace(t *testing.T) {
	for name, tt := range map[string]struct {
		kept bool
		want *wire.PTYEnding
	}{
		"stop":    {false, &wire.PTYEnding{Code: 255, Reason: "the workspace stopped"}},
		"restart": {true, nil},
	} {
		t.Run(name, func(t *testing.T) {
			p := servePTY(t)
			p.kept.Store(tt.kept)
			conn := p.open(t, wire.PTYInit{ID: uuid.New(), Height: 24, Width: 80, Command: "echo up; read x", Ending: true})
			readUntil(t, conn, "up")
			p.stop()
			if _, got := ending(t, conn); cmp.Diff(tt.want, got) != "" {
				t.Errorf("ended with %+v, want %+v", got, tt.want)
			}
		})
	}
}

// TestTerminalHostKilled: viewers learn why their terminal ended, the log tells, and the next terminal works.
func TestTerminalHostKilled(t *testing.T) {
	p := servePTY(t)
	id := uuid.New()
	conn := p.open(t, wire.PTYInit{ID: id, Name: "work", Height: 24, Width: 80, Command: "echo up; read x", Ending: true})
	readUntil(t, conn, "up")
	all, err := p.host.list(t.Context())
	if err != nil || len(all) != 1 {
		t.Fatalf("%+v, %v", all, err)
	}
	if err := syscall.Kill(parentOf(t, all[0].PID), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, got := ending(t, conn); got == nil || got.Reason != "the process that owns the terminals was killed" {
		t.Errorf("ended with %+v", got)
	}
	eventually(t, "the log tells", func() bool { return strings.Contains(p.log.String(), "was killed, and every terminal ended with it") })
	eventually(t, "there is another", func() bool {
		all, err := p.host.list(t.Context())
		return err == nil && len(all) == 0
	})
	_, got := ending(t, p.open(t, wire.PTYInit{ID: id, Name: "work", Height: 24, Width: 80, Existing: true, Ending: true}))
	if got == nil || !strings.Contains(got.Reason, "there is no terminal work: it has ended, or never was; the process that owned the terminals was killed at ") {
		t.Errorf("to who came back: %+v", got)
	}
	readUntil(t, p.open(t, wire.PTYInit{ID: id, Name: "work", Height: 24, Width: 80, Command: "echo anew; read x"}), "anew")
}

// TestReadOnlyTerminal: a watcher changes nothing.
func TestReadOnlyTerminal(t *testing.T) {
	p := servePTY(t)
	id := uuid.New()
	typist := p.open(t, wire.PTYInit{ID: id, Height: 24, Width: 80, Command: `echo up; while read x; do echo "got <$x>"; done`})
	readUntil(t, typist, "up")
	watcher := p.open(t, wire.PTYInit{ID: id, Height: 5, Width: 20, ReadOnly: true, Existing: true})
	readUntil(t, watcher, "up")
	io.WriteString(watcher, `{"data":"not me\r","height":6,"width":21}`)
	io.WriteString(typist, `{"data":"me\r"}`)
	if seen := readUntil(t, watcher, "got <me>"); strings.Contains(seen, "not me") {
		t.Errorf("a watcher typed: %q", seen)
	}
	if all, err := p.host.list(t.Context()); err != nil || all[0].Size.Rows != 24 {
		t.Errorf("a watcher changed the size: %+v, %v", all, err)
	}
}

// TestTerminalsAPI: terminals are listed, renamed and closed by id and by name.
func TestTerminalsAPI(t *testing.T) {
	p := servePTY(t)
	api := testAPI()
	api.terminals = p.host
	srv := httptest.NewServer(api.handler())
	defer srv.Close()
	do := func(method, path, body string, wantStatus int, into any) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, srv.URL+"/api/v0/terminals"+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := srv.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		all, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != wantStatus {
			t.Fatalf("%s %s: %d %s %v, want %d", method, path, resp.StatusCode, all, err, wantStatus)
		}
		if into != nil {
			reflect.ValueOf(into).Elem().SetZero()
			if err := json.Unmarshal(all, into); err != nil {
				t.Fatalf("%s: %v", all, err)
			}
		}
	}
	var list wire.Terminals
	if do("GET", "", "", 200, &list); list.Terminals == nil || len(list.Terminals) != 0 {
		t.Errorf("of none: %+v", list)
	}

	id, plain := uuid.New(), uuid.New()
	named := p.open(t, wire.PTYInit{ID: id, Name: "build", Height: 30, Width: 100, Ending: true,
		Command: `cd /usr; printf '\033]2;my title\007up '; set -m; sh -c "cd /tmp; echo in; read x; exit"; read x; exit`})
	readUntil(t, named, "in")
	unnamed := p.open(t, wire.PTYInit{ID: plain, Height: 24, Width: 80, Command: `printf '\033]7;file:///opt/a%%20b\007up'; exec sleep 1000`})
	readUntil(t, unnamed, "up")
	unnamed.Close()
	eventually(t, "nobody watches", func() bool {
		do("GET", "", "", 200, &list)
		return len(list.Terminals) == 2 && list.Terminals[1].Viewers == 0 && list.Terminals[1].Running == "sleep 1000"
	})

	got := list.Terminals[0]
	want := wire.Terminal{ID: id, Name: "build", Title: "my title", Command: got.Command, Running: "sh -c cd /tmp; echo in; read x; exit", Directory: "/tmp",
		PID: got.PID, Rows: 30, Cols: 100, Viewers: 1, CreatedAt: got.CreatedAt, ActiveAt: got.ActiveAt}
	if diff := cmp.Diff(want, got); diff != "" || got.PID == 0 || got.CreatedAt.IsZero() || got.ActiveAt.Before(got.CreatedAt) {
		t.Errorf("named (-want +got):\n%s", diff)
	}
	got = list.Terminals[1]
	if got.Directory != "/opt/a b" || got.EndsAt.Sub(got.ActiveAt).Minutes() > 1.5 || got.EndsAt.Sub(got.ActiveAt).Minutes() < 0.5 {
		t.Errorf("unnamed: %+v", got)
	}

	var one wire.Terminal
	if do("GET", "/build", "", 200, &one); one.ID != id {
		t.Errorf("by name: %+v", one)
	}
	do("GET", "/"+strings.ToUpper(plain.String()), "", 200, &one)
	for path, status := range map[string]int{"/nosuch": 404, "/00000000-0000-0000-0000-000000000000": 404, "/" + uuid.NewString(): 404} {
		do("GET", path, "", status, nil)
		do("DELETE", path, "", status, nil)
		do("PATCH", path, `{"name":"x"}`, status, nil)
	}
	for body, status := range map[string]int{
		`{"name":"build"}`: 409, `{"name":""}`: 400, `{"name":"a\tb"}`: 400, `{"name":"` + strings.Repeat("é", 65) + `"}`: 400, `{"name":"` + uuid.NewString() + `"}`: 400,
		`{}`: 400, `{`: 400, `{"size":1}`: 400, `{"name":7}`: 400,
	} {
		do("PATCH", "/"+plain.String(), body, status, nil)
	}
	if do("PATCH", "/"+plain.String(), `{"name":"näch/ste %41"}`, 200, &one); one.Name != "näch/ste %41" || one.ID != plain {
		t.Errorf("renamed: %+v", one)
	}
	// A name keeps it.
	if do("GET", "/n%C3%A4ch%2Fste%20%2541", "", 200, &one); one.ID != plain || !one.EndsAt.IsZero() {
		t.Errorf("by its new name: %+v", one)
	}

	// The old name of one that was renamed is free, whatever ids clients make of names.
	do("PATCH", "/build", `{"name":"old build"}`, 200, nil)
	fresh := p.open(t, wire.PTYInit{ID: id, Name: "build", Height: 24, Width: 80, Command: "echo fresh; read x"})
	readUntil(t, fresh, "fresh")
	back := p.open(t, wire.PTYInit{ID: id, Name: "old build", Height: 24, Width: 80, Existing: true})
	readUntil(t, back, "up in")
	same := p.open(t, wire.PTYInit{ID: uuid.New(), Name: "build", Height: 24, Width: 80, Command: "echo wrong"})
	readUntil(t, same, "fresh")
	if do("GET", "/build", "", 200, &one); one.ID == id || one.Viewers != 2 {
		t.Errorf("the fresh one: %+v", one)
	}

	do("DELETE", "/old%20build", "", 204, nil)
	if _, e := ending(t, named); e == nil || e.Reason != "closed on request" || e.Code != 129 {
		t.Errorf("closed with %+v", e)
	}
	eventually(t, "it is gone", func() bool { do("GET", "", "", 200, &list); return len(list.Terminals) == 2 })
	req, err := http.NewRequestWithContext(t.Context(), "DELETE", srv.URL+"/api/v0/terminals/build", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Referer", "http://elsewhere/")
	resp, err := srv.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 403 {
		t.Errorf("redirected: %s", resp.Status)
	}
}

// parentOf returns the parent of a process.
func parentOf(t *testing.T, pid int) int {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	var parent int
	var state string
	if _, err := fmt.Sscan(string(stat[strings.LastIndexByte(string(stat), ')')+1:]), &state, &parent); err != nil {
		t.Fatal(err)
	}
	return parent
}
