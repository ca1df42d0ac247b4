package main

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/berthd/berth/wire"
)

// isolate gives the test an environment of its own: no server named, an empty configuration directory.
// It returns that directory.
func isolate(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"BERTH_URL", "BERTH_TOKEN", "BERTH_CA_FILE", "CODER_URL", "CODER_SESSION_TOKEN"} {
		t.Setenv(name, "")
	}
	t.Setenv("HOME", dir)
	t.Setenv("XDG_CONFIG_HOME", dir)
	return filepath.Join(dir, "berth")
}

func writeFile(t *testing.T, path, content string, mode fs.FileMode) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

// gone returns the id of a process that has ended.
func gone(t *testing.T) int {
	t.Helper()
	cmd := exec.Command("true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid
}

func TestAccess(t *testing.T) {
	for _, tt := range []struct {
		name       string
		url, file  string // flags; the file's content
		env        map[string]string
		up, serve  *savedContext
		wantURL    string
		wantToken  string
		wantErrHas string
	}{
		{name: "nothing", wantErrHas: "berth up"},
		{name: "flags", url: "http://f", file: "tf", env: map[string]string{"BERTH_URL": "http://e", "BERTH_TOKEN": "te"}, wantURL: "http://f", wantToken: "tf"},
		{name: "flag and variable", url: "http://f", env: map[string]string{"BERTH_TOKEN": "te"}, wantURL: "http://f", wantToken: "te"},
		{name: "variables", env: map[string]string{"BERTH_URL": "http://e", "BERTH_TOKEN": "te", "CODER_URL": "http://c"}, wantURL: "http://e", wantToken: "te"},
		{name: "stock variables", env: map[string]string{"CODER_URL": "http://c", "CODER_SESSION_TOKEN": "tc", "BERTH_TOKEN": "te"}, wantURL: "http://c", wantToken: "tc"},
		{name: "no token of another server", env: map[string]string{"BERTH_URL": "http://e", "CODER_SESSION_TOKEN": "tc"}, wantErrHas: "BERTH_TOKEN"},
		{name: "no token of a context", url: "http://f", serve: &savedContext{URL: "http://s"}, wantErrHas: "--token-file"},
		{name: "serve", serve: &savedContext{URL: "http://s"}, wantURL: "http://s", wantToken: "tserve"},
		{name: "up before serve", up: &savedContext{URL: "http://u", PID: os.Getpid()}, serve: &savedContext{URL: "http://s"}, wantURL: "http://u", wantToken: "tup"},
		{name: "up has ended", up: &savedContext{URL: "http://u", PID: gone(t)}, serve: &savedContext{URL: "http://s"}, wantURL: "http://s", wantToken: "tserve"},
		{name: "no URL", url: "berth.example.com", file: "t", wantErrHas: "https://host"},
		{name: "password in the URL", url: "https://me:hunter2@host", file: "t", wantErrHas: "--token-file"},
		{name: "empty file", url: "http://f", file: " \n", wantErrHas: "empty"},
		{name: "two lines", url: "http://f", file: "a\nb", wantErrHas: "one line"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := isolate(t)
			for name, value := range tt.env {
				t.Setenv(name, value)
			}
			for name, saved := range map[string]*savedContext{"up": tt.up, "serve": tt.serve} {
				if saved == nil {
					continue
				}
				saved.TokenFile = writeFile(t, filepath.Join(dir, name+".token"), "t"+name+"\n", 0o600)
				file := map[string]string{"up": contextUp, "serve": contextServe}[name]
				if err := saved.write(filepath.Join(dir, file)); err != nil {
					t.Fatal(err)
				}
			}
			p := &program{errOut: os.Stderr, url: tt.url}
			if tt.file != "" {
				p.tokenFile = writeFile(t, filepath.Join(t.TempDir(), "token"), tt.file, 0o600)
			}
			a, err := p.access()
			if tt.wantErrHas != "" {
				if err == nil || !strings.Contains(err.Error(), tt.wantErrHas) {
					t.Fatalf("got %v, want an error with %q", err, tt.wantErrHas)
				}
				if strings.Contains(err.Error(), "hunter2") {
					t.Error("the error shows the password")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if a.url.String() != tt.wantURL || a.token.Reveal() != tt.wantToken {
				t.Errorf("got %s with %q, want %s with %q", a.url, a.token.Reveal(), tt.wantURL, tt.wantToken)
			}
		})
	}
}

func TestTokenFileOthersCanRead(t *testing.T) {
	isolate(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p := &program{errOut: w, url: "http://f", tokenFile: writeFile(t, filepath.Join(t.TempDir(), "token"), "secret", 0o644)}
	if _, err := p.access(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	warning := readAll(t, r)
	if !strings.Contains(warning, "chmod 600") || strings.Contains(warning, "secret") {
		t.Errorf("the warning is %q", warning)
	}
}

func TestContextRemovedOnlyIfOwn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "berth", contextUp)
	mine := savedContext{URL: "http://a", PID: 1}
	other := savedContext{URL: "http://b", PID: 2}
	if err := mine.write(path); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	other.remove(path)
	if got, err := readContext(path); err != nil || got != mine {
		t.Errorf("another's removal left %+v, %v", got, err)
	}
	mine.remove(path)
	if _, err := os.Stat(filepath.Dir(path)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory is left: %v", err)
	}
}

func TestMatchAgent(t *testing.T) {
	agents := []wire.AgentSummary{{Name: "Build"}, {Name: "build"}, {Name: "x.berth"}, {Name: "x"}, {Name: "Upper"}}
	for name, want := range map[string]int{
		"Build": 0, "build": 1, "build.berth": 1, "x.berth": 2, "x": 3, "upper": 4, "upper.berth": 4, "nobody": -1, "": -1,
	} {
		if got := matchAgent(agents, name); got != want {
			t.Errorf("%q finds %d, want %d", name, got, want)
		}
	}
}

func TestCompletions(t *testing.T) {
	agents := []wire.AgentSummary{{Name: "demo", Status: wire.AgentConnected}, {Name: "deploy", Status: wire.AgentTimeout}, {Name: "other"}, {Name: "de$(x)"}}
	if diff := cmp.Diff([]string{"demo\tconnected", "deploy\ttimeout"}, completions(agents, "de")); diff != "" {
		t.Error(diff)
	}
}

func TestExitStatus(t *testing.T) {
	for in, want := range map[int]int{0: 0, 7: 7, 255: 255, 256: 1, 257: 1} {
		if got := exitStatus(in); got != want {
			t.Errorf("%d becomes %d, want %d", in, got, want)
		}
	}
}

func TestCommandLine(t *testing.T) {
	for want, words := range map[string][]string{
		"":                  nil,
		"cd /srv && ls *":   {"cd /srv && ls *"},
		"sh -c 'exit 7'":    {"sh", "-c", "exit 7"},
		"printf %s '$x' ''": {"printf", "%s", "$x", ""},
	} {
		if got := commandLine(words); got != want {
			t.Errorf("%q becomes %q, want %q", words, got, want)
		}
	}
}
