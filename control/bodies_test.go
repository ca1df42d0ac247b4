package control

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/berthd/berth/control/openapi"
	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
)

// FuzzBodies sends a body to every endpoint that reads one, as somebody who may. Whatever it is, the
// answer is no failure of the server's, and what is refused is refused in JSON.
func FuzzBodies(f *testing.F) {
	s, err := New(f.Context(), Config{AccessURL: &url.URL{Scheme: "http", Host: "127.0.0.1:1"}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { s.close() })
	agent := store.Agent{ID: uuid.New(), Name: "demo", Spec: store.Spec{Apps: []store.App{{ID: uuid.New(), Slug: "web"}}}}
	if err := s.store.CreateAgent(f.Context(), agent); err != nil {
		f.Fatal(err)
	}
	token, err := s.store.MintToken(f.Context(), agent.ID, false)
	if err != nil {
		f.Fatal(err)
	}
	var readers []openapi.Route
	for _, e := range s.endpoints() {
		if e.Operation.Body != nil {
			readers = append(readers, e.Route)
		}
	}
	if len(readers) < 5 {
		f.Fatalf("only %d endpoints read a body", len(readers))
	}
	for i := range readers {
		for _, body := range []string{
			``, `{}`, `null`, `[]`, `{"name":"other"}`, `{"name":"demo"}`, `{"name":"` + strings.Repeat("x", 100) + `"}`,
			`{"signature":"AAAA","document":"{\"instanceId\":\"i-1\"}","agent_name":"demo"}`,
			`{"signature":"AAAA","encoding":"","json_web_token":"a.b.c"}`,
			`{"app_slug":"web","state":"working","message":"m","uri":"https://example.com"}`,
			`{"app_slug":"web","state":"idle","message":"` + strings.Repeat("m", 161) + `"}`,
			`{"id":"3b579bf4-1ed8-4b99-87a8-e9a1e3410410","display_name":"d","icon":"/i.png"}`,
			`{"log_source_id":"3b579bf4-1ed8-4b99-87a8-e9a1e3410410","logs":[{"created_at":"2024-01-01T00:00:00Z","output":"o","level":"info"}]}`,
			`{"logs":[{"output":"\u0000\ud800","level":"loud"}]}`,
			`{"agent_id":"3b579bf4-1ed8-4b99-87a8-e9a1e3410410","app_name":"ssh"}`, `{"messages":[]}`, `{"messages":{}}`,
			`{"user_id":"3b579bf4-1ed8-4b99-87a8-e9a1e3410410"}`,
		} {
			f.Add(byte(i), []byte(body))
		}
	}
	place := strings.NewReplacer("{id}", agent.ID.String(), "{dc}", uuid.NewString(), "{task}/log-snapshot", uuid.NewString()+"/log-snapshot?format=agentapi")
	f.Fuzz(func(t *testing.T, which byte, body []byte) {
		route := readers[int(which)%len(readers)]
		r := httptest.NewRequestWithContext(t.Context(), route.Method, place.Replace(route.Path), strings.NewReader(string(body)))
		switch route.Security {
		case agentToken:
			r.Header.Set(wire.HeaderSessionToken, token.Reveal())
		case userKey:
			r.Header.Set(wire.HeaderSessionToken, s.AdminKey().Reveal())
		}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		// The protocol has no better answer to a name that is too long for the store of a stock server.
		if w.Code == http.StatusInternalServerError && strings.Contains(w.Body.String(), "is longer than") {
			return
		}
		if w.Code >= 500 || w.Code == http.StatusUnauthorized && route.Security != "" {
			t.Fatalf("%s %s: %d %s", route.Method, route.Path, w.Code, w.Body)
		}
		if w.Code >= 400 {
			e := new(wire.Error)
			if err := json.Unmarshal(w.Body.Bytes(), e); err != nil || e.Message == "" {
				t.Errorf("%s %s: %d %s: %v", route.Method, route.Path, w.Code, w.Body, err)
			}
		}
	})
}
