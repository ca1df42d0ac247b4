package main

import (
	"context"
	"errors"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/berthd/berth/tailnet"
	"github.com/berthd/berth/wire"
)

func TestParseSpec(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want spec
	}{
		{"8080", spec{"tcp", "127.0.0.1", 8080, 8080, 1}},
		{"8080/tcp", spec{"tcp", "127.0.0.1", 8080, 8080, 1}},
		{"53/udp", spec{"udp", "127.0.0.1", 53, 53, 1}},
		{"9000:8080", spec{"tcp", "127.0.0.1", 9000, 8080, 1}},
		{"0:8080", spec{"tcp", "127.0.0.1", 0, 8080, 1}},
		{"0:8000-8010", spec{"tcp", "127.0.0.1", 0, 8000, 11}},
		{"8000-8010", spec{"tcp", "127.0.0.1", 8000, 8000, 11}},
		{"8000-8000", spec{"tcp", "127.0.0.1", 8000, 8000, 1}},
		{"9000-9010:8000-8010", spec{"tcp", "127.0.0.1", 9000, 8000, 11}},
		{"5353:53/udp", spec{"udp", "127.0.0.1", 5353, 53, 1}},
		{"0.0.0.0:9000:8080", spec{"tcp", "0.0.0.0", 9000, 8080, 1}},
		{"[::1]:9000-9001:8080-8081/udp", spec{"udp", "::1", 9000, 8080, 2}},
		{"localhost:9000:8080", spec{"tcp", "localhost", 9000, 8080, 1}},
		{"65535", spec{"tcp", "127.0.0.1", 65535, 65535, 1}},
	} {
		if got, err := parseSpec(tt.in); err != nil || got != tt.want {
			t.Errorf("%q gives %+v, %v; want %+v", tt.in, got, err, tt.want)
		}
	}
	for in, why := range map[string]string{
		"": "port", "0": "port", "http": "port", ":8080": "LOCAL", "8080:": "port", "70000": "port", ":9000:8080": "HOST", "a:b:8080": "port",
		"::1:9000:8080": "HOST", "8010-8000": "port", "8000-": "port", "-8000": "port", "0-10": "port", "0-10:8000-8010": "port",
		"9000:8000-8010": "11", "9000-9002:8000-8001": "3 ports", "8080/sctp": "tcp or udp", "8080/": "tcp or udp", "53/udp/udp": "tcp or udp", "+80": "port",
	} {
		if got, err := parseSpec(in); err == nil || !strings.Contains(err.Error(), why) || !strings.Contains(err.Error(), "5353:53/udp") {
			t.Errorf("%q gives %+v, %v; want an error with %q and examples", in, got, err, why)
		}
	}
}

func FuzzParseSpec(f *testing.F) {
	for _, s := range []string{"0.0.0.0:9000:8080", "[::1]:0:1", "8000-8010", "9000-9010:8000-8010", "53/udp", "5353:53/udp", "1-65535", "0:1-65535/udp", "a:-:1", "65535-65535"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := parseSpec(s)
		if err != nil {
			return
		}
		last := got.at(got.count - 1)
		if got.count < 1 || got.remote == 0 || got.host == "" || int(got.remote)+got.count-1 > 0xffff || int(got.local)+got.count-1 > 0xffff && got.local != 0 ||
			last.remote < got.remote || last.local < got.local || got.network != networkTCP && got.network != networkUDP {
			t.Errorf("%q gives %+v", s, got)
		}
	})
}

// free returns a TCP port of 127.0.0.1 that was free a moment ago, with as many above it.
func free(t *testing.T, above int) uint16 {
	t.Helper()
	for range 100 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		l.Close()
		if all, err := listenAll("demo", []spec{{networkTCP, "127.0.0.1", uint16(port), 1, above + 1}}); port+above <= 0xffff && err == nil {
			closeAll(all)
			return uint16(port)
		}
	}
	t.Fatal("no free ports in a row")
	return 0
}

func TestListenAll(t *testing.T) {
	first := free(t, 2)
	taken, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(first)+1)))
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	row := spec{networkTCP, "127.0.0.1", first, 8000, 3}
	_, err = listenAll("demo", []spec{row})
	if err == nil || !strings.Contains(err.Error(), "port 8001 of demo") || !strings.Contains(err.Error(), "0:8001") {
		t.Errorf("with a port of the range taken: %v", err)
	}
	taken.Close()
	// The first was given back when the second could not be had.
	udp := spec{networkUDP, "127.0.0.1", 0, 53, 2}
	all, err := listenAll("demo", []spec{row, udp})
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(all)
	lines := describe([]spec{row, udp}, all, "demo")
	if len(lines) != 3 || lines[0] != "127.0.0.1:"+strconv.Itoa(int(first))+"-"+strconv.Itoa(int(first)+2)+" -> demo ports 8000-8002" ||
		!strings.HasSuffix(lines[1], "/udp -> demo port 53/udp") || !strings.HasSuffix(lines[2], "/udp -> demo port 54/udp") {
		t.Errorf("it says %q", lines)
	}
	if _, err := listenAll("demo", []spec{{networkTCP, "192.0.2.1", 8000, 8000, 1}}); err == nil || !strings.Contains(err.Error(), "leave HOST out") {
		t.Errorf("on an address of another machine: %v", err)
	}
}

