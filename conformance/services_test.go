package conformance

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"
	"golang.org/x/crypto/ssh"
)

// TestServices is what berthd serves inside the tailnet, asked by the second client.
func TestServices(t *testing.T) {
	w := stage(t)
	c := w.connect(t, w.berthd(t))
	for _, port := range []uint16{1, 22} {
		serveSSHCases(t, c, port)
	}
	ptyCases(t, c)
	speedCases(t, c)
	apiCases(t, w, c)
	forwardCases(t, c)
	check(t, "TSMP", "pings are answered", func(t *testing.T) {
		if err := c.node.pingTSMP(c.target, patience); err != nil {
			t.Error(err)
		}
	})
	check(t, "TSMP", "at the newer address, too", func(t *testing.T) {
		a := agentAddresses(uuidBytes(w.berthd(t).id))
		if err := c.node.pingTSMP(a[1], patience); err != nil {
			t.Error(err)
		}
	})
}

func serveSSHCases(t *testing.T, c *client, port uint16) {
	row := fmt.Sprintf("port %d: SSH", port)
	run := func(t *testing.T, command string) (string, error) {
		t.Helper()
		s, err := c.ssh(port).NewSession()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		out, err := s.Output(command)
		return string(out), err
	}
	check(t, row, "a command's output and status", func(t *testing.T) {
		out, err := run(t, "echo out; exit 3")
		var exit *ssh.ExitError
		if out != "out\n" || !errors.As(err, &exit) || exit.ExitStatus() != 3 {
			t.Errorf("%q, %v", out, err)
		}
	})
	check(t, row, "killed by a signal is 255", func(t *testing.T) {
		_, err := run(t, "kill -9 $$")
		var exit *ssh.ExitError
		if !errors.As(err, &exit) || exit.ExitStatus() != 255 || exit.Signal() != "" {
			t.Errorf("%v", err)
		}
	})
	check(t, row, "input is passed on", func(t *testing.T) {
		s, err := c.ssh(port).NewSession()
		if err != nil {
			t.Fatal(err)
		}
		s.Stdin = strings.NewReader(strings.Repeat("0123456789\n", 10_000))
		out, err := s.Output("wc -c")
		if err != nil || strings.TrimSpace(string(out)) != "110000" {
			t.Errorf("%q, %v", out, err)
		}
	})
	if port != 1 {
		return // it is the same server
	}
	check(t, row, "the environment of a command", func(t *testing.T) {
		s, err := c.ssh(port).NewSession()
		if err != nil {
			t.Fatal(err)
		}
		for name, value := range map[string]string{"MINE": "kept", "CODER": "overridden", "EDITOR": "overridden", "CODER_SSH_SESSION_TYPE": "vscode"} {
			if err := s.Setenv(name, value); err != nil {
				t.Errorf("env %s: %v", name, err)
			}
		}
		out, err := s.Output("env")
		if err != nil {
			t.Fatal(err)
		}
		env := map[string]string{}
		for _, line := range strings.Split(string(out), "\n") {
			name, value, _ := strings.Cut(line, "=")
			env[name] = value
		}
		for name, value := range map[string]string{"MINE": "kept", "CODER": "true", "EDITOR": "vim", "CODER_WORKSPACE_AGENT_NAME": "full", "USER": "root", "LOGNAME": "root",
			"SSH_CLIENT": "0.0.0.0 0 0", "SSH_CONNECTION": "0.0.0.0 0 0.0.0.0 0", "CS_DISABLE_GETTING_STARTED_OVERRIDE": "true"} {
			if env[name] != value {
				t.Errorf("%s is %q, not %q", name, env[name], value)
			}
		}
		for _, name := range []string{"CODER_WORKSPACE_NAME", "CODER_WORKSPACE_OWNER_NAME", "CODER_WORKSPACE_ID", "CODER_AGENT_URL", "CODER_AGENT_TOKEN", "GIT_SSH_COMMAND", "GIT_ASKPASS", "SHELL"} {
			if env[name] == "" {
				t.Errorf("%s is not set", name)
			}
		}
		if _, ok := env["CODER_SSH_SESSION_TYPE"]; ok {
			t.Error("CODER_SSH_SESSION_TYPE is there")
		}
	})
	check(t, row, "a script with an interpreter of its own", func(t *testing.T) {
		if out, err := run(t, "#!/bin/sh\necho run by $0"); err != nil || out != "run by /bin/sh\n" && !strings.HasPrefix(out, "run by ") {
			t.Errorf("%q, %v", out, err)
		}
	})
	check(t, row, "a terminal: size, changes, TERM", func(t *testing.T) {
		s, err := c.ssh(port).NewSession()
		if err != nil {
			t.Fatal(err)
		}
		if err := s.RequestPty("xterm-256color", 33, 111, ssh.TerminalModes{ssh.ECHO: 0}); err != nil {
			t.Fatal(err)
		}
		in, _ := s.StdinPipe()
		out, _ := s.StdoutPipe()
		if err := s.Start("echo $TERM; stty size; read x; stty size; test -n \"$SSH_TTY\" && echo has-tty"); err != nil {
			t.Fatal(err)
		}
		readWords(t, out, "xterm-256color", "33 111")
		if err := s.WindowChange(44, 122); err != nil {
			t.Fatal(err)
		}
		io.WriteString(in, "go\n")
		readWords(t, out, "44 122", "has-tty")
	})
	check(t, row, "requests that are refused, and those that are not", func(t *testing.T) {
		client := c.ssh(port)
		if ok, _, err := client.SendRequest("keepalive@openssh.com", true, nil); err != nil || ok {
			t.Errorf("the global keepalive is answered %v, %v", ok, err)
		}
		if ok, _, err := client.SendRequest("no-such-thing", true, nil); err != nil || ok {
			t.Errorf("an unknown global request is answered %v, %v", ok, err)
		}
		if _, _, err := client.OpenChannel("no-such-channel", nil); err == nil {
			t.Error("an unknown channel is opened")
		} else if o := (*ssh.OpenChannelError)(nil); !errors.As(err, &o) || o.Reason != ssh.UnknownChannelType {
			t.Errorf("an unknown channel: %v", err)
		}
		s, err := client.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		if ok, err := s.SendRequest("keepalive@openssh.com", true, nil); err != nil || !ok {
			t.Errorf("a session's keepalive is answered %v, %v", ok, err)
		}
		if err := s.RequestSubsystem("netconf"); err == nil {
			t.Error("an unknown subsystem is started")
		}
	})
	check(t, row, "sftp begins with its version", func(t *testing.T) {
		s, err := c.ssh(port).NewSession()
		if err != nil {
			t.Fatal(err)
		}
		in, _ := s.StdinPipe()
		out, _ := s.StdoutPipe()
		if err := s.RequestSubsystem("sftp"); err != nil {
			t.Fatal(err)
		}
		in.Write([]byte{0, 0, 0, 5, 1, 0, 0, 0, 3})
		b := make([]byte, 9)
		if _, err := io.ReadFull(out, b); err != nil || b[4] != 2 || binary.BigEndian.Uint32(b[5:]) != 3 {
			t.Errorf("%x %v", b, err)
		}
	})
	check(t, row, "ports and sockets are forwarded both ways", func(t *testing.T) {
		client := c.ssh(port)
		addr := echoServer(t, "tcp", "127.0.0.1:0")
		conn, err := client.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		wantEcho(t, conn)
		path := filepath.Join(t.TempDir(), "echo.sock")
		echoServer(t, "unix", path)
		if conn, err = client.Dial("unix", path); err != nil {
			t.Fatal(err)
		}
		wantEcho(t, conn)
		l, err := client.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go echo(l)
		if conn, err = net.Dial("tcp", l.Addr().String()); err != nil {
			t.Fatal(err)
		}
		wantEcho(t, conn)
	})
}

