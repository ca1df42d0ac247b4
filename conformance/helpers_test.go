package conformance

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/base32"
	"encoding/json"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// slugOf is how the slug of a sub-agent's app is stored.
func slugOf(agent, slug string) string {
	sum := sha256.Sum256([]byte(agent + "/" + slug))
	return strings.ToLower(base32.HexEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:]))[:8] + "-" + slug
}

// logs reads the log of an agent.
func (w *world) logs(t testing.TB, a identity, query string) []map[string]any {
	t.Helper()
	r := request(t, "GET", w.url+"/api/v2/workspaceagents/"+a.id+"/logs"+query, w.key, nil).wants(t, 200, "")
	var all []map[string]any
	if err := json.Unmarshal(r.body, &all); err != nil {
		t.Fatalf("the log is %.300s", r.body)
	}
	return all
}

// event is one server-sent event.
type event struct{ kind, data string }

// events opens a stream of server-sent events.
func events(t testing.TB, url, token string) (next func() (event, error), resp *http.Response) {
	t.Helper()
	return eventsBy(t, url, http.Header{"Coder-Session-Token": {token}})
}

func eventsBy(t testing.TB, url string, header http.Header) (next func() (event, error), resp *http.Response) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header = header
	resp, err = http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	r := bufio.NewReader(resp.Body)
	return func() (event, error) {
		var e event
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				return e, err
			}
			line = strings.TrimSuffix(line, "\n")
			if line == "" {
				return e, nil
			}
			if v, ok := strings.CutPrefix(line, "event: "); ok {
				e.kind = v
			} else if v, ok := strings.CutPrefix(line, "data: "); ok {
				e.data += v
			} else {
				t.Errorf("a line that stock readers do not take: %q", line)
			}
		}
	}, resp
}

// watchOnce returns the first state that watch-metadata shows.
func watchOnce(t testing.TB, w *world, a identity) []map[string]any {
	t.Helper()
	next, resp := events(t, w.url+"/api/v2/workspaceagents/"+a.id+"/watch-metadata", w.key)
	defer resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Fatalf("watch-metadata:%s", answer(resp))
	}
	for {
		e, err := next()
		if err != nil {
			t.Fatalf("watch-metadata: %v", err)
		}
		if e.kind != "data" {
			continue
		}
		var all []map[string]any
		if err := json.Unmarshal([]byte(e.data), &all); err != nil {
			t.Fatalf("watch-metadata: %v in %.300s", err, e.data)
		}
		return all
	}
}

// rawConn is a connection to the server with nothing on top.
func rawConn(t testing.TB, w *world) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(w.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	return conn
}
