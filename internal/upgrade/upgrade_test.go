package upgrade

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/berthd/berth/client"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// program is a berthd as far as an upgrade looks: it tells its version.
func program(version string) string {
	return fmt.Sprintf("#!/bin/sh\n[ \"$1\" = version ] && echo 'berthd %s (Coder agent API v2.9)'\n", version)
}

// archive packs files, by name.
func archive(t testing.TB, files ...string) []byte {
	t.Helper()
	var out bytes.Buffer
	zip := gzip.NewWriter(&out)
	w := tar.NewWriter(zip)
	for i := 0; i < len(files); i += 2 {
		if err := w.WriteHeader(&tar.Header{Name: files[i], Mode: 0o755, Size: int64(len(files[i+1]))}); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, files[i+1])
	}
	w.Close()
	zip.Close()
	return out.Bytes()
}

func sumText(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// files lists a directory with what is in it.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		all[e.Name()] = string(b)
	}
	return all
}

// installed makes a directory with a berthd that goes by another name, and its terminal host.
func installed(t *testing.T) (dir, path string) {
	t.Helper()
	dir = t.TempDir()
	path = filepath.Join(dir, "coder")
	for name, text := range map[string]string{"coder": program("v1.0.0"), "berthd-ptyhost": "host 1"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir, path
}

// hosted serves what a control server hosts; change may break it.
func hosted(t *testing.T, change func(w http.ResponseWriter, r *http.Request, serve func())) Source {
	t.Helper()
	full := archive(t, "LICENSE", "free", "./berthd", program("v2.0.0"), "berthd-ptyhost", "host 2")
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		serve := func() {
			w.Header().Set("ETag", `"1"`)
			switch r.URL.Path {
			case "/bin/VERSION":
				fmt.Fprintln(w, "v2.0.0")
			case "/bin/SHA256SUMS":
				fmt.Fprintf(w, "%064x  berthd-plan9-mips.tar.gz\n%s  %s\n", 1, sumText(full), Archive())
			case "/bin/" + Archive():
				w.Header().Set("Content-Type", "application/gzip")
				http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(full))
			default:
				http.NotFound(w, r)
			}
		}
		if change == nil {
			serve()
		} else {
			change(w, r, serve)
		}
	}))
	t.Cleanup(server.Close)
	u, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	h, err := client.NewHTTP(client.HTTPConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.CloseIdleConnections)
	return Source{URL: u, HTTP: h, Header: http.Header{"X-Pass": {"yes"}}}
}

