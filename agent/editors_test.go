package agent

import (
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/berthd/berth/shell"
	"github.com/berthd/berth/wire/agentpb"
)

func TestWithSettings(t *testing.T) {
	const both = "\n\t\"git.useIntegratedAskPass\": false,\n\t\"github.gitAuthentication\": false"
	tests := map[string]struct {
		old, want string
		bad       bool
	}{
		"new":            {old: "", want: "{" + both + "\n}\n"},
		"empty object":   {old: " {}", want: " {" + both + "}"},
		"others":         {old: "{\n  \"b\": 1, \"a\": {}\n}\n", want: "{" + both + ",\n  \"b\": 1, \"a\": {}\n}\n"},
		"one is set":     {old: `{"git.useIntegratedAskPass": true}`, want: "{\n\t\"github.gitAuthentication\": false,\"git.useIntegratedAskPass\": true}"},
		"both are set":   {old: `{"git.useIntegratedAskPass": true, "github.gitAuthentication": null}`, want: `{"git.useIntegratedAskPass": true, "github.gitAuthentication": null}`},
		"with a comment": {old: "{ // mine\n}", bad: true},
		"an array":       {old: "[]", bad: true},
		"null":           {old: "null", bad: true},
	}
	for name, tt := range tests {
		got, err := withSettings([]byte(tt.old))
		if (err != nil) != tt.bad {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(tt.want, string(got)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		if err == nil && !json.Valid(got) {
			t.Errorf("%s: %s is no JSON", name, got)
		}
	}
}

// TestSettleEditors: only where there are logins and somebody to give them, with permissions kept, and
// up to the first file that cannot be read.
func TestSettleEditors(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("XDG_DATA_HOME", "")
	files := editorFiles(home, filepath.Join(home, ".local", "share"))
	a := &agent{log: slog.New(slog.DiscardHandler), parts: parts{shell: shell.New(shell.Config{})}}
	there := func() (n int) {
		for _, f := range files {
			if _, err := os.Stat(f); err == nil {
				n++
			}
		}
		return n
	}
	a.settleEditors(&agentpb.Manifest{GitAuthConfigs: 1})
	a.cfg.Helpers.Program = "/berthd"
	a.settleEditors(&agentpb.Manifest{})
	if n := there(); n != 0 {
		t.Errorf("%d files were made for nothing", n)
	}
	if err := os.MkdirAll(filepath.Dir(files[0]), 0o700); err != nil {
		t.Fatal(err)
	}
	put(t, files[0], "{}", 0o644)
	a.settleEditors(&agentpb.Manifest{GitAuthConfigs: 1})
	if n := there(); n != len(files) {
		t.Errorf("%d files, want %d", n, len(files))
	}
	for i, want := range []os.FileMode{0o644, 0o600} {
		if info, err := os.Stat(files[i]); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", files[i], info, err)
		}
	}
	put(t, files[0], "{ // mine", 0o600)
	if err := os.Remove(files[1]); err != nil {
		t.Fatal(err)
	}
	a.settleEditors(&agentpb.Manifest{GitAuthConfigs: 1})
	if n := there(); n != len(files)-1 {
		t.Error("what follows a broken file was changed")
	}
}
