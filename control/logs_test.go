package control

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/coder/websocket"
	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// sendLogs sends numbered lines first, first+1, … of a spool.
func (l *agentLink) sendLogs(t *testing.T, spool, source uuid.UUID, first, n int) *agentpb.BatchCreateLogsResponse {
	t.Helper()
	req := &agentpb.BatchCreateLogsRequest{LogSourceId: source[:], BerthSpoolId: spool[:], BerthFirstSequence: uint64(first)}
	for i := range n {
		req.Logs = append(req.Logs, &agentpb.Log{Output: fmt.Sprint(first + i), Level: agentpb.Log_WARN})
	}
	resp, err := l.agent.BatchCreateLogs(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

func outputs(entries []wire.LogEntry) []string {
	var lines []string
	for _, e := range entries {
		lines = append(lines, e.Output)
	}
	return lines
}

func count(from, to int) []string {
	var lines []string
	for i := from; i <= to; i++ {
		lines = append(lines, fmt.Sprint(i))
	}
	return lines
}

// TestRestart stops the server and starts another on the same directory: agents, tokens, keys, ids
// and logs are there, and what the agent sends again is not stored twice.
func TestRestart(t *testing.T) {
	dir := t.TempDir()
	x := configured(t, Config{DataDir: dir})
	file := x.config.ConfigFile
	id, token := x.declared("demo")
	_, made := x.create("made")
	spool, source := uuid.New(), uuid.New()
	x.connect(token).sendLogs(t, spool, source, 1, 500)
	resume, err := x.resumeToken(uuid.New(), id)
	if err != nil {
		t.Fatal(err)
	}
	key := x.key
	x.stop()

	x = serve(t, Config{DataDir: dir, ConfigFile: file})
	if x.key != key {
		t.Error("the admin key is another")
	}
	again, _ := x.declared("demo")
	if again != id {
		t.Errorf("the agent is %v, was %v", again, id)
	}
	if _, err := x.resume(resume.GetToken(), id); err != nil {
		t.Errorf("resume token: %v", err)
	}
	x.connect(made)
	x.connect(token).sendLogs(t, spool, source, 401, 200) // the last answers were lost
	var got []wire.LogEntry
	x.get("/api/v2/workspaceagents/"+id.String()+"/logs", &got)
	if diff := cmp.Diff(count(1, 600), outputs(got)); diff != "" {
		t.Error(diff)
	}
	var rest []wire.LogEntry
	x.get(fmt.Sprintf("/api/v2/workspaceagents/%s/logs?after=%d", id, got[299].ID), &rest)
	if diff := cmp.Diff(count(301, 600), outputs(rest)); diff != "" {
		t.Error(diff)
	}
	if got[0].Level != "warn" || got[0].SourceID != source || got[0].CreatedAt.IsZero() {
		t.Errorf("first entry %+v", got[0])
	}
}

func TestFollow(t *testing.T) {
	x := serve(t, Config{})
	id, token := x.create("demo")
	follow, _, err := websocket.Dial(t.Context(), x.url+"/api/v2/workspaceagents/"+id.String()+"/startup-logs?follow&no_compression",
		&websocket.DialOptions{HTTPClient: x.http, HTTPHeader: http.Header{wire.HeaderSessionToken: {x.key.Reveal()}}})
	if err != nil {
		t.Fatal(err)
	}
	defer follow.CloseNow() // its read limit of 32 KiB is that of stock clients
	read := func() (entries []wire.LogEntry, raw string) {
		t.Helper()
		kind, text, err := follow.Read(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if kind != websocket.MessageText || !strings.HasSuffix(string(text), "]\n") {
			t.Errorf("%v message ends in %q", kind, text[len(text)-2:])
		}
		if err := json.Unmarshal(text, &entries); err != nil {
			t.Fatal(err)
		}
		return entries, string(text)
	}
	if _, raw := read(); raw != "[]\n" {
		t.Errorf("first message %q", raw)
	}
	l := x.connect(token)
	l.sendLogs(t, uuid.New(), uuid.New(), 1, 3)
	if entries, _ := read(); len(entries) != 3 {
		t.Errorf("%d entries, want 3", len(entries))
	}
	// Lines that grow when they are escaped, and one that fits into no message.
	long := strings.Repeat("<tag>&é", 9000)
	var lines []string
	for i := range 300 {
		lines = append(lines, fmt.Sprint(i, strings.Repeat("<", 200)))
	}
	lines = append(lines, long)
	req := &agentpb.BatchCreateLogsRequest{LogSourceId: make([]byte, 16)}
	for _, line := range lines {
		req.Logs = append(req.Logs, &agentpb.Log{Output: line})
	}
	if _, err := l.agent.BatchCreateLogs(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	got := ""
	for want := strings.Join(lines, ""); len(got) < len(want); {
		entries, _ := read()
		got += strings.Join(outputs(entries), "")
	}
	if got != strings.Join(lines, "") {
		t.Error("the lines that were followed are not those that were logged")
	}
}

func TestTextLogs(t *testing.T) {
	x := configured(t, Config{})
	id, token := x.declared("demo")
	source := uuid.NewString()
	x.call("POST", "/api/v2/workspaceagents/me/log-source", fmt.Sprintf(`{"id":%q,"display_name":"\u001b[2JBuild\u0007"}`, source), as(token)...)
	hostile := "a\x1b[31mred\x1b[0m\x1b[2J\x1b]0;title\x07\u0000 <b>\u202e\u2066x\u2028y\rz"
	body, err := json.Marshal(wire.PatchLogs{LogSourceID: uuid.MustParse(source), Logs: []wire.PatchLog{{Output: hostile, Level: "error"}}})
	if err != nil {
		t.Fatal(err)
	}
	if status, text := x.call("PATCH", "/api/v2/workspaceagents/me/logs", string(body), as(token)...); status != 200 {
		t.Fatal(text)
	}
	if status, text := x.call("PATCH", "/api/v2/workspaceagents/me/logs", `{"logs":[{"output":"external\nline\n"}]}`, as(token)...); status != 200 {
		t.Fatal(text)
	}
	_, text := x.call("GET", "/api/v2/workspaceagents/"+id.String()+"/logs?format=text", "", x.asUser()...)
	lines := strings.Split(text, "\n")
	if len(lines) != 3 || !strings.HasSuffix(lines[0], " [error] [agent.demo|Build] a\x1b[31mred\x1b[0m❌ <b>x y z") ||
		!strings.HasSuffix(lines[1], " [info] [agent.demo|External] external line") {
		t.Errorf("%q", text)
	}
	var view wire.Agent
	x.get("/api/v2/workspaceagents/"+id.String(), &view)
	var names []string
	for _, source := range view.LogSources {
		names = append(names, source.DisplayName)
	}
	// Nobody declares the source of a script, but its lines have a name.
	if diff := cmp.Diff([]string{"Start", "Build", "External"}, names); diff != "" || view.LogsLength == 0 {
		t.Errorf("sources %s, length %d", diff, view.LogsLength)
	}
}

// TestStockLogLimit: with a limit, an agent that crosses it is told once and for all.
func TestStockLogLimit(t *testing.T) {
	x := serve(t, Config{Logs: store.LogLimits{Total: 1 << 20}})
	id, token := x.create("demo")
	l := x.connect(token)
	send := func(size int) bool {
		t.Helper()
		resp, err := l.agent.BatchCreateLogs(t.Context(), &agentpb.BatchCreateLogsRequest{
			LogSourceId: make([]byte, 16), Logs: []*agentpb.Log{{Output: strings.Repeat("x", size)}}})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetLogLimitExceeded()
	}
	if send(1 << 20) {
		t.Error("the limit itself is too much")
	}
	for range 2 {
		if !send(1) {
			t.Error("one byte over the limit was taken")
		}
	}
	if status, body := x.call("PATCH", "/api/v2/workspaceagents/me/logs", `{"logs":[{"output":"x"}]}`, as(token)...); status != 413 || body != `{"message":"Logs limit exceeded"}`+"\n" {
		t.Errorf("%d %s", status, body)
	}
	var view wire.Agent
	x.get("/api/v2/workspaceagents/"+id.String(), &view)
	if !view.LogsOverflowed || view.LogsLength != 1<<20 {
		t.Errorf("overflowed %v, length %d", view.LogsOverflowed, view.LogsLength)
	}
}

func FuzzText(f *testing.F) {
	for _, seed := range []string{"plain", "\x1b[31mred\x1b[0m", "\x1b]0;t\x07", "\x1b]8;;u\x1b\\x", "\x1b", "\x1b[", "\xff\xfe", "<a<b>>", `\u001b[2J`, "a\x00b", "\x1b[3\x1b[1m", "<\x04A", "<<b>\x1bXi>"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		line := logText(s)
		rest := line
		for i := strings.IndexByte(rest, '\x1b'); i >= 0; i = strings.IndexByte(rest, '\x1b') {
			keep := sgr.FindString(rest[i:])
			if keep == "" {
				t.Fatalf("%q keeps an escape in %q", s, line)
			}
			rest = rest[i+len(keep):]
		}
		if again := logText(line); again != line {
			t.Errorf("cleaning twice: %q, then %q", line, again)
		}
		status := statusText(s)
		if strings.ContainsAny(status, "\x1b\x00\n\r\t") || tag.MatchString(status) {
			t.Errorf("%q became the status %q", s, status)
		}
	})
}

func FuzzLogQuery(f *testing.F) {
	f.Add("after=5&follow&format=json&no_compression&before=x")
	f.Add("after=-1&format=text")
	f.Add("after=9223372036854775808&format=xml")
	f.Fuzz(func(t *testing.T, text string) {
		query, _ := url.ParseQuery(text)
		wanted, e := parseLogQuery(query)
		if wanted.after < 0 || wanted.text && wanted.follow || e != nil && (e.StatusCode != 400 || wanted != logQuery{}) {
			t.Errorf("%q: %+v, %+v", text, wanted, e)
		}
	})
}

func FuzzFollowMessages(f *testing.F) {
	f.Add("x", uint16(3))
	f.Add(strings.Repeat("\x01", 7000), uint16(40))
	f.Add(strings.Repeat("é<", 30000), uint16(2))
	f.Fuzz(func(t *testing.T, output string, n uint16) {
		output = strings.ToValidUTF8(output[:min(len(output), 256<<10)], "?") // the store keeps no more in one place
		var entries []wire.LogEntry
		for i := range int64(n % 300) {
			if int(i)*len(output) > 256<<10 {
				break
			}
			entries = append(entries, wire.LogEntry{ID: i, Output: output, Level: "info"})
		}
		var got strings.Builder
		for message := range followMessages(entries) {
			if len(message)+len("\n") > wire.MaxFollowMessage {
				t.Fatalf("a message of %d bytes", len(message))
			}
			var part []wire.LogEntry
			if err := json.Unmarshal(message, &part); err != nil {
				t.Fatal(err)
			}
			got.WriteString(strings.Join(outputs(part), ""))
		}
		if got.String() != strings.Repeat(output, len(entries)) {
			t.Error("output was lost")
		}
	})
}
