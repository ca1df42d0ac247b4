package e2e

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const oneBox = "agents:\n  - name: box\n"

// forward starts berth forward and waits until it serves.
func (r *road) forward(args ...string) *daemon {
	r.t.Helper()
	d := r.launch(append([]string{"forward", "box"}, args...)...)
	d.wait(" -> box ", 30*time.Second)
	return d
}

// launch starts a command of the operator's that keeps running.
func (r *road) launch(args ...string) *daemon {
	r.t.Helper()
	cmd := r.client(args...)
	return r.startCommand(cmd, "berth "+strings.Join(args, " "))
}

var servedLine = regexp.MustCompile(`(?m)^127\.0\.0\.1:(\d+)(?:/udp)? -> box port (\d+)(/udp)?\b`)

// at returns where a port of the agent is served here.
func (d *daemon) at(remote int, network string) string {
	d.t.Helper()
	for _, m := range servedLine.FindAllStringSubmatch(d.output(), -1) {
		if m[2] == strconv.Itoa(remote) && (m[3] == "/udp") == (network == "udp") {
			return "127.0.0.1:" + m[1]
		}
	}
	d.t.Fatalf("port %d/%s is not served:\n%s", remote, network, d.output())
	return ""
}

func portOf(addr string) int {
	_, port, _ := net.SplitHostPort(addr)
	n, _ := strconv.Atoi(port)
	return n
}

// freePort is a port that was free a moment ago for TCP and UDP.
func freePort(t *testing.T) int {
	t.Helper()
	for {
		port := portOf(freeAddr(t))
		if c, err := net.ListenPacket("udp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			c.Close()
			return port
		}
	}
}