// readWords reads until all words have come, in order.
func readWords(t testing.TB, r io.Reader, words ...string) {
	t.Helper()
	var seen []byte
	b := make([]byte, 1024)
	rest := 0
	for len(words) > 0 {
		if i := bytes.Index(seen[rest:], []byte(words[0])); i >= 0 {
			rest += i + len(words[0])
			words = words[1:]
			continue
		}
		n, err := r.Read(b)
		if err != nil {
			t.Fatalf("read %q, then %v, and no %q", seen, err, words[0])
		}
		seen = append(seen, b[:n]...)
	}
}

func echo(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			io.Copy(c, c)
			c.Close()
		}()
	}
}

func echoServer(t testing.TB, network, address string) string {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go echo(l)
	return l.Addr().String()
}

func wantEcho(t testing.TB, c net.Conn) {
	t.Helper()
	defer c.Close()
	if _, err := io.WriteString(c, "there and back"); err != nil {
		t.Error(err)
		return
	}
	b := make([]byte, 14)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "there and back" {
		t.Errorf("came back as %q, %v", b, err)
	}
}

func ptyCases(t *testing.T, c *client) {
	const row = "port 2: reconnecting PTY"
	init := func(id, command, more string) string {
		return fmt.Sprintf(`{"ID":%q,"Height":24,"Width":80,"Command":%q%s}`, id, command, more)
	}
	check(t, row, "typing, sizes, taking up again, two at once", func(t *testing.T) {
		id := uuid.NewString()
		one := c.pty(init(id, "/bin/sh", ""))
		say(t, one, map[string]any{"data": "echo $TERM; stty size; echo $((6*7))-typed\r"})
		readUntil(t, one, "xterm-256color")
		readUntil(t, one, "24 80")
		readUntil(t, one, "42-typed")
		two := c.pty(init(id, "", ""))
		readUntil(t, two, "42-typed") // what was shown before
		say(t, two, map[string]any{"height": 50, "width": 150})
		say(t, two, map[string]any{"data": "stty size\r"})
		readUntil(t, one, "50 150")
		readUntil(t, two, "50 150")
		say(t, two, map[string]any{"height": 10}) // one size alone changes nothing
		say(t, two, map[string]any{"data": "stty size; exit\r"})
		readUntil(t, one, "50 150")
		for _, conn := range []net.Conn{one, two} {
			if _, err := io.Copy(io.Discard, conn); err != nil {
				t.Errorf("the end of the shell: %v", err)
			}
		}
	})
	for _, backend := range []string{"screen", "buffered", "whatever"} {
		check(t, row, "backend "+backend, func(t *testing.T) {
			conn := c.pty(init(uuid.NewString(), "echo from a terminal; sleep 60", fmt.Sprintf(`,"BackendType":%q`, backend)))
			readUntil(t, conn, "from a terminal")
		})
	}
	check(t, row, "an init that comes in pieces is read whole", func(t *testing.T) {
		conn := c.dial(2)
		body := init(uuid.NewString(), "echo pieces; sleep 60", "")
		b := append(binary.LittleEndian.AppendUint16(nil, uint16(len(body))), body...)
		for i := range b {
			if _, err := conn.Write(b[i : i+1]); err != nil {
				t.Fatal(err)
			}
		}
		readUntil(t, conn, "pieces")
	})
	for _, bad := range []struct{ name, body string }{
		{"no JSON", "nonsense"}, {"an id that is none", `{"ID":"x","Height":1,"Width":1,"Command":""}`}, {"another type", `{"ID":7}`}, {"nothing", ""},
	} {
		check(t, row, "the connection closes on "+bad.name, func(t *testing.T) {
			if n, err := io.Copy(io.Discard, c.pty(bad.body)); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%d bytes, %v", n, err)
			}
		})
	}
	check(t, row, "nonsense after the init ends the attachment, not the session", func(t *testing.T) {
		id := uuid.NewString()
		conn := c.pty(init(id, "echo begun; sleep 60", ""))
		readUntil(t, conn, "begun")
		io.WriteString(conn, "}}}")
		io.Copy(io.Discard, conn)
		readUntil(t, c.pty(init(id, "", "")), "begun")
	})
}

