package wire

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
)

func TestAgentAddr(t *testing.T) {
	id := uuid.MustParse("01020304-0506-0708-090a-0b0c0d0e0f10")
	if got, want := AgentAddr(id), netip.MustParseAddr("fd7a:115c:a1e0:708:90a:b0c:d0e:f10"); got != want {
		t.Errorf("AgentAddr = %v, want %v", got, want)
	}
	want := []netip.Prefix{
		netip.MustParsePrefix("fd7a:115c:a1e0:708:90a:b0c:d0e:f10/128"),
		netip.MustParsePrefix("fd60:627a:a42b:708:90a:b0c:d0e:f10/128"),
	}
	if diff := cmp.Diff(want, AgentPrefixes(id), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Errorf("AgentPrefixes (-want +got):\n%s", diff)
	}
	if a := RandomAddr(); !PrimaryPrefix.Contains(a) {
		t.Errorf("RandomAddr = %v, outside %v", a, PrimaryPrefix)
	}
}

func TestSecretNeverPrints(t *testing.T) {
	s := Secret("hunter2")
	body, err := json.Marshal(map[string]any{"token": s})
	if err != nil {
		t.Fatal(err)
	}
	for _, out := range []string{
		s.String(), fmt.Sprint(s), fmt.Sprintf("%v %+v %#v %s %q", s, s, s, s, s),
		fmt.Sprintf("%+v", struct{ Token Secret }{s}), string(body), s.LogValue().String(),
	} {
		if strings.Contains(out, "hunter2") {
			t.Errorf("secret printed: %s", out)
		}
	}
	if s.Reveal() != "hunter2" {
		t.Error("Reveal does not")
	}
}

func TestVersion(t *testing.T) {
	for _, tt := range []struct{ in, err string }{
		{"2.0", ""},
		{"2.10", ""},
		{"2.11", "server is at version 2.10, behind requested minor version 2.11"},
		{"3.0", "server is at version 2.10, behind requested major version 3.0"},
		{"1.0", "version 1.0 is no longer supported"},
		{"2", "invalid version string: 2"},
		{"2.10.1", "invalid version string: 2.10.1"},
		{"x.1", "invalid major version: x"},
		{"2.x", "invalid minor version: x"},
		{"2.-1", "invalid minor version: -1"},
	} {
		v, err := ParseVersion(tt.in)
		if err == nil {
			err = v.Accept()
		}
		if got := fmt.Sprint(err); got != tt.err && (err != nil || tt.err != "") {
			t.Errorf("%q: error %q, want %q", tt.in, got, tt.err)
		}
	}
	if v, ok := ServerVersion("server is at version 2.6, behind requested minor version 2.10"); !ok || v != (Version{2, 6}) {
		t.Errorf("ServerVersion = %v, %v", v, ok)
	}
	for _, detail := range []string{"", "server is at version 2.6", "server is at version 3.0, behind requested major version 4"} {
		if v, ok := ServerVersion(detail); ok {
			t.Errorf("ServerVersion(%q) = %v", detail, v)
		}
	}
}

// writes records each Write apart.
type writes [][]byte

func (w *writes) Write(p []byte) (int, error) {
	*w = append(*w, bytes.Clone(p))
	return len(p), nil
}

func TestPTYInit(t *testing.T) {
	init := PTYInit{ID: uuid.MustParse("01020304-0506-0708-090a-0b0c0d0e0f10"), Height: 24, Width: 80, Command: "vim"}
	var w writes
	if err := WritePTYInit(&w, init); err != nil {
		t.Fatal(err)
	}
	if len(w) != 1 {
		t.Errorf("frame sent in %d writes, want 1", len(w))
	}
	want := `{"ID":"01020304-0506-0708-090a-0b0c0d0e0f10","Height":24,"Width":80,"Command":"vim"}`
	if got := string(w[0][2:]); got != want || int(w[0][0])|int(w[0][1])<<8 != len(want) {
		t.Errorf("frame %q", w[0])
	}
	r := bytes.NewReader(append(w[0], "rest"...))
	got, err := ReadPTYInit(r)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(init, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if rest, _ := io.ReadAll(r); string(rest) != "rest" {
		t.Errorf("left %q on the stream", rest)
	}
}

func TestPTYRequests(t *testing.T) {
	r := NewPTYRequestReader(strings.NewReader(`{"data":"ls\n"}{"height":5,"width":7}` + "\n" + `{}`))
	var got []PTYRequest
	for {
		req, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, req)
	}
	want := []PTYRequest{{Data: "ls\n"}, {Height: 5, Width: 7}, {}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	endless := io.MultiReader(strings.NewReader(`{"data":"`), repeat('x'))
	if _, err := NewPTYRequestReader(endless).Next(); err == nil || !strings.Contains(err.Error(), "exceeds") {
		t.Errorf("endless request: %v", err)
	}
}

type repeat byte

func (b repeat) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(b)
	}
	return len(p), nil
}

