package berthd

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/berthd/berth/doctor"
	"github.com/berthd/berth/internal/netlab"
	"github.com/berthd/berth/tailnet/relay"
	"github.com/berthd/berth/wire"
)

// clinic is a control server as far as the doctor asks one. relays is its relay map, whose embedded relay it is itself.
type clinic struct {
	date   time.Time // what its clock says; zero: the right time
	token  string    // of its one agent
	relays *wire.DERPMap
}

func (c *clinic) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !c.date.IsZero() {
		w.Header().Set("Date", c.date.UTC().Format(http.TimeFormat))
	}
	switch r.URL.Path {
	case wire.PathBuildInfo:
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(wire.BuildInfo{Version: "v1.2.3"})
	case wire.PathAPI + "derp-map":
		conn, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		defer conn.CloseNow()
		body, _ := json.Marshal(c.relays)
		_ = conn.Write(r.Context(), websocket.MessageBinary, body)
		_ = conn.Close(websocket.StatusGoingAway, "")
	case wire.PathMe + "rpc":
		if r.Header.Get(wire.HeaderSessionToken) != c.token {
			answer(http.StatusUnauthorized, "Workspace agent not authorized.")(w, r)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusBadRequest)
		json.NewEncoder(w).Encode(wire.Error{Message: "Unknown or unsupported API version", Validations: []wire.Validation{{Field: "version", Detail: "no"}}})
	case wire.PathLatencyCheck:
		w.WriteHeader(http.StatusOK)
	default:
		http.NotFound(w, r)
	}
}

func newClinic() *clinic {
	return &clinic{token: secretToken, relays: &wire.DERPMap{Regions: map[int64]*wire.DERPRegion{999: {
		EmbeddedRelay: true, RegionID: 999, RegionName: "clinic", Nodes: []*wire.DERPNode{{Name: "999b", RegionID: 999, HostName: "x", STUNPort: -1}},
	}}}}
}

func (c *clinic) serve(t *testing.T) string {
	t.Helper()
	s := httptest.NewServer(c)
	t.Cleanup(s.Close)
	return s.URL
}

// examined is what berthd doctor found.
type examined struct {
	doctor.Report
	code int
}

// examine runs berthd doctor --json by a command that becomes berthd.
func examine(t *testing.T, cmd *exec.Cmd, env ...string) examined {
	t.Helper()
	home := shortTempDir(t)
	cmd.Args = append(cmd.Args, "doctor", "--json")
	cmd.Env = append([]string{envSelf + "=1", "PATH=" + os.Getenv("PATH"), "HOME=" + home, "BERTH_STATE_DIR=" + filepath.Join(home, "s"),
		"BERTH_TOKEN=" + secretToken, "TMPDIR=" + home}, env...)
	var errOut strings.Builder
	cmd.Stderr = &errOut
	began := time.Now()
	out, _ := cmd.Output()
	if took := time.Since(began); took > 30*time.Second { // 15 on an idle machine
		t.Errorf("it took %v", took)
	}
	if strings.Contains(string(out)+errOut.String(), secretToken) {
		t.Errorf("the token shows:\n%s%s", out, &errOut)
	}
	e := examined{code: cmd.ProcessState.ExitCode()}
	if err := json.Unmarshal(out, &e.Report); err != nil {
		t.Fatalf("exit code %d, %v:\n%s%s", e.code, err, out, &errOut)
	}
	return e
}

// finds wants one check to have come out so, with words in what it says, and the exit code that fits.
func (e examined) finds(t *testing.T, name string, status doctor.Status, words ...string) {
	t.Helper()
	for _, c := range e.Checks {
		if c.Name != name {
			continue
		}
		said := c.Cause + " | " + c.Fix + " | " + c.Detail
		t.Logf("%s %s: %s", c.Status, c.Name, said)
		if c.Status != status || status != doctor.OK && status != doctor.Skip && (c.Cause == "" || c.Fix == "") {
			t.Errorf("%s is %s: %s", name, c.Status, said)
		}
		for _, word := range words {
			if !strings.Contains(said, word) {
				t.Errorf("%s lacks %q: %s", name, word, said)
			}
		}
		if (e.code == ExitFailure) != e.Failed() || e.code > ExitFailure {
			t.Errorf("exit code %d", e.code)
		}
		return
	}
	t.Errorf("there is no check %q in %+v", name, e.Checks)
}