func TestAutoPorts(t *testing.T) {
	tcp := func(port uint16, process string, addresses ...string) wire.ListeningPort {
		return wire.ListeningPort{Network: "tcp", Port: port, ProcessName: process, Addresses: addresses}
	}
	got := autoPorts([]wire.ListeningPort{
		tcp(3000, "node", "127.0.0.1"),
		tcp(3001, "vite", "::1"),
		tcp(3002, "go", "0.0.0.0", "::"),
		tcp(3003, "stock"),                 // stock agents tell no address
		tcp(3004, "asked for", "0.0.0.0"),  // by number
		tcp(3005, "elsewhere", "10.0.0.1"), // loopback does not lead there
		tcp(53530, "resolved", "127.0.0.53"),
		tcp(80, "nginx", "0.0.0.0"),
		tcp(3006, "berth", "127.0.0.1"),
		tcp(3007, "berthd", "127.0.0.1"),
		{Network: "tcp", Port: 3008, Addresses: []string{"0.0.0.0"}, Namespace: 4026531840, Container: "db"},
		{Network: "tcp", Port: 3009, Addresses: []string{"127.0.0.1"}, Hidden: "VS Code"},
		{Network: "udp", Port: 5353, Addresses: []string{"0.0.0.0"}},
	}, map[uint16]bool{3004: true})
	if diff := cmp.Diff([]uint16{3000, 3001, 3002, 3003}, slices.Sorted(maps.Keys(got))); diff != "" {
		t.Error(diff)
	}
}

// A port that comes is forwarded, on the next port if it is taken here; one that goes is given up
// after a while, and found in its place if it comes back before.
func TestAutoForwarder(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	out, errOut := create(t, t.TempDir()+"/out"), create(t, t.TempDir()+"/err")
	p := &program{out: out, errOut: errOut}
	a := newAutoForwarder(newForwarder(p, &mesh{agent: wire.AgentSummary{Name: "demo"}}, time.Second), nil, false)
	port := free(t, 1)
	taken, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port))))
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	list := []wire.ListeningPort{{Network: "tcp", Port: port, ProcessName: "no\x1bde"}}
	start := time.Now()
	a.update(ctx, list, start)
	e := a.active[port]
	if e == nil || e.localPort() != port+1 {
		t.Fatalf("%d is taken, and got %+v; want the next", port, e)
	}
	a.update(ctx, nil, start)
	a.expire(start.Add(autoGrace - 1))
	a.update(ctx, list, start.Add(autoGrace-1))
	a.expire(start.Add(2 * autoGrace))
	if a.active[port] != e {
		t.Error("a port that came back in time is not where it was")
	}
	a.update(ctx, nil, start)
	a.expire(start.Add(autoGrace))
	if len(a.active) != 0 {
		t.Error("a port that is gone is still forwarded")
	}
	if c, err := net.Dial("tcp", e.served.String()); err == nil {
		c.Close()
		t.Error("it still listens")
	}
	want := e.describe("demo") + ` (no\x1bde); ` + strconv.Itoa(int(port)) + " is taken here\n" +
		e.served.String() + " closed: nothing listens on port " + strconv.Itoa(int(port)) + " of demo any more\n"
	if diff := cmp.Diff(want, readFile(t, out.Name())); diff != "" {
		t.Error(diff)
	}

	var many []wire.ListeningPort
	for i := range maxAuto + 50 {
		many = append(many, wire.ListeningPort{Network: "tcp", Port: uint16(20000 + i)})
	}
	a.update(ctx, many, start)
	a.update(ctx, many, start)
	defer func() {
		for _, e := range a.active {
			e.Close()
		}
		a.work.Wait()
	}()
	if said := readFile(t, errOut.Name()); len(a.active) != maxAuto || strings.Count(said, "no more") != 1 {
		t.Errorf("%d of %d ports are forwarded; it says %q", len(a.active), len(many), said)
	}
}

// Where the workspace is this machine, what is served here is listed as well. It is not forwarded in
// turn, also if nothing tells whose it is.
func TestAutoForwarderAtHome(t *testing.T) {
	p := &program{out: create(t, t.TempDir()+"/out"), errOut: create(t, t.TempDir()+"/err")}
	named, err := listenAll("demo", []spec{{networkTCP, "127.0.0.1", 0, 2000, 1}})
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(named)
	a := newAutoForwarder(newForwarder(p, &mesh{agent: wire.AgentSummary{Name: "demo"}}, time.Second), named, true)
	defer func() {
		for _, e := range a.active {
			e.Close()
		}
		a.work.Wait()
	}()
	service := free(t, 1)
	list := []wire.ListeningPort{{Network: "tcp", Port: service}, {Network: "tcp", Port: 2000}, {Network: "tcp", Port: named[0].localPort()}}
	for range 3 {
		a.update(t.Context(), list, time.Now())
		for _, e := range a.active {
			list = append(list, wire.ListeningPort{Network: "tcp", Port: e.localPort()})
		}
	}
	if diff := cmp.Diff([]uint16{service}, slices.Sorted(maps.Keys(a.active))); diff != "" {
		t.Errorf("it forwards others than the service: %s", diff)
	}
}