// listening waits until something takes TCP connections.
func listening(t *testing.T, addr string) {
	t.Helper()
	eventually(t, 10*time.Second, "something listens at "+addr, func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// TestForwardPrograms: a web server, iperf3 and a name server in the workspace are used from here, over
// a direct path and over the relay.
func TestForwardPrograms(t *testing.T) {
	for _, way := range []struct {
		name, shows string
		flags       []string
	}{{"direct", "direct", nil}, {"relay", "relayed", []string{"--relay-only"}}} {
		t.Run(way.name, func(t *testing.T) {
			r := newRoad(t, oneBox, way.flags...)
			web, perf, dns := freePort(t), freePort(t), freePort(t)
			site := filepath.Join(r.home, "site")
			page := make([]byte, 3<<20)
			rand.Read(page)
			if err := errors.Join(os.Mkdir(site, 0o755), os.WriteFile(filepath.Join(site, "page"), page, 0o644)); err != nil {
				t.Fatal(err)
			}
			r.start("busybox", nil, "httpd", "-f", "-p", fmt.Sprintf("127.0.0.1:%d", web), "-h", site)
			r.start("iperf3", nil, "--server", "--bind", "127.0.0.1", "--port", strconv.Itoa(perf))
			r.start("dnsmasq", nil, "--no-daemon", "--conf-file=/dev/null", "--pid-file=", "--no-resolv", "--no-hosts", "--listen-address=127.0.0.1", "--bind-interfaces",
				"--port="+strconv.Itoa(dns), "--address=/box.example/192.0.2.7")
			r.run()
			r.waitConnected(20 * time.Second)
			eventually(t, 20*time.Second, "the path is "+way.name, func() bool {
				out, _ := r.client("ping", "box", "-c", "1").CombinedOutput()
				return strings.Contains(string(out), way.shows)
			})

			here := freePort(t) // iperf3 wants both networks on one number
			d := r.forward(fmt.Sprintf("0:%d", web), fmt.Sprintf("%d:%d", here, perf), fmt.Sprintf("%d:%d/udp", here, perf), fmt.Sprintf("0:%d/udp", dns), fmt.Sprintf("0:%d", dns))
			listening(t, fmt.Sprintf("127.0.0.1:%d", web))
			resp, err := http.Get("http://" + d.at(web, "tcp") + "/page")
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if got, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(got, page) {
				t.Errorf("the web server's page came as %d bytes, %v", len(got), err)
			}
			if out := r.must("busybox", "nslookup", "-type=a", "box.example", d.at(dns, "udp")); !strings.Contains(out, "192.0.2.7") {
				t.Errorf("the name server answers:\n%s", out)
			}
			var tcp, udp struct {
				End struct {
					Received struct {
						Bytes float64 `json:"bytes"`
						Bits  float64 `json:"bits_per_second"`
					} `json:"sum_received"`
					Sum struct {
						Packets float64 `json:"packets"`
						Lost    float64 `json:"lost_percent"`
					} `json:"sum"`
				} `json:"end"`
			}
			perform := func(into any, args ...string) {
				t.Helper()
				out := r.must("iperf3", append([]string{"--client", "127.0.0.1", "--port", strconv.Itoa(here), "--time", "1", "--json"}, args...)...)
				if err := json.Unmarshal([]byte(out), into); err != nil {
					t.Fatalf("%v:\n%s", err, out)
				}
			}
			perform(&tcp)
			t.Logf("iperf3 over TCP: %.0f Mbit/s", tcp.End.Received.Bits/1e6)
			if tcp.End.Received.Bytes == 0 {
				t.Error("iperf3 over TCP received nothing")
			}
			// 1200 bytes fit the mesh without being cut up; the rate is far below what it carries.
			perform(&udp, "--udp", "--bitrate", "5M", "--length", "1200")
			t.Logf("iperf3 over UDP: %.0f datagrams, %.2f %% lost", udp.End.Sum.Packets, udp.End.Sum.Lost)
			if udp.End.Sum.Packets < 100 || udp.End.Sum.Lost > 50 {
				t.Errorf("iperf3 over UDP: %.0f datagrams, %.2f %% lost", udp.End.Sum.Packets, udp.End.Sum.Lost)
			}
			if code := d.stop(os.Interrupt, 10*time.Second); code != 0 {
				t.Errorf("Ctrl-C: exit code %d", code)
			}
		})
	}
}

// service answers each connection to a loopback address with f.
func service(t *testing.T, addr string, f func(*net.TCPConn)) (port int) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				f(c.(*net.TCPConn))
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

// stuckService listens, and lets nobody connect: its queue is full and never emptied.
func stuckService(t *testing.T) (port int) {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	port = name.(*syscall.SockaddrInet4).Port
	for range 10 {
		c, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", port), 200*time.Millisecond)
		if err != nil {
			return port
		}
		t.Cleanup(func() { c.Close() })
	}
	t.Fatal("the queue of a listener without places took ten connections")
	return 0
}

// question sends a question to the end, and returns the answer.
func question(addr string) (string, error) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	io.WriteString(c, "question")
	c.(*net.TCPConn).CloseWrite()
	answer, err := io.ReadAll(c)
	return string(answer), err
}

// upper answers, in upper case, once the question has ended: it takes a connection that ends one way.
func upper(c *net.TCPConn) {
	all, _ := io.ReadAll(c)
	io.WriteString(c, strings.ToUpper(string(all)))
}

// TestForward: ranges, a service on ::1 only, the end of one direction, and what cannot be done.
func TestForward(t *testing.T) {
	r := newRoad(t, oneBox)
	r.run()
	r.waitConnected(20 * time.Second)
	six := service(t, "[::1]:0", upper)

	// Three services in a row, as a range.
	var first int
	eventually(t, 10*time.Second, "three free ports in a row", func() bool {
		first = freePort(t)
		var all []net.Listener
		defer func() {
			for _, l := range all {
				l.Close()
			}
		}()
		for i := range 3 {
			l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", first+i))
			if err != nil {
				return false
			}
			all = append(all, l)
		}
		return true
	})
	for i := range 3 {
		service(t, fmt.Sprintf("127.0.0.1:%d", first+i), func(c *net.TCPConn) { fmt.Fprintf(c, "number %d", i) })
	}
	closed := freePort(t)
	d := r.forward(fmt.Sprintf("0:%d-%d", first, first+2), fmt.Sprintf("0:%d", six), fmt.Sprintf("0:%d", closed))
	for i := range 3 {
		if got, err := question(d.at(first+i, "tcp")); err != nil || got != fmt.Sprintf("number %d", i) {
			t.Errorf("port %d of the range answers %q, %v", i, got, err)
		}
	}
	if got, err := question(d.at(six, "tcp")); err != nil || got != "QUESTION" {
		t.Errorf("the service on ::1 answers %q, %v", got, err)
	}
	for range 3 {
		if got, err := question(d.at(closed, "tcp")); err == nil {
			t.Errorf("a closed port answers %q", got)
		}
	}
	if n := strings.Count(d.output(), fmt.Sprintf("nothing listens on port %d of box", closed)); n != 1 {
		t.Errorf("a closed port is complained of %d times:\n%s", n, d.output())
	}
	// A service that takes no more connections is not an agent that is away.
	stuck := stuckService(t)
	busy := r.forward("--wait", "4s", fmt.Sprintf("0:%d", stuck))
	if got, err := question(busy.at(stuck, "tcp")); err == nil {
		t.Errorf("a service that hangs answers %q", got)
	}
	busy.wait(fmt.Sprintf("port %d of box takes no connections", stuck), 10*time.Second)
	if out := busy.output(); strings.Contains(out, "box does not answer") {
		t.Errorf("the agent is blamed for a service that hangs:\n%s", out)
	}
	out, err := r.client("forward", "box", fmt.Sprintf("%d:80", six+0), strings.TrimPrefix(d.at(six, "tcp"), "127.0.0.1:")).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "0:") {
		t.Errorf("a port that is taken: %v: %s", err, out)
	}
}