// TestDoctorWell: nothing fails where nothing is wrong.
func TestDoctorWell(t *testing.T) {
	e := examine(t, exec.Command(os.Args[0]), "BERTH_URL="+newClinic().serve(t))
	for _, name := range []string{"settings", "last-end", "disk", "spool", "terminals", "ports", "dns", "proxy", "server", "ca", "clock", "websocket", "identity", "token", "relay", "udp", "mtu"} {
		e.finds(t, name, doctor.OK)
	}
	e.finds(t, "berthd", doctor.Warn, "no berthd runs here")
}

// TestDoctorFaults makes each fault that needs no network of its own.
func TestDoctorFaults(t *testing.T) {
	plain := func(h http.HandlerFunc) func(*testing.T) []string {
		return func(t *testing.T) []string {
			s := httptest.NewServer(h)
			t.Cleanup(s.Close)
			return []string{"BERTH_URL=" + s.URL}
		}
	}
	for name, tt := range map[string]struct {
		env    func(*testing.T) []string
		check  string
		status doctor.Status
		words  []string
	}{
		"no URL":  {func(*testing.T) []string { return nil }, "settings", doctor.Fail, []string{"BERTH_URL"}},
		"no name": {func(*testing.T) []string { return []string{"BERTH_URL=http://no-such-host.invalid"} }, "dns", doctor.Fail, []string{"no-such-host.invalid cannot be resolved"}},
		"https for http": {func(t *testing.T) []string {
			return []string{"BERTH_URL=" + strings.Replace(newClinic().serve(t), "http:", "https:", 1)}
		}, "server", doctor.Fail, []string{"speaks plain http"}},
		"HTML":     {plain(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<!DOCTYPE html><html>log in</html>") }), "server", doctor.Fail, []string{"HTML page"}},
		"redirect": {plain(http.RedirectHandler("https://sso.example.com/login", http.StatusFound).ServeHTTP), "server", doctor.Fail, []string{"redirects to https://sso.example.com"}},
		"refused token": {func(t *testing.T) []string {
			c := newClinic()
			c.token = "another"
			return []string{"BERTH_URL=" + c.serve(t)}
		}, "token", doctor.Fail, []string{"not authorized", "give a token"}},
		"no token file": {func(t *testing.T) []string {
			return []string{"BERTH_URL=" + newClinic().serve(t), "BERTH_TOKEN=", "BERTH_TOKEN_FILE=/nonexistent/token"}
		}, "identity", doctor.Fail, []string{"/nonexistent/token", "make it"}},
		"far side's clock differs": {func(t *testing.T) []string {
			c := newClinic()
			c.date = time.Now().Add(time.Hour)
			return []string{"BERTH_URL=" + c.serve(t)}
		}, "clock", doctor.Warn, []string{"the server's clock differs from this machine's by", "NTP"}},
		"dead proxy": {func(*testing.T) []string {
			return []string{"BERTH_URL=http://berth.test", "HTTP_PROXY=http://127.0.0.1:1"}
		}, "proxy", doctor.Fail, []string{"the proxy in front of the server is not reached", "NO_PROXY"}},
		"TLS-intercepting proxy": {func(t *testing.T) []string {
			return []string{"BERTH_URL=https://berth.test", "HTTPS_PROXY=" + interceptingProxy(t)}
		}, "ca", doctor.Fail, []string{"does not trust", "BERTH_CA_FILE", "Nosy Proxy CA"}},
		"proxy that strips Upgrade": {func(t *testing.T) []string {
			to, err := url.Parse(newClinic().serve(t))
			if err != nil {
				t.Fatal(err)
			}
			proxy := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
				r.SetURL(to)
				r.Out.Header.Del("Upgrade")
				r.Out.Header.Del("Connection")
			}})
			t.Cleanup(proxy.Close)
			return []string{"BERTH_URL=" + proxy.URL}
		}, "websocket", doctor.Fail, []string{"strips the Upgrade header"}},
		"no relay": {func(t *testing.T) []string {
			c := newClinic()
			c.relays.Regions[999].EmbeddedRelay = false
			c.relays.Regions[999].Nodes[0] = &wire.DERPNode{HostName: "127.0.0.1", DERPPort: 1, ForceHTTP: true, STUNPort: -1}
			return []string{"BERTH_URL=" + c.serve(t)}
		}, "relay", doctor.Fail, []string{"no relay answers", "clinic", "refused"}},
		"engine that is not there": {func(t *testing.T) []string {
			return []string{"BERTH_URL=" + newClinic().serve(t), "DOCKER_HOST=unix:///nonexistent/docker.sock"}
		}, "engines", doctor.Warn, []string{"docker", "/nonexistent/docker.sock"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			env := tt.env(t)
			examine(t, exec.Command(os.Args[0]), env...).finds(t, tt.check, tt.status, tt.words...)
		})
	}
}

