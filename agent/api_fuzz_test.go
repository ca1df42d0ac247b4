package agent

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/berthd/berth/wire"
)

// FuzzAPI sends the API on port 4 what any peer of the mesh might. No answer is a failure of the
// server's own making without a reason, and none holds a secret.
func FuzzAPI(f *testing.F) {
	for _, seed := range []struct{ method, target, body string }{
		{"GET", "/", ""},
		{"GET", "/api/v0/listening-ports", ""},
		{"POST", "/api/v0/list-directory", `{"path":["tmp"],"relativity":"root"}`},
		{"POST", "/api/v0/list-directory", `{"path":["..","..",""],"relativity":"home"}`},
		{"POST", "/api/v0/list-directory?path=/proc/self/../self", `{}`},
		{"POST", "/api/v0/list-directory?path=relative&path=two&x=%zz", `[]`},
		{"GET", "/api/v0/containers", ""},
		{"POST", "/api/v0/containers/devcontainers/3b579bf4-1ed8-4b99-87a8-e9a1e3410410/recreate", ""},
		{"DELETE", "/api/v0/containers/devcontainers/x", ""},
		{"GET", "/api/v0/terminals", ""},
		{"GET", "/api/v0/terminals/a%2Fb", ""},
		{"PATCH", "/api/v0/terminals/work", `{"name":"play"}`},
		{"DELETE", "/api/v0/terminals/3b579bf4-1ed8-4b99-87a8-e9a1e3410410", ""},
		{"GET", "/debug/manifest", ""},
		{"GET", "/debug/magicsock/debug-logging/maybe", ""},
		{"GET", "/debug/prometheus?x", ""},
		{"BREW", "/%2e%2e/api//v0", "tea"},
	} {
		f.Add(seed.method, seed.target, []byte(seed.body))
	}
	h := testAPI().handler()
	f.Fuzz(func(t *testing.T, method, target string, body []byte) {
		r, err := http.NewRequestWithContext(t.Context(), method, "http://127.0.0.1:4", strings.NewReader(string(body)))
		if err != nil || !strings.HasPrefix(target, "/") {
			return
		}
		// As net/http reads a request line.
		u, err := url.ParseRequestURI(target)
		if err != nil {
			return
		}
		u.Scheme, u.Host = "", ""
		r.URL, r.RequestURI, r.RemoteAddr = u, target, "[::1]:7"
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code == http.StatusInternalServerError {
			e := new(wire.Error)
			if err := json.Unmarshal(w.Body.Bytes(), e); err != nil || e.Message == "" {
				t.Errorf("%s %s: %d %s", method, target, w.Code, w.Body)
			}
		}
		if strings.Contains(w.Body.String(), planted) {
			t.Errorf("%s %s gives a secret away", method, target)
		}
	})
}