// TestUpgrade goes forth and back.
func TestUpgrade(t *testing.T) {
	dir, path := installed(t)
	if err := os.Mkdir(filepath.Join(dir, staging+"killed"), 0o700); err != nil {
		t.Fatal(err)
	}
	source := hosted(t, func(w http.ResponseWriter, r *http.Request, serve func()) {
		if r.Header.Get("X-Pass") != "yes" {
			t.Errorf("%s came without its header", r.URL)
		}
		serve()
	})
	if v, err := source.Version(t.Context()); err != nil || v != "v2.0.0" {
		t.Fatalf("version %q, %v", v, err)
	}
	if _, err := Previous(path); err == nil || !strings.Contains(err.Error(), "has not been upgraded here") {
		t.Errorf("nothing to go back to: %v", err)
	}
	old, now := files(t, t.TempDir()), map[string]string{}
	for name, text := range map[string]string{"coder": program("v1.0.0"), "berthd-ptyhost": "host 1"} {
		old[name] = text
	}
	for name, text := range map[string]string{
		"coder": program("v2.0.0"), "berthd-ptyhost": "host 2", "coder.previous": program("v1.0.0"), "berthd-ptyhost.previous": "host 1",
	} {
		now[name] = text
	}

	c, err := source.Fetch(t.Context(), path, "")
	if err != nil || c.Version != "v2.0.0" {
		t.Fatalf("%+v, %v", c, err)
	}
	undo, err := c.Install()
	c.Discard()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(now, files(t, dir)); diff != "" {
		t.Errorf("installed: %s", diff)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if err := undo(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(old, files(t, dir)); diff != "" {
		t.Errorf("undone: %s", diff)
	}

	if c, err = source.Fetch(t.Context(), path, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Install(); err != nil {
		t.Fatal(err)
	}
	c.Discard()
	if c, err = Previous(path); err != nil || c.Version != "v1.0.0" {
		t.Fatalf("%+v, %v", c, err)
	}
	if _, err := c.Install(); err != nil {
		t.Fatal(err)
	}
	c.Discard()
	for name, text := range old {
		now[name], now[name+".previous"] = text, now[name]
	}
	if diff := cmp.Diff(now, files(t, dir)); diff != "" {
		t.Errorf("gone back: %s", diff)
	}
}

// TestRefused: nothing is changed by what cannot be used, and the error says why.
func TestRefused(t *testing.T) {
	isArchive := func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, ".tar.gz") }
	for name, tt := range map[string]struct {
		change func(w http.ResponseWriter, r *http.Request, serve func())
		pin    string
		want   string
	}{
		"a login page": {change: func(w http.ResponseWriter, _ *http.Request, _ func()) {
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, "<!doctype html><title>Log in</title>")
		}, want: "an HTML page came back"},
		"a login page for an archive": {change: func(w http.ResponseWriter, r *http.Request, serve func()) {
			if !isArchive(r) {
				serve()
				return
			}
			w.Header().Set("Content-Type", "application/octet-stream")
			io.WriteString(w, "<html>Log in</html>")
		}, want: "what came is no archive: a login page"},
		"a redirect": {change: func(w http.ResponseWriter, r *http.Request, _ func()) {
			http.Redirect(w, r, "https://login.example.com/", http.StatusFound)
		}, want: "redirects to"},
		"not hosted": {change: func(w http.ResponseWriter, _ *http.Request, _ func()) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusNotFound)
			io.WriteString(w, `{"message":"This server hosts no berthd."}`)
		}, want: "This server hosts no berthd"},
		"not for this machine": {change: func(w http.ResponseWriter, r *http.Request, serve func()) {
			if strings.HasSuffix(r.URL.Path, "SUMS") {
				fmt.Fprintf(w, "%064x  berthd-plan9-mips.tar.gz\n", 1)
				return
			}
			serve()
		}, want: "hosts no berthd-"},
		"a wrong sum": {pin: strings.Repeat("ab", 32), want: "not abababab"},
		"a damaged archive": {change: func(w http.ResponseWriter, r *http.Request, serve func()) {
			if isArchive(r) {
				w.Write(append([]byte{0x1f, 0x8b}, "and so on"...))
				return
			}
			serve()
		}, want: "it is damaged"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, path := installed(t)
			before := files(t, dir)
			_, err := hosted(t, tt.change).Fetch(t.Context(), path, tt.pin)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
			if diff := cmp.Diff(before, files(t, dir)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestArchives: what an archive holds is checked before it is in use.
func TestArchives(t *testing.T) {
	for name, tt := range map[string]struct {
		archive []byte
		want    string
	}{
		"empty":               {archive(t), "holds no berthd"},
		"only the host":       {archive(t, "berthd-ptyhost", "x"), "holds no berthd"},
		"another directory":   {archive(t, "../berthd", "x", "/berthd", "x", "a/berthd", "x"), "holds no berthd"},
		"twice":               {archive(t, "berthd", program("v2.0.0"), "berthd", "x"), "cannot unpack berthd"},
		"many files":          {archive(t, many(maxEntries+1)...), "more than 64 files"},
		"no program":          {archive(t, "berthd", "\x7fELF\x02"), "cannot be run here"},
		"another program":     {archive(t, "berthd", "#!/bin/sh\necho hello world v2\n"), "does not tell its version"},
		"one that fails":      {archive(t, "berthd", "#!/bin/sh\nexit 3\n"), "cannot be run here"},
		"one that is cut off": {cut(archive(t, "berthd", program("v2.0.0")+strings.Repeat("#", 1<<20))), "cannot"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, path := installed(t)
			before := files(t, dir)
			file := filepath.Join(t.TempDir(), "a.tar.gz")
			if err := os.WriteFile(file, tt.archive, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(file, path, ""); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
			if diff := cmp.Diff(before, files(t, dir)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func many(n int) (files []string) {
	for i := range n {
		files = append(files, fmt.Sprint("file", i), "x")
	}
	return files
}

func cut(b []byte) []byte { return b[:len(b)/2] }

// TestInstallFails: a swap that fails halfway leaves nothing changed.
func TestInstallFails(t *testing.T) {
	dir, path := installed(t)
	before := files(t, dir)
	c, err := hosted(t, nil).Fetch(t.Context(), path, "")
	if err != nil {
		t.Fatal(err)
	}
	// A directory in the way of the name under which berthd is kept.
	if err := os.MkdirAll(filepath.Join(dir, "coder.previous", "x"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Install(); err == nil || !strings.Contains(err.Error(), "cannot install berthd:") {
		t.Error(err)
	}
	c.Discard()
	if err := os.RemoveAll(filepath.Join(dir, "coder.previous")); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, files(t, dir)); diff != "" {
		t.Error(diff)
	}
}

// TestResumed: a download that breaks off is taken up, with the bytes of the same file.
func TestResumed(t *testing.T) {
	_, path := installed(t)
	var ranges []string
	source := hosted(t, func(w http.ResponseWriter, r *http.Request, serve func()) {
		if !strings.HasSuffix(r.URL.Path, ".tar.gz") {
			serve()
			return
		}
		ranges = append(ranges, r.Header.Get("Range")+" "+r.Header.Get("If-Range"))
		switch len(ranges) {
		case 1: // half of it
			part := httptest.NewRecorder()
			r2 := r.Clone(r.Context())
			http.ServeContent(part, r2, "", time.Time{}, bytes.NewReader(archive(t, "LICENSE", "free", "./berthd", program("v2.0.0"), "berthd-ptyhost", "host 2")))
			w.Header().Set("ETag", `"1"`)
			w.Header().Set("Content-Length", fmt.Sprint(part.Body.Len()))
			w.Write(part.Body.Bytes()[:20])
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		case 2:
			w.WriteHeader(http.StatusBadGateway)
		default:
			serve()
		}
	})
	c, err := source.Fetch(t.Context(), path, "")
	if err != nil {
		t.Fatal(err)
	}
	c.Discard()
	if diff := cmp.Diff([]string{" ", `bytes=20- "1"`, `bytes=20- "1"`}, ranges); diff != "" {
		t.Error(diff)
	}
}

func FuzzSums(f *testing.F) {
	f.Add([]byte(strings.Repeat("ab", 32)+"  a.tar.gz\n"), "a.tar.gz")
	f.Add([]byte(strings.Repeat("AB", 32)+" *a.tar.gz\nx"), "a.tar.gz")
	f.Add([]byte("<html>"), "a.tar.gz")
	f.Fuzz(func(t *testing.T, sums []byte, name string) {
		if sum := sumOf(sums, name); sum != "" && !(validSum(sum) && strings.ToLower(sum) == sum) {
			t.Errorf("%q", sum)
		}
	})
}

func FuzzUnpack(f *testing.F) {
	f.Add(archive(f, "berthd", "x", "LICENSE", "y"))
	f.Add(archive(f, "../berthd", "x", "berthd-ptyhost", "y"))
	f.Add([]byte{0x1f, 0x8b})
	f.Fuzz(func(t *testing.T, data []byte) {
		parent := t.TempDir()
		dir := filepath.Join(parent, "in")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		err := unpack(bytes.NewReader(data), dir)
		entries, _ := filepath.Glob(filepath.Join(parent, "*", "*"))
		above, _ := filepath.Glob(filepath.Join(parent, "*"))
		if len(entries) > len(programs) || len(above) != 1 {
			t.Errorf("wrote %v %v", above, entries)
		}
		if _, statErr := os.Stat(filepath.Join(dir, "berthd")); err == nil && statErr != nil {
			t.Error("no berthd, and no error")
		}
	})
}