func speedCases(t *testing.T, c *client) {
	const row = "port 3: speed test"
	begin := func(t *testing.T, config string) (net.Conn, *json.Decoder, string) {
		conn := c.dial(3)
		io.WriteString(conn, config+"\n")
		d := json.NewDecoder(conn)
		var answer struct{ Error string }
		if err := d.Decode(&answer); err != nil {
			t.Fatal(err)
		}
		return conn, d, answer.Error
	}
	check(t, row, "download", func(t *testing.T) {
		conn, d, problem := begin(t, `{"version":2,"time":300000000,"direction":0}`)
		if problem != "" {
			t.Fatal(problem)
		}
		n, err := io.Copy(io.Discard, io.MultiReader(d.Buffered(), conn))
		if n < 1<<20 || err != nil {
			t.Errorf("%d bytes, %v", n, err)
		}
	})
	check(t, row, "upload", func(t *testing.T) {
		conn, _, problem := begin(t, `{"version":2,"time":300000000,"direction":1}`)
		if problem != "" {
			t.Fatal(problem)
		}
		block := make([]byte, 2<<20)
		for end := time.Now().Add(300 * time.Millisecond); time.Now().Before(end); {
			if _, err := conn.Write(block); err != nil {
				return // the agent has seen enough
			}
		}
	})
	check(t, row, "another version", func(t *testing.T) {
		conn, _, problem := begin(t, `{"version":1,"time":1,"direction":0}`)
		if problem == "" {
			t.Error("no error")
		}
		if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("the connection stays open")
		}
	})
}

