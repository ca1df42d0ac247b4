package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
)

// sse reads server-sent events as strictly as stock readers do.
type sse struct {
	t    *testing.T
	body *bufio.Reader
}

// events opens a stream of events, which ends with the test.
func (x *site) events(path string, header ...string) *sse {
	x.t.Helper()
	req, err := http.NewRequestWithContext(x.t.Context(), "GET", x.url+path, nil)
	if err != nil {
		x.t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := x.http.Do(req)
	if err != nil {
		x.t.Fatal(err)
	}
	x.t.Cleanup(func() { resp.Body.Close() })
	want := map[string]string{"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
	for name, value := range want {
		if got := resp.Header.Get(name); got != value {
			x.t.Errorf("%s: %s is %q", path, name, got)
		}
	}
	if resp.StatusCode != http.StatusOK {
		x.t.Fatalf("%s: %s", path, resp.Status)
	}
	return &sse{x.t, bufio.NewReader(resp.Body)}
}

// next reads one event that is no ping.
func (s *sse) next() (kind, data string) {
	s.t.Helper()
	line := func() string {
		text, err := s.body.ReadString('\n')
		if err != nil {
			s.t.Fatalf("the stream ended after %q: %v", text, err)
		}
		return strings.TrimSuffix(text, "\n")
	}
	for {
		kind, ok := strings.CutPrefix(line(), "event: ")
		if !ok {
			s.t.Fatalf("an event begins with %q", kind)
		}
		if kind == "ping" {
			if rest := line(); rest != "" {
				s.t.Fatalf("a ping holds %q", rest)
			}
			continue
		}
		data, ok := strings.CutPrefix(line(), "data: ")
		if rest := line(); !ok || rest != "" {
			s.t.Fatalf("event %s: %q, %q", kind, data, rest)
		}
		return kind, data
	}
}

func TestEventFraming(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := httptest.NewRecorder()
		stream := sendEvents(w)
		check := func(err error) {
			if err != nil {
				t.Error(err)
			}
		}
		check(stream.ping()) // it was just begun
		check(stream.send(eventData, map[string]string{"a": "x\n<y>"}))
		time.Sleep(pingEvery)
		check(stream.ping())
		check(stream.ping())
		check(stream.send(eventError, &wire.Error{Message: "m"}))
		want := "event: data\ndata: {\"a\":\"x\\n\\u003cy\\u003e\"}\n\nevent: ping\n\nevent: error\ndata: {\"message\":\"m\"}\n\n"
		if got := w.Body.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

func TestWatchMetadata(t *testing.T) {
	x := configured(t, Config{})
	id, _ := x.declared("demo")
	path := "/api/v2/workspaceagents/" + id.String() + "/watch-metadata"
	stream := x.events(path, x.asUser()...)
	ws, _, err := websocket.Dial(t.Context(), x.url+path+"-ws", &websocket.DialOptions{HTTPClient: x.http, HTTPHeader: http.Header{"Cookie": {"coder_session_token=" + x.key.Reveal()}}})
	if err != nil {
		t.Fatal(err)
	}
	defer ws.CloseNow()
	const empty = `[{"result":{"collected_at":"0001-01-01T00:00:00Z","age":0,"value":"","error":""},` +
		`"description":{"display_name":"Load","key":"load","script":"cat /proc/loadavg","interval":10,"timeout":2}}]`
	if kind, data := stream.next(); kind != "data" || data != empty {
		t.Errorf("%s %s", kind, data)
	}
	kind, message, err := ws.Read(t.Context())
	if want := `{"type":"data","data":` + empty + "}\n"; err != nil || kind != websocket.MessageText || string(message) != want {
		t.Errorf("%v %s %v", kind, message, err)
	}
	at := time.Now().Add(-time.Minute).UTC()
	err = x.store.PutMetadata(t.Context(), id, map[string]store.MetadataValue{"load": {CollectedAt: at, Value: "0.5", Error: "none"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, next := range []func() []byte{
		func() []byte {
			_, data := stream.next()
			return []byte(data)
		},
		func() []byte {
			_, message, err := ws.Read(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return []byte(between(string(message), `"data",`+`"data":`, "}\n"))
		},
	} {
		var got []wire.AgentMetadata
		if err := json.Unmarshal(next(), &got); err != nil {
			t.Fatal(err)
		}
		if len(got) != 1 || got[0].Result.Value != "0.5" || got[0].Result.Error != "none" || !got[0].Result.CollectedAt.Equal(at) || got[0].Result.Age < 60 {
			t.Errorf("metadata %+v", got)
		}
	}
	// Both end in order when the agent goes.
	if err := x.store.DeleteAgent(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, _, err = ws.Read(t.Context())
	}
	if websocket.CloseStatus(err) != websocket.StatusNormalClosure {
		t.Errorf("the socket ended with %v", err)
	}
	if _, err := io.ReadAll(stream.body); err != nil {
		t.Errorf("the stream ended with %v", err)
	}
}

func TestMetadataPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		value, failure := "a", error(nil)
		w := (&Server{}).watchMetadata(uuid.Nil)
		w.read = func(context.Context) ([]wire.AgentMetadata, error) {
			return []wire.AgentMetadata{{Result: wire.MetadataResult{Value: value}}}, failure
		}
		var got []string
		err := w.run(t.Context(), func(v any) error {
			got = append(got, time.Since(start).String()+" "+v.([]wire.AgentMetadata)[0].Result.Value)
			switch time.Since(start) {
			case 5 * time.Second:
				value = "b"
			case 6 * time.Second:
				failure = errors.New("broken")
			}
			return nil
		}, func() error { return nil })
		got = append(got, time.Since(start).String()+" "+err.Error())
		if diff := cmp.Diff([]string{"0s a", "5s a", "6s b", "7s broken"}, got); diff != "" {
			t.Error(diff)
		}
	})
}

// TestReinit claims a prebuilt workspace while an agent of each year waits for it.
func TestReinit(t *testing.T) {
	x := configured(t, Config{})
	config := "agents: [{name: warm, prebuilt: true}, {name: demo}]"
	writeConfig(t, x.config.ConfigFile, config)
	if err := x.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	id, token := x.declared("warm")
	plain, _ := x.declared("demo")
	const path = "/api/v2/workspaceagents/me/reinit"
	old := x.events(path, "Cookie", "coder_session_token="+token.Reveal())
	durable := x.events(path+"?wait=true", as(token)...)
	claim := func(id uuid.UUID) int {
		status, _ := x.call("POST", "/api/v2/berth/agents/"+id.String()+"/claim", "", x.asUser()...)
		return status
	}
	if got := claim(plain); got != http.StatusConflict {
		t.Errorf("claiming what is not prebuilt: %d", got)
	}
	if got := claim(id); got != http.StatusNoContent {
		t.Errorf("claim: %d", got)
	}
	want := `{"workspace_id":"` + id.String() + `","reason":"prebuild_claimed","owner_id":"` + x.ownerID().String() + `"}`
	for name, stream := range map[string]*sse{"2025": old, "2026": durable} {
		if kind, data := stream.next(); kind != "data" || data != want {
			t.Errorf("%s: %s %s", name, kind, data)
		}
	}
	if _, err := io.ReadAll(durable.body); err != nil {
		t.Errorf("what was told ends with %v", err)
	}
	// It is told once: who comes again has nothing to wait for, and who does not ask hears nothing.
	if status, body := x.call("GET", path+"?wait=true", "", as(token)...); status != http.StatusConflict || !strings.Contains(body, "not a prebuilt workspace") {
		t.Errorf("again: %d %s", status, body)
	}
	if got := claim(id); got != http.StatusConflict {
		t.Errorf("claiming twice: %d", got)
	}
}

// TestTooManyStreams: an agent that opens streams without end takes none from another.
func TestTooManyStreams(t *testing.T) {
	x := serve(t, Config{})
	id, token := x.create("greedy")
	_, other := x.create("other")
	const path = "/api/v2/workspaceagents/me/reinit"
	x.events(path, as(token)...)
	for x.open.enter(id) { // as if the others were open, too
	}
	if status, body := x.call("GET", path, "", as(token)...); status != http.StatusTooManyRequests || !strings.Contains(body, "At most 256") {
		t.Errorf("one more: %d %s", status, body)
	}
	x.events(path, as(other)...)
	x.open.leave(id)
	x.events(path, as(token)...)
}

// TestReinitAfterTheClaim: what is claimed while its agent is away is told when it asks.
func TestReinitAfterTheClaim(t *testing.T) {
	x := configured(t, Config{})
	writeConfig(t, x.config.ConfigFile, "agents: [{name: warm, prebuilt: true}]")
	if err := x.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	id, token := x.declared("warm")
	if err := x.store.Claim(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if kind, data := x.events("/api/v2/workspaceagents/me/reinit?wait=true", as(token)...).next(); kind != "data" || !strings.Contains(data, id.String()) {
		t.Errorf("%s %s", kind, data)
	}
}
