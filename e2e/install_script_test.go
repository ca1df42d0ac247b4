package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"crypto/sha256"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
)

// agents makes a directory for `berth serve --agent-binaries` with an archive for this machine, as the release command does.
func (m *machine) agents(version string, files map[string][]byte) (dir string, packed []byte) {
	m.t.Helper()
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestSpeed)
	if err != nil {
		m.t.Fatal(err)
	}
	w := tar.NewWriter(z)
	for name, body := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(body))}); err != nil {
			m.t.Fatal(err)
		}
		if _, err := w.Write(body); err != nil {
			m.t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		m.t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		m.t.Fatal(err)
	}
	dir = filepath.Join(m.tmp, "agents")
	if err := os.Mkdir(dir, 0o700); err != nil {
		m.t.Fatal(err)
	}
	for name, body := range map[string][]byte{
		archiveName:  b.Bytes(),
		"VERSION":    []byte(version + "\n"),
		"SHA256SUMS": fmt.Appendf(nil, "%x  %s\n", sha256.Sum256(b.Bytes()), archiveName),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), body, 0o600); err != nil {
			m.t.Fatal(err)
		}
	}
	return dir, b.Bytes()
}

var archiveName = "berthd-linux-" + map[string]string{"amd64": "amd64", "arm64": "arm64", "arm": "armv7"}[runtime.GOARCH] + ".tar.gz"

// shellOf is a shell and a PATH that has what the script needs, one tool for downloads, and nothing else.
type shellOf struct {
	shell, tool, path string
	argv              []string
}

func (m *machine) shells() []shellOf {
	m.t.Helper()
	find := func(name string) string {
		path, err := exec.LookPath(name)
		if err != nil {
			m.t.Fatal(err)
		}
		return path
	}
	busybox := find("busybox")
	var all []shellOf
	for _, shell := range []string{"dash", "bash", "busybox"} {
		for _, tool := range []string{"curl", "wget", "busybox"} {
			s := shellOf{shell: shell, tool: tool, path: filepath.Join(m.tmp, shell+"-"+tool)}
			if err := os.Mkdir(s.path, 0o700); err != nil {
				m.t.Fatal(err)
			}
			link := func(name, to string) {
				if err := os.Symlink(to, filepath.Join(s.path, name)); err != nil {
					m.t.Fatal(err)
				}
			}
			for _, name := range strings.Fields("uname id mkdir mktemp mv cp chmod rm sleep head tail tr sed cut cat wc grep gzip tar sha256sum") {
				if shell == "busybox" {
					link(name, busybox)
				} else {
					link(name, find(name))
				}
			}
			link(tool, find(tool))
			s.argv = []string{find(shell)}
			if shell == "busybox" {
				s.argv = append(s.argv, "sh")
			}
			all = append(all, s)
		}
	}
	return all
}

// install runs the script with a prefix of its own, and returns what it said.
func (s shellOf) install(m *machine, prefix, script string, env ...string) (said string, err error) {
	m.t.Helper()
	cmd := exec.Command(s.argv[0], append(s.argv[1:], "-s", "--", "--prefix", prefix, "--auth", "auto")...)
	cmd.Stdin = strings.NewReader(script) // as behind a pipe
	cmd.Dir = m.home
	cmd.Env = append([]string{"PATH=" + s.path, "HOME=" + m.home, "TMPDIR=" + m.tmp, "BERTH_RETRY_PAUSE=0", m.mark}, env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// badRoad hands out an archive as bad networks do, by the first part of the path.
type badRoad struct {
	archive []byte
	asked   atomic.Int32
	// ranges are the Range headers that were sent.
	ranges chan string
}

const loginPage = `<!DOCTYPE html>
<html><head><title>Sign in to Example</title></head><body>Who are you?</body></html>`

func (b *badRoad) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n := b.asked.Add(1)
	how, rest, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	whole := func(body []byte) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
	}
	half := func() { // all is promised
		w.Header().Set("Content-Length", fmt.Sprint(len(b.archive)))
		w.Write(b.archive[:len(b.archive)/2])
		panic(http.ErrAbortHandler)
	}
	switch {
	case how == "signin" || how == "login":
		w.Header().Set("Content-Type", "text/html")
		w.Write([]byte(loginPage))
	case rest != "bin/"+archiveName:
		http.NotFound(w, r)
	case how == "redirect":
		http.Redirect(w, r, "/signin/", http.StatusFound)
	case how == "broken":
		half()
	case how == "cut" && n == 1:
		half()
	case how == "busy" && n <= 2:
		http.Error(w, "try later", http.StatusServiceUnavailable)
	case how == "other":
		whole(append(bytes.Clone(b.archive), b.archive...)) // an archive too, but another
	case how == "cut" || how == "busy" || how == "good":
		if how == "cut" {
			b.ranges <- r.Header.Get("Range")
		}
		whole(b.archive)
	default:
		http.NotFound(w, r)
	}
}

