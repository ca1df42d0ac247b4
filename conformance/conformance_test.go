// Package conformance holds the built programs to the protocol pages from outside. It imports nothing of
// berth's: HTTP, WebSockets, dRPC frames, protobuf messages, DERP frames and the mesh are written here a
// second time, from the pages alone, so that a mistake made in the code is not made in its test as well.
//
// There are three peers of its own: a client (client_test.go), an agent (agent_test.go) and a small control
// server (server_test.go). A run ends with a table of one row per endpoint and RPC; a row without a case
// fails the run.
package conformance

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// bin is the folder with the built programs.
var bin string

func TestMain(main *testing.M) { os.Exit(run(main)) }

func run(main *testing.M) int {
	dir, err := os.MkdirTemp("", "berth-conf-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	bin = dir
	build := exec.Command("go", "build", "-o", dir, "../cmd/berth", "../cmd/berthd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "cannot build: %v\n%s", err, out)
		return 1
	}
	code := main.Run()
	if shared.world != nil {
		shared.machine.reap()
		os.RemoveAll(shared.machine.root)
	}
	if !printTable(os.Stdout) && code == 0 {
		code = 1
	}
	return code
}

// tally counts the cases of a row.
type tally struct{ passed, failed int }

var table struct {
	sync.Mutex
	rows map[string]*tally
}

// check runs one case of a row of the table. The row has to be one of rows.
func check(t *testing.T, row, name string, f func(t *testing.T)) {
	t.Helper()
	if !slices.Contains(rows, row) {
		t.Fatalf("%q is no row of the table", row)
	}
	t.Run(strings.ReplaceAll(row+": "+name, "/", "|"), func(t *testing.T) {
		t.Cleanup(func() { // when it is known how it ended, also of one that runs beside others
			table.Lock()
			defer table.Unlock()
			if table.rows == nil {
				table.rows = map[string]*tally{}
			}
			c := table.rows[row]
			if c == nil {
				c = &tally{}
				table.rows[row] = c
			}
			if t.Failed() {
				c.failed++
			} else {
				c.passed++
			}
		})
		f(t)
	})
}

// printTable prints the table, and reports whether a whole run left no row without a case.
func printTable(w io.Writer) bool {
	table.Lock()
	defer table.Unlock()
	if len(table.rows) == 0 {
		return true
	}
	whole := filter() == ""
	complete := true
	fmt.Fprintf(w, "\n%-78s %6s %6s\n", "endpoint, RPC or service", "passed", "failed")
	for _, row := range rows {
		c := table.rows[row]
		switch {
		case c != nil:
			fmt.Fprintf(w, "%-78s %6d %6d\n", row, c.passed, c.failed)
		case whole:
			fmt.Fprintf(w, "%-78s NO CASE\n", row)
			complete = false
		}
	}
	return complete
}

// filter is what -run picks.
func filter() string {
	for i, arg := range os.Args {
		if v, ok := strings.CutPrefix(strings.TrimLeft(arg, "-"), "test.run="); ok {
			return v
		}
		if strings.TrimLeft(arg, "-") == "test.run" && i+1 < len(os.Args) {
			return os.Args[i+1]
		}
	}
	return ""
}

// machine is a home and a temporary folder of its own.
type machine struct {
	t               testing.TB
	root, home, tmp string
	mark            string // in the environment of every process started here, and of their children
}

func newMachine(t testing.TB) *machine {
	t.Helper()
	// Socket paths are limited to 108 bytes, which t.TempDir with a long test name may exceed.
	root, err := os.MkdirTemp("", "bconf-")
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, root: root, home: filepath.Join(root, "home"), tmp: filepath.Join(root, "tmp"), mark: "BERTH_CONFORMANCE=" + filepath.Base(root)}
	for _, dir := range []string{m.home, m.tmp} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// own is a machine that is gone with the test.
func own(t *testing.T) *machine {
	t.Helper()
	m := newMachine(t)
	t.Cleanup(func() {
		m.reap()
		os.RemoveAll(m.root)
	})
	return m
}

// reap kills what was started here and is still alive.
func (m *machine) reap() {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		environ, err := os.ReadFile(dir + "/environ")
		var pid int
		if err != nil || !bytes.Contains(environ, []byte(m.mark)) {
			continue
		}
		if _, err := fmt.Sscan(filepath.Base(dir), &pid); err == nil {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

func (m *machine) command(env []string, name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(bin, name), args...)
	cmd.Env = append([]string{"PATH=" + bin + ":" + os.Getenv("PATH"), "HOME=" + m.home, "TMPDIR=" + m.tmp, "USER=root",
		"SHELL=/bin/bash", "LANG=C.UTF-8", "TERM=xterm-256color", m.mark}, env...)
	cmd.Dir = m.home
	return cmd
}

// daemon is a program that keeps running; its output is kept.
type daemon struct {
	t    testing.TB
	cmd  *exec.Cmd
	mu   sync.Mutex
	text strings.Builder
	more chan struct{} // closed and replaced at each line
	done chan struct{}
}

func (m *machine) start(env []string, name string, args ...string) *daemon {
	m.t.Helper()
	d := &daemon{t: m.t, cmd: m.command(env, name, args...), more: make(chan struct{}), done: make(chan struct{})}
	r, w, err := os.Pipe()
	if err != nil {
		m.t.Fatal(err)
	}
	d.cmd.Stdout, d.cmd.Stderr = w, w
	if err := d.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	w.Close()
	go func() {
		defer r.Close()
		lines := bufio.NewScanner(r)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			d.mu.Lock()
			d.text.WriteString(lines.Text() + "\n")
			close(d.more)
			d.more = make(chan struct{})
			d.mu.Unlock()
		}
	}()
	go func() {
		d.cmd.Wait()
		close(d.done)
	}()
	return d
}

// startFor is start for one test: the program ends with it, and its output is shown when it failed.
func (m *machine) startFor(t *testing.T, env []string, name string, args ...string) *daemon {
	t.Helper()
	d := m.start(env, name, args...)
	d.t = t
	t.Cleanup(func() {
		d.cmd.Process.Kill()
		<-d.done
		if t.Failed() {
			t.Logf("%s %q said:\n%s", name, args, d.output())
		}
	})
	return d
}

func (d *daemon) output() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.text.String()
}