func TestDERPMapBothWays(t *testing.T) {
	m := &DERPMap{
		HomeParams: &DERPHomeParams{RegionScore: map[int64]float64{999: 1.5}},
		Regions: map[int64]*DERPRegion{999: {
			EmbeddedRelay: true, RegionID: 999, RegionCode: "berth", RegionName: "Berth relay", Avoid: true,
			Nodes: []*DERPNode{{
				Name: "999b", RegionID: 999, HostName: "h", CertName: "c", IPv4: "127.0.0.1", IPv6: "none", STUNPort: -1,
				STUNOnly: true, DERPPort: 8080, InsecureForTests: true, ForceHTTP: true, STUNTestIP: "x", CanPort80: true,
			}},
		}},
	}
	if diff := cmp.Diff(m, DERPMapFromProto(m.Proto())); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	body, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{`"EmbeddedRelay":true`, `"STUNPort":-1`, `"ForceHTTP":true`, `"RegionScore":{"999":1.5}`} {
		if !strings.Contains(string(body), key) {
			t.Errorf("JSON lacks %s: %s", key, body)
		}
	}
	empty := (&DERPMap{}).Proto()
	if empty.HomeParams == nil {
		t.Error("home_params absent: a stock agent crashes on that")
	}
	if _, err := proto.Marshal(empty); err != nil {
		t.Error(err)
	}
}

func FuzzReadPTYInit(f *testing.F) {
	f.Add([]byte("\x02\x00{}"))
	f.Add([]byte("\x10\x00{"))
	f.Add(append([]byte{0x2f, 0}, `{"ID":"01020304-0506-0708-090a-0b0c0d0e0f10"}  `...))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := ReadPTYInit(bytes.NewReader(data))
		if err != nil {
			return
		}
		var out bytes.Buffer
		if err := WritePTYInit(&out, p); err != nil {
			t.Skip("too long once escaped")
		}
		again, err := ReadPTYInit(&out)
		if err != nil || again != p {
			t.Errorf("%+v came back as %+v, %v", p, again, err)
		}
	})
}

func FuzzPTYRequests(f *testing.F) {
	f.Add([]byte(`{"data":"a"}{"height":1,"width":2}`))
	f.Add([]byte(`{"data":`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r := NewPTYRequestReader(bytes.NewReader(data))
		for range len(data) + 1 {
			if _, err := r.Next(); err != nil {
				return
			}
		}
		t.Errorf("more requests than bytes in %q", data)
	})
}

func TestIdentityProofMessage(t *testing.T) {
	// echo -n payload | sha256sum
	const want = "berth-identity-proof-v1\nazure\nchal\n239f59ed55e737c77147cf55ad0c1b030b6d7ee748a7426952f9b852d5a935e5\n"
	if got := string(IdentityProofMessage(ProviderAzure, "chal", "payload")); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestPTYEnding(t *testing.T) {
	long := strings.Repeat("\x01\"é", 4<<10)
	sentence := strings.Repeat("<sentence> ", 36) // longer than any of ours, and some of it takes six bytes in JSON
	for _, want := range []PTYEnding{{}, {Code: 7}, {Code: 137, Signal: "KILL", Reason: "it was closed on request"}, {Code: 255, Reason: sentence}, {Reason: long}} {
		stream := AppendPTYEnding([]byte("last words\x1b_berth-ending;"), want)
		if n := len(stream) - len("last words\x1b_berth-ending;"); n > MaxPTYEnding {
			t.Errorf("an ending of %d bytes, at most %d are promised", n, MaxPTYEnding)
		}
		rest, got, ok := CutPTYEnding(stream)
		if want.Reason == long {
			want.Reason = got.Reason
			if !strings.HasPrefix(long, got.Reason) || got.Reason == "" {
				t.Errorf("the reason became %q", got.Reason)
			}
		}
		if !ok || string(rest) != "last words\x1b_berth-ending;" || got != want {
			t.Errorf("%+v came back as %+v, %v, after %q", want, got, ok, rest)
		}
	}
	for _, cut := range []string{"", "text", "\x1b_berth-ending;", "\x1b_berth-ending;{}", "\x1b_berth-ending;{\x1b\\", "\x1b_berth-ending;{}\x1b\\\n"} {
		if rest, _, ok := CutPTYEnding([]byte(cut)); ok || string(rest) != cut {
			t.Errorf("%q was taken for an ending", cut)
		}
	}
}
