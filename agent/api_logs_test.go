package agent

import (
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/uuid"

	"github.com/berthd/berth/mask"
	"github.com/berthd/berth/wire"
)

func TestScriptLog(t *testing.T) {
	source := uuid.New()
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte("first\nthe key is "+planted+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	a := testAPI()
	a.mask = mask.New(planted)
	a.scriptLog = func(asked uuid.UUID) (*os.File, error) {
		if asked != source {
			return nil, fs.ErrNotExist
		}
		return os.Open(path)
	}
	for key, want := range map[string]struct {
		code int
		body string
	}{source.String(): {http.StatusOK, "first\nthe key is [hidden]\n"}, uuid.NewString(): {code: http.StatusNotFound}, "x": {code: http.StatusBadRequest}} {
		w := httptest.NewRecorder()
		a.handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "http://127.0.0.1"+wire.PathAgentScriptLogs+key, nil))
		if w.Code != want.code || want.body != "" && w.Body.String() != want.body {
			t.Errorf("%s: %d %q", key, w.Code, w.Body)
		}
	}
}