// TestInstallScript runs install.sh, as a real server hands it out, in each shell with each tool over roads that are bad.
func TestInstallScript(t *testing.T) {
	m := newMachine(t)
	ballast := make([]byte, 200<<10)
	rand.Read(ballast)
	program := []byte("#!/bin/sh\necho berthd v1.2.3\n")
	dir, archive := m.agents("v1.2.3", map[string][]byte{"berthd": program, "berthd-ptyhost": append(bytes.Clone(program), ballast...), "LICENSE": []byte("free\n")})
	r := newRoadOn(m, "agents: [{name: box}]", "--agent-binaries", dir)
	r.server.wait("curl -fsSL "+r.url()+"/install.sh | sh", 10*time.Second)
	script := m.must("curl", "-fsS", r.url()+"/install.sh")

	for _, s := range m.shells() {
		t.Run(s.shell+" with "+s.tool, func(t *testing.T) {
			t.Parallel()
			m := &machine{t: t, home: m.home, tmp: t.TempDir(), mark: m.mark}
			for _, c := range []struct {
				how, want string
				fails     bool
			}{
				{how: "good", want: "installed "},
				{how: "busy", want: "installed "},
				{how: "cut", want: "installed "},
				{how: "login", want: `you downloaded a login page, or another web page: "Sign in to Example"`, fails: true},
				{how: "redirect", want: `you downloaded a login page, or another web page: "Sign in to Example"`, fails: true},
				{how: "broken", want: "trying again", fails: true},
				{how: "other", want: "is pinned. Nothing was installed", fails: true},
				{how: "nowhere", want: "404", fails: true},
			} {
				road := &badRoad{archive: archive, ranges: make(chan string, 1)}
				web := httptest.NewServer(road)
				prefix := filepath.Join(m.tmp, c.how)
				env := "BERTH_URL=" + web.URL + "/" + c.how
				said, err := s.install(m, prefix, script, env)
				if c.fails != (err != nil) || !strings.Contains(said, c.want) {
					t.Errorf("%s: %v, want %q:\n%s", c.how, err, c.want, said)
				}
				if c.fails {
					if left := files(t, m.tmp); len(left) != 0 {
						t.Errorf("%s left %v", c.how, left)
					}
					web.Close()
					continue
				}
				if got, err := os.ReadFile(filepath.Join(prefix, "bin/berthd")); err != nil || !bytes.Equal(got, program) {
					t.Errorf("%s: berthd is %q, %v", c.how, got, err)
				}
				if c.how == "cut" {
					if got := <-road.ranges; got != fmt.Sprintf("bytes=%d-", len(archive)/2) {
						t.Errorf("after half of it %q was asked for", got)
					}
				}
				if c.how == "good" {
					// The second time nothing is fetched, unless what is there was changed.
					asked := road.asked.Load()
					if said, err := s.install(m, prefix, script, env); err != nil || !strings.Contains(said, "berthd is up to date (v1.2.3)") || road.asked.Load() != asked {
						t.Errorf("%s, again: %v, %d requests:\n%s", c.how, err, road.asked.Load()-asked, said)
					}
					if err := os.WriteFile(filepath.Join(prefix, "bin/berthd"), []byte("#!/bin/sh\nexit 1\n"), 0o755); err != nil {
						t.Fatal(err)
					}
					if said, err := s.install(m, prefix, script, env); err != nil || !strings.Contains(said, "installed ") || !strings.Contains(said, "berthd run --auth auto") {
						t.Errorf("%s, after a change: %v\n%s", c.how, err, said)
					}
				}
				web.Close()
				if err := os.RemoveAll(prefix); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestInstallScriptCut: a script that was cut off on its way does nothing, wherever that was.
func TestInstallScriptCut(t *testing.T) {
	m := newMachine(t)
	body, err := os.ReadFile("../deploy/install.sh")
	if err != nil {
		t.Fatal(err)
	}
	script := strings.TrimSpace(string(body))
	prefix := filepath.Join(m.tmp, "prefix")
	s := shellOf{argv: []string{"/bin/sh"}, path: os.Getenv("PATH")}
	for n := 0; n < len(script); n++ {
		if n < len(script)-40 && n%199 != 0 {
			continue
		}
		if said, _ := s.install(m, prefix, script[:n]); strings.Contains(said, "install.sh:") || exists(prefix) {
			t.Fatalf("the first %d bytes did something: %s", n, said)
		}
	}
	if said, err := s.install(m, prefix, script); err == nil || !strings.Contains(said, "which control server? Set BERTH_URL") {
		t.Errorf("the whole of it, which was not handed out by a server: %v\n%s", err, said)
	}
	if said, err := s.install(m, prefix, script, "BERTH_URL=http://127.0.0.1:1"); err == nil || !strings.Contains(said, "give --pin SHA256") {
		t.Errorf("the same without a sum: %v\n%s", err, said)
	}
	if said, err := s.install(m, prefix, script, "BERTH_URL=http://127.0.0.1:1", "BERTH_PIN=0123"); err == nil || !strings.Contains(said, "0123 is no SHA-256") {
		t.Errorf("a sum that is none: %v\n%s", err, said)
	}
}

// TestInstallScriptGate: a server behind a gate that wants a header, with a certificate of a private CA; and the real berthd.
func TestInstallScriptGate(t *testing.T) {
	m := newMachine(t)
	programs := map[string][]byte{}
	for _, name := range []string{"berthd", "berthd-ptyhost"} {
		body, err := os.ReadFile(filepath.Join(bin, name))
		if err != nil {
			t.Fatal(err)
		}
		programs[name] = body
	}
	_, archive := m.agents("v1.2.3", programs)
	script, err := os.ReadFile("../deploy/install.sh")
	if err != nil {
		t.Fatal(err)
	}
	const key = `say "\open"`
	gate := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Gate") != key {
			http.Error(w, "no", http.StatusForbidden)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(archive))
	}))
	gate.Config.ErrorLog = log.New(io.Discard, "", 0) // of those who do not trust it
	gate.StartTLS()
	defer gate.Close()
	ca := filepath.Join(m.tmp, "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: gate.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	env := []string{"BERTH_URL=" + gate.URL, fmt.Sprintf("BERTH_PIN=%X", sha256.Sum256(archive))}
	for _, s := range m.shells() {
		if s.shell != "dash" || s.tool == "busybox" {
			continue
		}
		prefix := filepath.Join(m.tmp, s.tool)
		for _, less := range [][]string{{"BERTH_HEADER=X-Gate=" + key}, {"BERTH_CA_FILE=" + ca}} {
			if said, err := s.install(m, prefix, string(script), append(less, env...)...); err == nil || exists(prefix) {
				t.Errorf("%s came in with %q alone:\n%s", s.tool, less, said)
			}
		}
		said, err := s.install(m, prefix, string(script), append(env, "BERTH_CA_FILE="+ca, "BERTH_HEADER=X-Other=1, X-Gate="+key)...)
		if err != nil || strings.Contains(said, key) {
			t.Errorf("%s: %v\n%s", s.tool, err, said)
		}
		if out := m.must(filepath.Join(prefix, "bin/berthd"), "version"); !strings.HasPrefix(out, "berthd v") {
			t.Errorf("the installed berthd says %q", out)
		}
	}
}

// TestCloudInit: what user data for each cloud runs goes on trying until it gets the script, and not a login page, and runs that.
func TestCloudInit(t *testing.T) {
	m := newMachine(t)
	script, err := os.ReadFile("../deploy/install.sh")
	if err != nil {
		t.Fatal(err)
	}
	for _, cloud := range []string{"aws", "azure", "google"} {
		text, err := os.ReadFile("../deploy/cloud/" + cloud + ".yaml")
		if err != nil {
			t.Fatal(err)
		}
		var data struct {
			Files []struct{ Path, Content string } `yaml:"write_files"`
			Run   [][]string                       `yaml:"runcmd"`
		}
		if err := yaml.Unmarshal(text, &data); err != nil || !strings.HasPrefix(string(text), "#cloud-config\n") {
			t.Fatal(cloud, err)
		}
		if len(data.Files) != 1 || len(data.Run) != 1 || !slices.Equal(data.Run[0], []string{"sh", data.Files[0].Path}) {
			t.Fatalf("%s writes and runs %+v", cloud, data)
		}
		var asked atomic.Int32
		web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if asked.Add(1) == 1 {
				w.Write([]byte(loginPage))
				return
			}
			w.Write(script)
		}))
		defer web.Close()
		start := filepath.Join(m.tmp, cloud)
		body := strings.NewReplacer("https://berth.example.com", web.URL, filepath.Dir(data.Files[0].Path)+"/", m.tmp+"/").Replace(data.Files[0].Content)
		if err := os.WriteFile(start, []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
		// The script that is in the repository holds no sum, and says so: it was run, with the URL.
		_, said, code := m.run(nil, "sh", start)
		if code != 1 || !strings.Contains(said, "trying again in 1 s") || !strings.Contains(said, "no sum to check") || !strings.Contains(said, web.URL) {
			t.Errorf("%s exited %d: %s", cloud, code, said)
		}
		if !strings.Contains(body, "BERTH_AUTH="+cloud+"-instance-identity\n") {
			t.Errorf("%s does not prove itself by that cloud", cloud)
		}
	}
}
