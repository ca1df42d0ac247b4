package berthd

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/berthd/berth/internal/upgrade"
)

// TestFollow: the server's version is upgraded to when it is another one, and one that failed is left alone until there is another.
func TestFollow(t *testing.T) {
	hosted := version
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, hosted) }))
	defer srv.Close()
	address, err := url.Parse(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	upgraded := filepath.Join(dir, "upgraded")
	f := &follower{
		source: upgrade.Source{URL: address, HTTP: srv.Client()}, refused: filepath.Join(dir, refusedFile), log: slog.New(slog.DiscardHandler),
		command: func() *exec.Cmd {
			return exec.Command("sh", "-c", fmt.Sprintf("echo %[1]s >>'%[2]s'; [ %[1]s = v9.0.0 ] || exit 1", hosted, upgraded))
		},
	}
	follow := func(want string) {
		t.Helper()
		err := f.once(t.Context())
		if got := fmt.Sprint(err); err == nil && want != "" || err != nil && (want == "" || !strings.Contains(got, want)) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	follow("") // the same
	hosted = "v9.0.0"
	follow("")
	hosted = "v9.0.1"
	follow("the upgrade failed")
	if err := writeRefused(f.refused, refused{Version: "v9.0.1", Cause: "it did not come up"}); err != nil { // as the verb does
		t.Fatal(err)
	}
	follow("v9.0.1 is hosted, but was tried already: it did not come up")
	hosted = "<html>"
	follow("an HTML page came back")
	hosted = "v9.0.0"
	follow("")
	if err := os.WriteFile(f.refused, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	follow("") // a note that cannot be read forbids nothing
	if b, err := os.ReadFile(upgraded); err != nil || string(b) != "v9.0.0\nv9.0.1\nv9.0.0\nv9.0.0\n" {
		t.Errorf("upgraded to %q, %v", b, err)
	}
}