// wait waits until the output matches, and returns the match.
func (d *daemon) wait(pattern *regexp.Regexp, limit time.Duration) []string {
	d.t.Helper()
	timeout := time.After(limit)
	for {
		d.mu.Lock()
		found, more := pattern.FindStringSubmatch(d.text.String()), d.more
		d.mu.Unlock()
		if found != nil {
			return found
		}
		select {
		case <-more:
		case <-d.done:
			if pattern.FindStringSubmatch(d.output()) == nil {
				d.t.Fatalf("%v ended (%v) without saying %q:\n%s", d.cmd.Args, d.cmd.ProcessState, pattern, d.output())
			}
		case <-timeout:
			d.t.Fatalf("%v did not say %q within %v:\n%s", d.cmd.Args, pattern, limit, d.output())
		}
	}
}

// patience is how long anything may take before a test gives up. It asserts nothing about speed.
const patience = 60 * time.Second

// eventually polls a condition of another process, of which nothing tells when it holds.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(patience)
	for !holds() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// world is a control server as an operator starts it, and the key of its administrator.
type world struct {
	*machine
	server *daemon
	url    string
	key    string
}

// shared is the server that most tests use, each with agents of its own.
var shared struct {
	sync.Mutex
	*world
}

// stage returns the shared server, for this test.
func stage(t *testing.T) *world {
	t.Helper()
	shared.Lock()
	defer shared.Unlock()
	if shared.world == nil {
		w := &world{machine: newMachine(&lasting{t})}
		// Without its flag berth keeps more of a log than a stock server, and forgets the oldest lines.
		w.serve(sharedConfig, "--log-limit", "1048576")
		shared.world = w
	}
	w := *shared.world
	return &w
}

// lasting is a test whose resources outlive it.
type lasting struct{ *testing.T }

func (*lasting) Cleanup(func())           {}
func (*lasting) Context() context.Context { return context.Background() }

var servingAt = regexp.MustCompile(`http://(127\.0\.0\.1:[0-9]+)`)

// serve starts the control server.
func (w *world) serve(config string, args ...string) {
	w.t.Helper()
	file := filepath.Join(w.home, "agents.yaml")
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(config, "HOME", w.home)), 0o600); err != nil {
		w.t.Fatal(err)
	}
	data := filepath.Join(w.home, "data")
	args = append([]string{"serve", "--listen", "127.0.0.1:0", "--data-dir", data, "--config", file}, args...)
	w.server = w.start(nil, "berth", args...)
	w.url = "http://" + w.server.wait(servingAt, patience)[1]
	key, err := os.ReadFile(filepath.Join(data, "admin-key"))
	if err != nil {
		w.t.Fatal(err)
	}
	w.key = strings.TrimSpace(string(key))
}