func apiCases(t *testing.T, w *world, c *client) {
	client, base := c.http()
	do := func(t *testing.T, method, path, body string) (int, []byte, http.Header) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, method, base+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, b, resp.Header
	}
	object := func(t *testing.T, b []byte) map[string]any {
		t.Helper()
		var v map[string]any
		if err := json.Unmarshal(b, &v); err != nil {
			t.Fatalf("%v in %.300s", err, b)
		}
		return v
	}
	check(t, "port 4: GET /", "hello", func(t *testing.T) {
		status, b, _ := do(t, "GET", "/", "")
		if status != 200 || object(t, b)["message"] != "Hello from the agent!" {
			t.Errorf("%d %s", status, b)
		}
	})
	check(t, "port 4: GET /", "an unknown path", func(t *testing.T) {
		if status, b, _ := do(t, "GET", "/api/v0/nothing", ""); status != 404 || !strings.HasPrefix(string(b), "404 page not found") {
			t.Errorf("%d %s", status, b)
		}
	})
	check(t, "port 4: GET /api/v0/listening-ports", "a listener is found, with its name", func(t *testing.T) {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		port := float64(l.Addr().(*net.TCPAddr).Port)
		eventually(t, "the port is listed", func() bool { // the list may be a second old
			status, b, _ := do(t, "GET", "/api/v0/listening-ports", "")
			if status != 200 {
				t.Fatalf("%d %s", status, b)
			}
			for _, x := range object(t, b)["ports"].([]any) {
				p := x.(map[string]any)
				if p["network"] != "tcp" || p["port"].(float64) < 9 {
					t.Errorf("the port %v is listed", p)
				}
				if p["port"] == port {
					return strings.HasPrefix(fmt.Sprint(p["process_name"]), "conformance") || p["process_name"] != ""
				}
			}
			return false
		})
	})
	check(t, "port 4: GET /api/v0/netcheck", "net_info and interfaces", func(t *testing.T) {
		status, b, _ := do(t, "GET", "/api/v0/netcheck", "")
		v := object(t, b)
		interfaces, _ := v["interfaces"].(map[string]any)
		if status != 200 || v["severity"] != "ok" || interfaces == nil || interfaces["interfaces"] == nil {
			t.Fatalf("%d %s", status, b)
		}
		for _, key := range []string{"warnings", "dismissed", "net_info"} {
			if _, ok := v[key]; !ok {
				t.Errorf("%s is missing", key)
			}
		}
		if info, ok := v["net_info"].(map[string]any); ok && info["PreferredDERP"] == nil {
			t.Errorf("net_info is %v", info)
		}
		for _, x := range interfaces["interfaces"].([]any) {
			i := x.(map[string]any)
			if i["name"] == "" || i["mtu"] == nil {
				t.Errorf("an interface is %v", i)
			}
		}
	})
	const listRow = "port 4: POST /api/v0/list-directory"
	dir := t.TempDir()
	for _, name := range []string{"b-file", "a-file"} {
		os.WriteFile(filepath.Join(dir, name), []byte("content"), 0o600)
	}
	os.Mkdir(filepath.Join(dir, "z-dir"), 0o700)
	elements := strings.Split(strings.TrimPrefix(dir, "/"), "/")
	body, _ := json.Marshal(map[string]any{"path": elements, "relativity": "root"})
	for name, c := range map[string]struct{ query, body string }{"by elements": {"", string(body)}, "by query": {"?path=" + dir, `{}`}} {
		check(t, listRow, name, func(t *testing.T) {
			status, b, _ := do(t, "POST", "/api/v0/list-directory"+c.query, c.body)
			v := object(t, b)
			if status != 200 || v["absolute_path_string"] != dir || fmt.Sprint(v["absolute_path"]) != fmt.Sprint(elements) {
				t.Fatalf("%d %s", status, b)
			}
			var names []string
			for _, x := range v["contents"].([]any) {
				e := x.(map[string]any)
				names = append(names, fmt.Sprint(e["name"], e["is_dir"]))
				if e["absolute_path_string"] != filepath.Join(dir, e["name"].(string)) {
					t.Errorf("an entry is %v", e)
				}
			}
			if fmt.Sprint(names) != "[z-dirtrue a-filefalse b-filefalse]" {
				t.Errorf("the entries are %v: directories come first, then names", names)
			}
		})
	}
	check(t, listRow, "of the home", func(t *testing.T) {
		status, b, _ := do(t, "POST", "/api/v0/list-directory", `{"path":[],"relativity":"home"}`)
		if status != 200 || object(t, b)["absolute_path_string"] != w.home {
			t.Errorf("%d %s", status, b)
		}
	})
	for _, bad := range []struct {
		name, query, body string
		status            int
	}{{"what is not there", "?path=/no/such/place", "{}", 404}, {"a file", "?path=" + dir + "/a-file", "{}", 500}, {"a relative path", "?path=relative", "{}", 500},
		{"an unknown relativity", "", `{"path":[],"relativity":"moon"}`, 500}, {"no JSON", "", "{", 400}} {
		check(t, listRow, bad.name, func(t *testing.T) {
			status, b, _ := do(t, "POST", "/api/v0/list-directory"+bad.query, bad.body)
			if status != bad.status || object(t, b)["message"] == "" {
				t.Errorf("%d %s", status, b)
			}
		})
	}
	// These serve AI features; berthd's HTTP API only reads, and says so with a 404.
	for _, gone := range []struct{ row, method, path string }{
		{"port 4: GET /api/v0/read-file", "GET", "/api/v0/read-file?path=/etc/hostname"},
		{"port 4: POST /api/v0/write-file", "POST", "/api/v0/write-file?path=" + dir + "/written"},
		{"port 4: POST /api/v0/edit-files", "POST", "/api/v0/edit-files"},
		{"port 4: GET /api/v0/resolve-path, /api/v0/read-file-lines", "GET", "/api/v0/resolve-path?path=/"},
		{"port 4: POST, GET /api/v0/processes", "POST", "/api/v0/processes/start"},
	} {
		check(t, gone.row, "served, or a clear 404", func(t *testing.T) {
			status, b, _ := do(t, gone.method, gone.path, "{}")
			if status == 404 && !strings.HasPrefix(string(b), "404 page not found") || status >= 500 {
				t.Errorf("%d %s", status, b)
			}
		})
	}
	check(t, "port 4: GET /api/v0/containers", "the list", func(t *testing.T) {
		status, b, _ := do(t, "GET", "/api/v0/containers", "")
		v := object(t, b)
		if _, ok := v["containers"]; status != 200 || !ok {
			t.Errorf("%d %s", status, b)
		}
	})
	check(t, "port 4: GET ws /api/v0/containers/watch", "text messages, compression offered or not", func(t *testing.T) {
		for _, mode := range []websocket.CompressionMode{websocket.CompressionDisabled, websocket.CompressionNoContextTakeover} {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			ws, resp, err := websocket.Dial(ctx, base+"/api/v0/containers/watch", &websocket.DialOptions{HTTPClient: client, CompressionMode: mode})
			if err != nil {
				t.Fatal(err, answer(resp))
			}
			ws.SetReadLimit(4 << 20)
			kind, b, err := ws.Read(ctx)
			if err != nil || kind != websocket.MessageText || !bytes.HasSuffix(b, []byte("\n")) {
				t.Fatalf("%v %q %v", kind, b, err)
			}
			object(t, b)
			ws.CloseNow()
		}
	})
	check(t, "port 4: POST /api/v0/containers/devcontainers/{id}/recreate", "an unknown one", func(t *testing.T) {
		status, b, _ := do(t, "POST", "/api/v0/containers/devcontainers/"+uuid.NewString()+"/recreate", "")
		if status != 404 || object(t, b)["message"] != "Devcontainer not found." {
			t.Errorf("%d %s", status, b)
		}
	})
	check(t, "port 4: DELETE /api/v0/containers/devcontainers/{id}", "an unknown one", func(t *testing.T) {
		status, b, _ := do(t, "DELETE", "/api/v0/containers/devcontainers/"+uuid.NewString(), "")
		if status != 404 || object(t, b)["message"] != "Devcontainer not found." {
			t.Errorf("%d %s", status, b)
		}
	})
	check(t, listRow, "a query that is not known", func(t *testing.T) {
		status, b, _ := do(t, "POST", "/api/v0/list-directory?paht=/", "{}")
		if status != 400 || object(t, b)["message"] != "Query parameters have invalid values." {
			t.Errorf("%d %s", status, b)
		}
	})
	check(t, "port 4: GET /api/v0/listening-ports", "UDP when asked", func(t *testing.T) {
		u, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		port := float64(u.LocalAddr().(*net.UDPAddr).Port)
		eventually(t, "the UDP port is listed", func() bool {
			_, b, _ := do(t, "GET", "/api/v0/listening-ports?network=all", "")
			for _, x := range object(t, b)["ports"].([]any) {
				if p := x.(map[string]any); p["network"] == "udp" && p["port"] == port {
					return true
				}
			}
			return false
		})
	})
	check(t, "port 4: GET /debug/logs", "text", func(t *testing.T) {
		status, b, _ := do(t, "GET", "/debug/logs", "")
		if status != 200 || len(b) == 0 {
			t.Errorf("%d, %d bytes", status, len(b))
		}
		if bytes.Contains(b, []byte(sharedAgent.token)) {
			t.Error("the token is in the log")
		}
	})
	check(t, "port 4: GET /debug/magicsock", "a page", func(t *testing.T) {
		if status, b, _ := do(t, "GET", "/debug/magicsock", ""); status != 200 || len(b) == 0 {
			t.Errorf("%d %s", status, b)
		}
	})
	const switchRow = "port 4: GET /debug/magicsock/debug-logging/{state}"
	for state, want := range map[string]int{"true": 200, "false": 200, "maybe": 400} {
		check(t, switchRow, state, func(t *testing.T) {
			if status, b, _ := do(t, "GET", "/debug/magicsock/debug-logging/"+state, ""); status != want {
				t.Errorf("%d %s", status, b)
			}
		})
	}
	check(t, "port 4: GET /debug/manifest", "in force, without values of the environment", func(t *testing.T) {
		status, b, _ := do(t, "GET", "/debug/manifest", "")
		v := object(t, b)
		for _, key := range strings.Fields(`parent_id agent_id agent_name owner_name workspace_id workspace_name git_auth_configs vscode_port_proxy_uri apps derpmap derp_force_websockets
			environment_variables directory motd_file disable_direct_connections metadata scripts devcontainers`) {
			if _, ok := v[key]; !ok {
				t.Errorf("%s is missing", key)
			}
		}
		if env, _ := v["environment_variables"].(map[string]any); status != 200 || v["agent_name"] != "full" || env["EDITOR"] != "***REDACTED***" {
			t.Errorf("%d, name %v, environment %v", status, v["agent_name"], env)
		}
	})
	check(t, "port 4: GET /debug/prometheus", "text format", func(t *testing.T) {
		status, b, _ := do(t, "GET", "/debug/prometheus", "")
		if status != 200 || !bytes.Contains(b, []byte("# TYPE ")) {
			t.Errorf("%d %.200s", status, b)
		}
	})
}