// Datagrams that are too long are lost, which is said once and not once for each length.
func TestLongDatagrams(t *testing.T) {
	errOut := create(t, t.TempDir()+"/err")
	f := newForwarder(&program{errOut: errOut}, &mesh{}, time.Second)
	e, err := listen(spec{networkUDP, "127.0.0.1", 0, 53, 1})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- f.serve(t.Context(), e) }()
	c, err := net.Dial("udp", e.served.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// One that is short follows on the same way, so all were looked at when it arrives.
	far, service := net.Pipe()
	defer far.Close()
	f.flows.add(&flow{key: flowKey{e.udp, netip.MustParseAddrPort(c.LocalAddr().String())}, far: far})
	for i := range 5 {
		if _, err := c.Write(make([]byte, tailnet.MaxDatagram+1+i)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := io.WriteString(c, "short"); err != nil {
		t.Fatal(err)
	}
	service.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.ReadFull(service, make([]byte, len("short"))); err != nil {
		t.Fatal(err)
	}
	e.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if got := readFile(t, errOut.Name()); strings.Count(got, "\n") != 1 || !strings.Contains(got, "port 53/udp that was too long") {
		t.Errorf("it says %q", got)
	}
}

func TestComplainOnce(t *testing.T) {
	errOut := create(t, t.TempDir()+"/err")
	f := newForwarder(&program{errOut: errOut}, &mesh{}, time.Second)
	for range 100 {
		f.complain("port %d is\nclosed", 1)
	}
	f.complain("port %d is\nclosed", 2)
	if got := readFile(t, errOut.Name()); got != "berth: port 1 is\\nclosed\nberth: port 2 is\\nclosed\n" {
		t.Errorf("it says %q", got)
	}
}

// tcpPair returns both ends of a TCP connection.
func tcpPair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dialled, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dialled.Close(); accepted.Close() })
	return dialled.(*net.TCPConn), accepted.(*net.TCPConn)
}

func TestSplice(t *testing.T) {
	person, near := tcpPair(t)
	far, service := tcpPair(t)
	done := make(chan struct{})
	go func() { splice(near, far); close(done) }()

	t.Run("one direction ends by itself", func(t *testing.T) {
		io.WriteString(person, "question")
		person.CloseWrite()
		if got, err := io.ReadAll(service); err != nil || string(got) != "question" {
			t.Fatalf("the service reads %q, %v", got, err)
		}
		io.WriteString(service, "answer")
		service.CloseWrite()
		if got, err := io.ReadAll(person); err != nil || string(got) != "answer" {
			t.Fatalf("the person reads %q, %v", got, err)
		}
		<-done
	})
	t.Run("a failure is passed on as one", func(t *testing.T) {
		person, near := tcpPair(t)
		far, service := tcpPair(t)
		done := make(chan struct{})
		go func() { splice(near, far); close(done) }()
		io.WriteString(service, "half an answ")
		if _, err := io.ReadFull(person, make([]byte, 12)); err != nil {
			t.Fatal(err)
		}
		breakOff(service)
		if _, err := io.ReadAll(person); err == nil {
			t.Error("the person takes a broken connection for one that ended")
		}
		<-done
	})
}

func TestFlowTable(t *testing.T) {
	table := newFlowTable()
	far := func() net.Conn { a, _ := net.Pipe(); return a }
	key := func(i int) flowKey {
		return flowKey{from: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(i+1))}
	}
	for i := range maxFlows {
		table.add(&flow{key: key(i), far: far()})
	}
	table.touch(key(0)) // so that the second is the one silent for longest
	second := table.touch(key(1))
	second.last = second.last.Add(-time.Hour)
	table.add(&flow{key: key(maxFlows), far: far()})
	if len(table.flows) != maxFlows || table.touch(key(1)) != nil || table.touch(key(0)) == nil || table.touch(key(maxFlows)) == nil {
		t.Error("a new flow did not take the place of the one silent for longest")
	}
	if _, err := second.far.Read(make([]byte, 1)); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("the flow that gave way is open: %v", err)
	}
	// One that was replaced must not take its successor along.
	old := table.touch(key(2))
	table.remove(old)
	table.add(&flow{key: key(2), far: far()})
	table.remove(old)
	if table.touch(key(2)) == nil {
		t.Error("a flow ended with its predecessor")
	}
	for _, w := range maps.Clone(table.flows) {
		table.remove(w)
	}
}
