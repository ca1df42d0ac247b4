package control

import (
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// programsDir makes a directory of agent programs with an archive for each platform. What is in them is not looked at here.
func programsDir(t *testing.T, version string, platforms ...string) string {
	t.Helper()
	dir := t.TempDir()
	var sums strings.Builder
	for _, p := range platforms {
		name := "berthd-linux-" + p + ".tar.gz"
		body := strings.Repeat(version+" for "+p, 100)
		writeProgram(t, filepath.Join(dir, name), body)
		fmt.Fprintf(&sums, "%x  %s\n", sha256.Sum256([]byte(body)), name)
	}
	writeProgram(t, filepath.Join(dir, versionFile), version+"\n")
	writeProgram(t, filepath.Join(dir, sumsFile), sums.String())
	return dir
}

func writeProgram(t *testing.T, path, body string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(body), 0o600); err != nil {
		t.Fatal(err)
	}
}

// fetch asks for a path with headers, and without any token.
func (x *site) fetch(path string, header ...string) (*http.Response, string) {
	x.t.Helper()
	r, err := http.NewRequestWithContext(x.t.Context(), "GET", x.url+path, nil)
	if err != nil {
		x.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	resp, err := x.http.Do(r)
	if err != nil {
		x.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		x.t.Fatal(err)
	}
	return resp, string(body)
}

func TestPrograms(t *testing.T) {
	dir := programsDir(t, "v1.2.3", "amd64", "arm64", "armv7")
	x := serve(t, Config{AgentPrograms: dir})
	sums, err := os.ReadFile(filepath.Join(dir, sumsFile))
	if err != nil {
		t.Fatal(err)
	}
	if _, body := x.fetch("/bin/SHA256SUMS"); body != string(sums) {
		t.Errorf("SHA256SUMS is %q, want %q", body, sums)
	}
	if _, body := x.fetch("/bin/VERSION"); body != "v1.2.3\n" {
		t.Errorf("VERSION is %q", body)
	}
	const name = "/bin/berthd-linux-arm64.tar.gz"
	want, err := os.ReadFile(filepath.Join(dir, filepath.Base(name)))
	if err != nil {
		t.Fatal(err)
	}
	whole, body := x.fetch(name)
	if body != string(want) || whole.Header.Get("Content-Type") != "application/gzip" || whole.ContentLength != int64(len(want)) {
		t.Errorf("the archive came as %d bytes of %s, want %d", len(body), whole.Header.Get("Content-Type"), len(want))
	}
	if r, part := x.fetch(name, "Range", "bytes=10-"); r.StatusCode != http.StatusPartialContent || part != string(want[10:]) {
		t.Errorf("from byte 10 on: %s, %d bytes", r.Status, len(part))
	}
	if r, _ := x.fetch(name, "If-None-Match", whole.Header.Get("ETag")); r.StatusCode != http.StatusNotModified {
		t.Errorf("the same again: %s", r.Status)
	}
	script, text := x.fetch("/install.sh")
	for _, want := range []string{"server_url='" + x.url + "'\n", "server_version='v1.2.3'\n", "server_sums='" + string(sums) + "'\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("the script has no line %q", want)
		}
	}
	if cache := script.Header.Get("Cache-Control"); cache != "public, no-cache" {
		t.Errorf("caches are told %q", cache)
	}
	for _, path := range []string{"/bin/berthd", "/bin/..%2fVERSION", "/bin/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/bin/berthd-linux-386.tar.gz", "/bin/"} {
		if r, body := x.fetch(path); r.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %s %q", path, r.Status, body)
		}
	}

	// A file that changes under the server is not handed out until it was read again.
	writeProgram(t, filepath.Join(dir, filepath.Base(name)), "something else")
	if r, body := x.fetch(name); r.StatusCode != http.StatusServiceUnavailable || !strings.Contains(body, "changed or removed") {
		t.Errorf("a changed file: %s %s", r.Status, body)
	}
	// Nor afterwards, if its sum is not the one that was given.
	if err := x.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r, body := x.fetch(name); r.StatusCode != http.StatusNotFound || !strings.Contains(body, "SHA256SUMS lists those") {
		t.Errorf("a file with a wrong sum: %s %s", r.Status, body)
	}
	if _, body := x.fetch("/bin/SHA256SUMS"); strings.Contains(body, "arm64") || !strings.Contains(body, "armv7") {
		t.Errorf("SHA256SUMS is %q after one archive was refused", body)
	}
	if !strings.Contains(x.log.String(), "an agent program is not handed out") {
		t.Error("the log does not say that a file was refused")
	}
	// A directory that cannot be used leaves what was there.
	if err := os.Remove(filepath.Join(dir, versionFile)); err != nil {
		t.Fatal(err)
	}
	if err := x.Reload(t.Context()); err == nil || !strings.Contains(err.Error(), "cannot hand out agent programs") {
		t.Errorf("reloading says %v", err)
	}
	if _, body := x.fetch("/bin/VERSION"); body != "v1.2.3\n" {
		t.Errorf("VERSION is %q after a failed reload", body)
	}
}

func TestNoPrograms(t *testing.T) {
	x := serve(t, Config{})
	for _, path := range []string{"/install.sh", "/bin/VERSION", "/bin/SHA256SUMS", "/bin/berthd-linux-amd64.tar.gz"} {
		if r, body := x.fetch(path); r.StatusCode != http.StatusNotFound || !strings.Contains(body, "--agent-binaries") {
			t.Errorf("%s: %s %s", path, r.Status, body)
		}
	}
}

func TestBadPrograms(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(dir string) error
		want  string
	}{
		"empty":         {func(dir string) error { return os.Remove(filepath.Join(dir, versionFile)) }, "VERSION: no such file"},
		"no version":    {func(dir string) error { return os.WriteFile(filepath.Join(dir, versionFile), []byte("next\n"), 0o600) }, `"next", which is no version`},
		"no sums":       {func(dir string) error { return os.Remove(filepath.Join(dir, sumsFile)) }, "SHA256SUMS: no such file"},
		"endless sums":  {func(dir string) error { return os.Truncate(filepath.Join(dir, sumsFile), 1<<30) }, "longer than 4 KiB"},
		"nothing there": {func(dir string) error { return os.Remove(filepath.Join(dir, archives[0])) }, "names no archive that is there"},
		"a wrong sum":   {func(dir string) error { return os.Truncate(filepath.Join(dir, archives[0]), 9) }, "has the SHA-256"},
		"a directory": {func(dir string) error {
			path := filepath.Join(dir, archives[0])
			if err := os.Remove(path); err != nil {
				return err
			}
			return os.Mkdir(path, 0o700)
		}, "is no file"},
	} {
		dir := programsDir(t, "v1.2.3", "amd64")
		if err := c.spoil(dir); err != nil {
			t.Fatal(err)
		}
		access := serve(t, Config{}).config.AccessURL
		if _, _, err := readPrograms(dir, access); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}
