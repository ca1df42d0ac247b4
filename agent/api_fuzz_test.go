package agent

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/berthd/berth/mask"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
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
		w := sendTo(t, h, method, target, body)
		if w == nil {
			return
		}
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

// sendTo sends a request, unless net/http would not take it as one.
func sendTo(t *testing.T, h http.Handler, method, target string, body []byte) *httptest.ResponseRecorder {
	r, err := http.NewRequestWithContext(t.Context(), method, "http://127.0.0.1:4", bytes.NewReader(body))
	if err != nil || !strings.HasPrefix(target, "/") {
		return nil
	}
	// As net/http reads a request line.
	u, err := url.ParseRequestURI(target)
	if err != nil {
		return nil
	}
	u.Scheme, u.Host = "", ""
	r.URL, r.RequestURI, r.RemoteAddr = u, target, "[::1]:7"
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

// FuzzLocalAPI sends the Unix socket what any program of the workspace might. What is taken can be sent to any
// server, and the token goes to its own server alone.
func FuzzLocalAPI(f *testing.F) {
	for _, seed := range []struct{ method, target, body string }{
		{"POST", "/v1/app-status", `{"app_slug":"claude","state":"working","message":"reading","uri":"https://example.com"}`},
		{"POST", "/v1/app-status", `{"app_slug":"claude","state":"asleep"}`},
		{"POST", "/v1/app-status", `{"app_slug":"clod\u0000","state":"idle","message":"\ud800\u001b[31m"}`},
		{"POST", "/v1/app-status", "{\"app_slug\":\"claude\",\"state\":\"idle\",\"message\":\"\xff\xfe\"}"},
		{"POST", "/v1/app-status", `{"app_slug":"claude","state":"idle"} {}`},
		{"POST", "/v1/app-status", `[[[[`},
		{"POST", "/v1/app-status?app_slug=claude", ""},
		{"POST", "/v1/secrets", `{"values":["one","\u0000",""]}`},
		{"POST", "/v1/secrets", `{"values":[1]}`},
		{"GET", "/v1/session-token?server=https://berth.example.com", ""},
		{"GET", "/v1/session-token?server=https://evil.example.com", ""},
		{"GET", "/v1/session-token?server=%zz", ""},
		{"GET", "/v1/agent", ""},
		{"DELETE", "/v1/../v1/app-status", ""},
	} {
		f.Add(seed.method, seed.target, []byte(seed.body))
	}
	const server = "https://berth.example.com"
	var taken *agentpb.UpdateAppStatusRequest
	h := (&localAPI{
		server: server, token: func() wire.Secret { return planted },
		manifest:  func() *agentpb.Manifest { return &agentpb.Manifest{Apps: []*agentpb.WorkspaceApp{{Slug: "claude"}}} },
		about:     func() About { return testAbout },
		appStatus: func(u *agentpb.UpdateAppStatusRequest) { taken = u },
		hide:      mask.New().Add,
	}).handler()
	f.Fuzz(func(t *testing.T, method, target string, body []byte) {
		w := sendTo(t, h, method, target, body)
		if w == nil {
			return
		}
		if w.Code >= http.StatusInternalServerError {
			t.Errorf("%s %s: %d %s", method, target, w.Code, w.Body)
		}
		if u := taken; (w.Code == http.StatusAccepted) != (u != nil) {
			t.Errorf("%s %s: %d, but %v was taken", method, target, w.Code, u)
		} else if u != nil {
			if _, err := proto.Marshal(u); err != nil || u.GetSlug() != "claude" || len(u.GetMessage()) > wire.MaxAppStatusMessage || len(u.GetUri()) > wire.MaxURI {
				t.Errorf("took %v: %v", u, err)
			}
		}
		taken = nil
		if u, err := url.ParseRequestURI(target); strings.Contains(w.Body.String(), planted) && (err != nil || u.Query().Get("server") != server) {
			t.Errorf("%s %s gives the token away", method, target)
		}
	})
}