func forwardCases(t *testing.T, c *client) {
	const row = "any other port: forwarded to loopback"
	portOf := func(address string) uint16 {
		_, p, _ := net.SplitHostPort(address)
		n, _ := strconv.Atoi(p)
		return uint16(n)
	}
	check(t, row, "127.0.0.1", func(t *testing.T) {
		wantEcho(t, c.dial(portOf(echoServer(t, "tcp", "127.0.0.1:0"))))
	})
	check(t, row, "::1 where nothing is at 127.0.0.1", func(t *testing.T) {
		wantEcho(t, c.dial(portOf(echoServer(t, "tcp", "[::1]:0"))))
	})
	closed := func(t *testing.T, port uint16) {
		t.Helper()
		if conn, err := c.node.dial(c.target, port, patience); err == nil {
			conn.Close()
			t.Error("a port that nothing listens on accepts")
		} else if !strings.Contains(err.Error(), "refused") {
			t.Errorf("%v, which is no reset", err)
		}
	}
	check(t, row, "a closed port is refused before the handshake completes", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := portOf(l.Addr().String())
		l.Close()
		closed(t, port)
	})
	for port := uint16(5); port <= 8; port++ {
		check(t, "ports 5-8: reserved", fmt.Sprint(port), func(t *testing.T) { closed(t, port) })
	}
	check(t, row, "UDP", func(t *testing.T) {
		u, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		go func() {
			b := make([]byte, 2000)
			for {
				n, from, err := u.ReadFrom(b)
				if err != nil {
					return
				}
				u.WriteTo(b[:n], from)
			}
		}()
		conn, err := c.node.dialUDP(c.target, portOf(u.LocalAddr().String()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		b := make([]byte, 100)
		for range 20 { // datagrams may be lost
			io.WriteString(conn, "datagram")
			conn.SetReadDeadline(time.Now().Add(time.Second))
			if n, err := conn.Read(b); err == nil && string(b[:n]) == "datagram" {
				return
			}
		}
		t.Error("no datagram came back")
	})
}
