package agent

import (
	"bytes"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/berthd/berth/wire/agentpb"
)

func TestWriteSecret(t *testing.T) {
	tests := map[string]struct {
		prepare func(t *testing.T, dir string)
		path    string // below the directory
		mode    fs.FileMode
		at      string // where it is found, if not at path
		err     string
	}{
		"new":               {path: "a", mode: 0o600},
		"new directories":   {path: "x/y/a", mode: 0o600},
		"existing":          {path: "a", mode: 0o640, prepare: func(t *testing.T, dir string) { put(t, filepath.Join(dir, "a"), "old", 0o640) }},
		"the same already":  {path: "a", mode: 0o400, prepare: func(t *testing.T, dir string) { put(t, filepath.Join(dir, "a"), planted, 0o400) }},
		"link is replaced":  {path: "a", mode: 0o600, prepare: func(t *testing.T, dir string) { put(t, filepath.Join(dir, "b"), "b", 0o644); symlink(t, "b", dir, "a") }},
		"own linked folder": {path: "l/a", at: "d/a", mode: 0o600, prepare: func(t *testing.T, dir string) { folder(t, dir, "d", 0o755); symlink(t, "d", dir, "l") }},
		"folder":            {path: "d", err: "directory", prepare: func(t *testing.T, dir string) { folder(t, dir, "d", 0o755) }},
		"file above":        {path: "f/a", err: "is no directory", prepare: func(t *testing.T, dir string) { put(t, filepath.Join(dir, "f"), "", 0o600) }},
		"open to everybody": {path: "d/a", err: "everybody may change", prepare: func(t *testing.T, dir string) { folder(t, dir, "d", 0o777) }},
		"link round":        {path: "l/a", err: "symbolic links", prepare: func(t *testing.T, dir string) { symlink(t, "l", dir, "l") }},
		"another's folder":  {path: "d/a", err: "belongs to another", prepare: func(t *testing.T, dir string) { folder(t, dir, "d", 0o755); give(t, dir, "d") }},
		"below another's":   {path: "d/x/a", err: "belongs to another", prepare: func(t *testing.T, dir string) { folder(t, dir, "d", 0o755); give(t, dir, "d") }},
		"link with dots": {path: "l/a", at: "d/a", mode: 0o600, prepare: func(t *testing.T, dir string) {
			folder(t, dir, "x", 0o755)
			folder(t, dir, "d", 0o755)
			symlink(t, "./x/../d", dir, "l")
		}},
		"another's link": {path: "l/a", err: "belongs to another", prepare: func(t *testing.T, dir string) {
			folder(t, dir, "d", 0o755)
			symlink(t, "d", dir, "l")
			give(t, dir, "l")
		}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if tt.prepare != nil {
				tt.prepare(t, dir)
			}
			path := filepath.Join(dir, tt.path)
			err := writeSecret(path, []byte(planted))
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("error %v, want %q", err, tt.err)
				}
			} else if err != nil {
				t.Fatal(err)
			} else {
				if tt.at != "" {
					path = filepath.Join(dir, tt.at)
				}
				info, err := os.Lstat(path)
				if err != nil {
					t.Fatal(err)
				}
				if body, err := os.ReadFile(path); err != nil || string(body) != planted || info.Mode() != tt.mode {
					t.Errorf("%q, mode %v, %v", body, info.Mode(), err)
				}
			}
			err = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
				if strings.HasPrefix(d.Name(), ".") {
					t.Errorf("%s was left behind", p)
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

func put(t *testing.T, path, text string, mode fs.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func folder(t *testing.T, dir, name string, mode fs.FileMode) {
	t.Helper()
	if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, name), mode); err != nil {
		t.Fatal(err)
	}
}

func symlink(t *testing.T, target, dir, name string) {
	t.Helper()
	if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

// give makes a file another user's, which takes root.
func give(t *testing.T, dir, name string) {
	t.Helper()
	if err := os.Lchown(filepath.Join(dir, name), 12345, 12345); err != nil {
		t.Fatal(err)
	}
}

func TestSecretPath(t *testing.T) {
	for path, want := range map[string]string{
		"~/.netrc":       "/home/u/.netrc",
		"/etc/x/../y":    "/etc/y",
		"rel/a":          "/home/u/rel/a",
		"~other/.netrc":  "/home/u/~other/.netrc",
		"/run/$HOME/key": "/run/$HOME/key",
	} {
		if got := secretPath(path, "/home/u"); got != want {
			t.Errorf("secretPath(%q) = %q, want %q", path, got, want)
		}
	}
}

// TestSecretsAreNotLogged: neither when they are written nor when they cannot be.
func TestSecretsAreNotLogged(t *testing.T) {
	var log bytes.Buffer
	home := t.TempDir()
	writeSecrets([]*agentpb.WorkspaceSecret{
		nil, {EnvName: "ONLY", Value: []byte(planted)},
		{FilePath: "~/good", Value: []byte(planted)},
		{FilePath: "/proc/nowhere/bad", Value: []byte(planted)},
	}, home, slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	if body, err := os.ReadFile(filepath.Join(home, "good")); err != nil || string(body) != planted {
		t.Errorf("%q, %v", body, err)
	}
	if text := log.String(); strings.Contains(text, planted) || !strings.Contains(text, "/proc/nowhere/bad") {
		t.Errorf("log:\n%s", text)
	}
}