// TestForwardReconnects: the forward lives through its agent and its server being killed.
func TestForwardReconnects(t *testing.T) {
	r := newRoad(t, oneBox)
	r.run()
	r.waitConnected(20 * time.Second)
	port := service(t, "127.0.0.1:0", upper)
	waiting := service(t, "127.0.0.1:0", func(c *net.TCPConn) { io.WriteString(c, "!"); io.Copy(io.Discard, c) })
	d := r.forward("--wait", "20s", fmt.Sprintf("0:%d", port), fmt.Sprintf("0:%d", waiting))
	short := r.forward("--wait", "1s", fmt.Sprintf("0:%d", port))
	served := d.at(port, "tcp")
	works := func(when string) {
		t.Helper()
		if got, err := question(served); err != nil || got != "QUESTION" {
			t.Fatalf("%s: %q, %v", when, got, err)
		}
	}
	works("at first")

	r.server.cmd.Process.Kill()
	<-r.server.done
	works("without a server")
	r.serve()
	r.waitConnected(20 * time.Second)
	works("with the server back")

	idle, err := net.Dial("tcp", d.at(waiting, "tcp"))
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	if _, err := io.ReadFull(idle, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	r.agent.cmd.Process.Kill()
	<-r.agent.done
	start := time.Now()
	if got, err := question(short.at(port, "tcp")); !errors.Is(err, syscall.ECONNRESET) || time.Since(start) > 10*time.Second {
		t.Errorf("without an agent, after its second: %q, %v after %v", got, err, time.Since(start))
	}
	short.wait("cannot reach agent box", 10*time.Second)
	answered := make(chan error, 1)
	go func() {
		got, err := question(served)
		if err == nil && got != "QUESTION" {
			err = fmt.Errorf("it answers %q", got)
		}
		answered <- err
	}()
	d.wait("box does not answer", 15*time.Second)
	r.run()
	if err := <-answered; err != nil {
		t.Errorf("a connection that waited for the agent: %v", err)
	}
	works("with the agent back")
	d.wait("box answers again", 15*time.Second)
	short.wait("box answers again", 15*time.Second)
	if got, err := question(short.at(port, "tcp")); err != nil || got != "QUESTION" {
		t.Errorf("the impatient one: %q, %v", got, err)
	}
	// What waits on a connection of the dead process hears of it.
	idle.SetReadDeadline(time.Now().Add(15 * time.Second))
	if _, err := idle.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("an idle connection of the dead process: %v", err)
	}
}

// httpd is a web server in the workspace.
func (r *road) httpd(addr string) *daemon {
	return r.start("busybox", nil, "httpd", "-f", "-p", addr, "-h", r.home)
}

// TestForwardAuto: what begins to listen is forwarded, on the next port where it is taken here.
func TestForwardAuto(t *testing.T) {
	m := newMachine(t)
	m.isolate()
	r := newRoadOn(m, oneBox)
	r.run()
	r.waitConnected(20 * time.Second)
	if err := os.WriteFile(filepath.Join(r.home, "page"), []byte("the page\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	r.httpd("127.0.0.1:3000") // this machine is the workspace, so its port is taken here
	d := r.launch("forward", "box", "--auto", "--wait", "20s")
	d.wait("127.0.0.1:3001 -> box port 3000 (busybox); 3000 is taken here", 20*time.Second)
	// On ::1 the port is free on 127.0.0.1, but there it would lead to itself.
	six := r.httpd("[::1]:4000")
	d.wait("127.0.0.1:4001 -> box port 4000 (busybox); 4000 is taken here\n", 10*time.Second)
	out, err := r.client("forward", "box", "4000").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "to itself") || !strings.Contains(string(out), "0:4000") {
		t.Errorf("a port that leads to itself: %v: %s", err, out)
	}
	r.httpd("127.0.0.1:80")
	r.httpd("127.0.0.1:4002")
	d.wait("127.0.0.1:4003 -> box port 4002", 10*time.Second)
	for _, port := range []int{3001, 4001, 4003} {
		if out := r.must("busybox", "wget", "-qO-", fmt.Sprintf("http://127.0.0.1:%d/page", port)); out != "the page\n" {
			t.Errorf("port %d has %q", port, out)
		}
	}
	if out := d.output(); strings.Contains(out, "port 80") || strings.Contains(out, "port 3001") || strings.Count(out, " -> ") != 3 {
		t.Errorf("it forwards what it should not:\n%s", out)
	}

	// What appears while the agent is away is found when it is back.
	r.agent.cmd.Process.Kill()
	<-r.agent.done
	six.stop(syscall.SIGKILL, 5*time.Second)
	r.httpd("127.0.0.1:5000")
	r.run()
	d.wait("127.0.0.1:5001 -> box port 5000", 30*time.Second)
	if os.Getenv("BERTH_LONG") != "" { // a port may be gone for 10 s
		d.wait("127.0.0.1:4001 closed: nothing listens on port 4000 of box any more", 20*time.Second)
	}
	if out := r.must("busybox", "wget", "-qO-", "http://127.0.0.1:5001/page"); out != "the page\n" {
		t.Errorf("after the agent came back: %q", out)
	}
}