// interceptingProxy takes CONNECT and answers with a certificate of its own making.
func interceptingProxy(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{Subject: pkix.Name{CommonName: "Nosy Proxy CA"}}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"berth.test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, rest, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		fmt.Fprint(rest, "HTTP/1.1 200 OK\r\n\r\n")
		rest.Flush()
		_ = tls.Server(conn, config).Handshake() // the client ends it
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// inShell is berthd behind a line of shell, which prepares what it runs in.
func inShell(wrap func(argv ...string) *exec.Cmd, prepare string) *exec.Cmd {
	return wrap("sh", "-c", prepare+` && exec "$@"`, "sh", os.Args[0])
}

func local(argv ...string) *exec.Cmd { return exec.Command(argv[0], argv[1:]...) }

// TestDoctorMachine takes away from berthd what a machine may lack.
func TestDoctorMachine(t *testing.T) {
	url := "BERTH_URL=" + newClinic().serve(t)
	// mounts are seen by berthd alone.
	private := func(argv ...string) *exec.Cmd {
		return exec.Command("unshare", append([]string{"-m", "--"}, argv...)...)
	}
	full := shortTempDir(t)
	big := filepath.Join(shortTempDir(t), "s")
	if err := os.MkdirAll(filepath.Join(big, "spool"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(touch(t, filepath.Join(big, "spool", "1.log")), 64<<20); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		cmd    *exec.Cmd
		env    []string
		check  string
		status doctor.Status
		words  []string
	}{
		"full disk": {inShell(private, "mount -t tmpfs -o size=4m none "+full+" && { head -c 5m </dev/zero >"+full+"/f 2>/dev/null || :; }"),
			[]string{"BERTH_STATE_DIR=" + full}, "disk", doctor.Fail, []string{"the disk of " + full + " is full", "make room"}},
		"read-only disk": {inShell(private, "mount -t tmpfs -o ro none "+full), []string{"BERTH_STATE_DIR=" + full}, "disk", doctor.Fail, []string{"nothing can be written to " + full, "read-only"}},
		"full spool":     {inShell(local, ":"), []string{"BERTH_STATE_DIR=" + big}, "spool", doctor.Warn, []string{"the spool is full"}},
		"few files":      {inShell(local, "ulimit -n 200"), nil, "limits", doctor.Warn, []string{"200 files", "LimitNOFILE="}},
		"no terminals":   {inShell(private, "mount --bind /dev/null /dev/ptmx && mount -t tmpfs none /dev/pts && rm -f /dev/ptmx || mount -t tmpfs none /dev"), nil, "terminals", doctor.Fail, []string{"no terminal can be opened", "devpts"}},
	} {
		t.Run(name, func(t *testing.T) {
			examine(t, tt.cmd, append([]string{url}, tt.env...)...).finds(t, tt.check, tt.status, tt.words...)
		})
	}
}

func touch(t *testing.T, path string) string {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestDoctorBesideRun: the berthd that runs says what holds it back, and what became of the one before it.
func TestDoctorBesideRun(t *testing.T) {
	c := newClinic()
	url := "BERTH_URL=" + c.serve(t)
	d := start(t, []string{url})
	eventually(t, "the trouble is noted", func() bool {
		note, _ := os.ReadFile(filepath.Join(d.state, "s", "life.json"))
		return strings.Contains(string(note), `"trouble"`)
	})
	d.stop(syscall.SIGKILL)
	state := "BERTH_STATE_DIR=" + filepath.Join(d.state, "s")
	examine(t, exec.Command(os.Args[0]), url, state).finds(t, "last-end", doctor.Warn, "was killed (SIGKILL) from outside", "had not reached its server since")

	d = start(t, []string{url, state})
	d.says("level=WARN", "was killed (SIGKILL) from outside")
	e := examine(t, exec.Command(os.Args[0]), url, state)
	e.finds(t, "berthd", doctor.Fail, "Unknown or unsupported API version")
	e.finds(t, "last-end", doctor.Warn, "was killed (SIGKILL) from outside")
	d.stop(syscall.SIGTERM)
	examine(t, exec.Command(os.Args[0]), url, state).finds(t, "last-end", doctor.OK, "was told to stop")
}

// TestRunExamines: a berthd that cannot link looks at what else is wrong, and says it once.
func TestRunExamines(t *testing.T) {
	c := newClinic()
	c.date = time.Now().Add(-time.Hour)
	d := start(t, []string{"BERTH_URL=" + c.serve(t)})
	d.says("level=WARN", "Unknown or unsupported API version")
	d.says("level=WARN", "the server's clock differs from this machine's", "check=clock", "fix=")
	d.stop(syscall.SIGTERM)
	if n := strings.Count(d.all(), "Unknown or unsupported API version"); n != 1 {
		t.Errorf("the trouble was said %d times:\n%s", n, d.all())
	}
}

// envClinic makes the test binary serve a clinic at its value until its standard input ends.
const envClinic = "BERTHD_TEST_CLINIC"

// serveClinic serves it, and STUN on the same host.
func serveClinic(host string) error {
	c := newClinic()
	stun := relay.New(nil, func([32]byte) bool { return true })
	defer stun.Close()
	addr, err := stun.ListenSTUN(net.JoinHostPort(host, "3478"))
	if err != nil {
		return err
	}
	c.relays.Regions[999].Nodes[0].HostName, c.relays.Regions[999].Nodes[0].STUNPort = host, int32(addr.Port())
	l, err := net.Listen("tcp", net.JoinHostPort(host, "8080"))
	if err != nil {
		return err
	}
	s := &http.Server{Handler: c}
	go s.Serve(l)
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, os.Stdin)
	s.Close()
	return err
}

// TestDoctorNetwork breaks the network between berthd and its server: a router that drops UDP, and a link that takes
// small packets only and, being no router, cannot say so.
func TestDoctorNetwork(t *testing.T) {
	l := netlab.New(t, "bd", "a", "r", "m")
	l.Wire("a", "r", 1)
	l.Wire("r", "m", 2)
	l.In("r", "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
	l.In("a", "ip", "route", "add", "default", "via", l.Addr(1, 2))
	l.In("m", "ip", "route", "add", "default", "via", l.Addr(2, 1))
	host := l.Addr(2, 2)
	server := l.Command("m", os.Args[0])
	server.Env = append(os.Environ(), envClinic+"="+host)
	server.Stderr = os.Stderr
	in, err := server.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); server.Wait() })
	if _, err := out.Read(make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	url := "BERTH_URL=http://" + host + ":8080"
	doctorIn := func() *exec.Cmd { return l.Command("a", os.Args[0]) }

	examine(t, doctorIn(), url).finds(t, "udp", doctor.OK, "seen at "+l.Addr(1, 1))

	// The router drops what comes by UDP, without a word.
	l.In("r", "ip", "rule", "add", "ipproto", "udp", "blackhole")
	e := examine(t, doctorIn(), url)
	e.finds(t, "udp", doctor.Warn, "no STUN server answers over UDP", host+":3478", "let UDP out")
	e.finds(t, "mtu", doctor.OK)

	// A device drops what comes and is larger than its MTU, if it is not to be cut into packets later.
	l.In("a", "ip", "link", "set", "a1", "gso_max_segs", "1")
	l.In("r", "ip", "link", "set", "r1", "mtu", "1340")
	e = examine(t, doctorIn(), url)
	e.finds(t, "mtu", doctor.Fail, "large packets are lost on the way to the server", "those of 1320 bytes arrive", `let ICMP "fragmentation needed"`)
	e.finds(t, "server", doctor.OK)
}

// TestDoctorHopLimit: the metadata service's token ends at the router.
func TestDoctorHopLimit(t *testing.T) {
	l := newLab(t, "aws")
	l.mode("one hop")
	cmd := l.Command("a", "sh", "-c", `mount -t tmpfs none /sys/class/dmi/id 2>/dev/null; exec "$@"`, "sh", os.Args[0])
	examine(t, cmd, "BERTH_URL="+l.control(), "BERTH_AUTH=aws-instance-identity").finds(t, "identity", doctor.Fail, "hop limit of 1", "modify-instance-metadata-options")
}