// berth runs the people's command line with the administrator's key.
func (w *world) berth(t testing.TB, stdin string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := w.command([]string{"BERTH_URL=" + w.url, "BERTH_TOKEN=" + w.key}, "berth", args...)
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errOut
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	err := cmd.Wait()
	if !stop() {
		err = errors.New("it did not end in time")
	}
	if err != nil {
		return out.String(), fmt.Errorf("berth %q: %w\n%s%s", args, err, &out, &errOut)
	}
	return out.String(), nil
}

var uuidPattern = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)

// identity is an agent's id and token.
type identity struct {
	name, id, token string
}

// agent makes a new agent, or a token for a declared one.
func (w *world) agent(t testing.TB, name string) identity {
	t.Helper()
	verb := "create"
	if strings.Contains(sharedConfig, "name: "+name+"\n") {
		verb = "token"
	}
	out, err := w.berth(t, "", "agent", verb, name)
	if err != nil {
		t.Fatal(err)
	}
	found := uuidPattern.FindAllString(out, -1)
	if len(found) == 0 {
		t.Fatalf("berth agent %s printed no token:\n%s", verb, out)
	}
	a := identity{name: name, token: found[len(found)-1]}
	s := w.link(t, a, "2.10")
	defer s.close()
	a.id = uuidText(blob(s.must("GetManifest", m{}), "agent_id"))
	return a
}

// link opens the RPC socket of an agent.
func (w *world) link(t testing.TB, a identity, version string) *session {
	t.Helper()
	s, resp, err := dial(t, w.url+"/api/v2/workspaceagents/me/rpc?version="+version, http.Header{"Coder-Session-Token": {a.token}})
	if err != nil {
		t.Fatalf("me/rpc at %s: %v%s", version, err, answer(resp))
	}
	return s
}

// coordinate opens the socket of a client of one agent.
func (w *world) coordinate(t testing.TB, a identity) *session {
	t.Helper()
	s, resp, err := dial(t, w.url+"/api/v2/workspaceagents/"+a.id+"/coordinate?version=2.0", http.Header{"Coder-Session-Token": {w.key}})
	if err != nil {
		t.Fatalf("coordinate: %v%s", err, answer(resp))
	}
	return s
}

func answer(resp *http.Response) string {
	if resp == nil {
		return ""
	}
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 2048))
	return fmt.Sprintf(" (%s %s)", resp.Status, body)
}

// reply is an answer to an HTTP request.
type reply struct {
	status int
	header http.Header
	body   []byte
}

// request makes an HTTP request. The token goes into the header of stock peers unless it is empty.
func request(t testing.TB, method, url, token string, body any, header ...string) reply {
	t.Helper()
	var r io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		r = strings.NewReader(b)
	case []byte:
		r = bytes.NewReader(b)
	default:
		j, err := json.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		r = bytes.NewReader(j)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, url, r)
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Coder-Session-Token", token)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	noRedirects := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := noRedirects.Do(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	return reply{resp.StatusCode, resp.Header, b}
}

// json reads the body as an object.
func (r reply) json(t testing.TB) map[string]any {
	t.Helper()
	var v map[string]any
	if err := json.Unmarshal(r.body, &v); err != nil {
		t.Fatalf("%d with a body that is no object: %v: %.300s", r.status, err, r.body)
	}
	return v
}

// wants checks status and message of an answer, the message by its beginning; "" leaves it open.
func (r reply) wants(t testing.TB, status int, message string) reply {
	t.Helper()
	if r.status != status {
		t.Fatalf("status %d, not %d: %.500s", r.status, status, r.body)
	}
	if message == "" {
		return r
	}
	if got, _ := r.json(t)["message"].(string); !strings.HasPrefix(got, message) {
		t.Errorf("the message is %q, not %q", got, message)
	}
	if ct := r.header.Get("Content-Type"); ct != "application/json; charset=utf-8" {
		t.Errorf("the content type is %q", ct)
	}
	return r
}

// validation returns the detail of a field's validation.
func (r reply) validation(t testing.TB, field string) string {
	t.Helper()
	all, _ := r.json(t)["validations"].([]any)
	for _, v := range all {
		if v := v.(map[string]any); v["field"] == field {
			return v["detail"].(string)
		}
	}
	return ""
}

// wantError checks that an RPC failed with the words.
func wantError(t testing.TB, err error, words string) {
	t.Helper()
	var e *rpcError
	if !errors.As(err, &e) {
		t.Fatalf("the answer is %v, not an Error packet with %q", err, words)
	}
	if !strings.Contains(e.text, words) {
		t.Errorf("the error is %q, which has no %q", e.text, words)
	}
}
