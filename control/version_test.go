package control

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/coder/websocket"
	"storj.io/drpc"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/rpc"
	"github.com/berthd/berth/wire/tailnetpb"
)

// raw carries messages as the bytes that they are on the wire.
type raw struct{}

func (raw) Marshal(m drpc.Message) ([]byte, error) { return *m.(*[]byte), nil }
func (raw) Unmarshal(b []byte, m drpc.Message) error {
	*m.(*[]byte) = append([]byte(nil), b...)
	return nil
}

// tried calls a method with an empty request and returns the code and error of its first answer.
func (l *agentLink) tried(t *testing.T, method string) (uint64, error) {
	t.Helper()
	empty := []byte{}
	if method == wire.TailnetService+"Coordinate" {
		stream, err := l.NewStream(t.Context(), method, raw{})
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close()
		// Ask for nothing and leave: the answer is the end of the stream.
		leave := []byte{0x12, 0x00}
		if err := stream.MsgSend(&leave, raw{}); err != nil {
			t.Fatal(err)
		}
		var answer []byte
		err = stream.MsgRecv(&answer, raw{})
		return rpc.Code(err), err
	}
	stream, err := l.NewStream(t.Context(), method, raw{})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if err := stream.MsgSend(&empty, raw{}); err != nil {
		t.Fatal(err)
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	var answer []byte
	err = stream.MsgRecv(&answer, raw{})
	return rpc.Code(err), err
}

func registered() []string {
	var names []string
	for _, d := range []drpc.Description{agentpb.DRPCAgentDescription{}, tailnetpb.DRPCTailnetDescription{}} {
		for i := range d.NumMethods() {
			name, _, _, _, _ := d.Method(i)
			names = append(names, name)
		}
	}
	return names
}

// since is the protocol's table, written down a second time.
var since = map[string]int{
	"GetAnnouncementBanners": 1, "ScriptCompleted": 3, "GetResourcesMonitoringConfiguration": 4, "PushResourcesMonitoringUsage": 4,
	"ReportConnection": 4, "CreateSubAgent": 6, "DeleteSubAgent": 6, "ListSubAgents": 6, "ReportBoundaryLogs": 7, "UpdateAppStatus": 8,
	"PushContextState": 10, "WorkspaceUpdates": 3,
}

// TestMethodsOfVersions calls every method on a link of every version: what came later than the version
// answers code 12, and nothing else does.
func TestMethodsOfVersions(t *testing.T) {
	x := configured(t, Config{})
	_, token := x.declared("demo")
	for minor := range wire.CurrentVersion.Minor + 1 {
		link := x.link(fmt.Sprintf("/api/v2/workspaceagents/me/rpc?version=2.%d", minor), http.Header{wire.HeaderSessionToken: {token.Reveal()}})
		for _, method := range registered() {
			name := method[strings.LastIndex(method, "/")+1:]
			lacks := minor < since[name] || name == "RefreshResumeToken" || name == "WorkspaceUpdates" // the last two are for clients
			code, err := link.tried(t, method)
			if (code == wire.CodeUnimplemented) != lacks {
				t.Errorf("2.%d %s: code %d, %v", minor, name, code, err)
			}
			if lacks && !strings.HasSuffix(err.Error(), "Unimplemented") {
				t.Errorf("2.%d %s: %v", minor, name, err)
			}
		}
		for _, method := range []string{wire.AgentService + "OfLater", wire.TailnetService + "OfLater"} {
			if code, err := link.tried(t, method); code != wire.CodeUnimplemented || !strings.HasSuffix(err.Error(), "Unimplemented") {
				t.Errorf("2.%d: %s, a method of no version: code %d, %v", minor, method, code, err)
			}
		}
		if code, err := link.tried(t, "/coder.agent.v9.Agent/GetManifest"); code != 0 || !strings.Contains(err.Error(), "unknown rpc") {
			t.Errorf("2.%d: a service that there is not: code %d, %v", minor, code, err)
		}
	}
}

// TestClientMethodsOfVersions does the same for clients. A stock client dials 2.0 and calls what came in
// 2.2 and 2.3.
func TestClientMethodsOfVersions(t *testing.T) {
	x := serve(t, Config{})
	id, _ := x.create("demo")
	for _, path := range []string{"/api/v2/workspaceagents/" + id.String() + "/coordinate", "/api/v2/tailnet"} {
		for minor := range wire.CurrentVersion.Minor + 1 {
			link := x.link(fmt.Sprintf("%s?version=2.%d", path, minor), http.Header{wire.HeaderSessionToken: {x.key.Reveal()}})
			for _, method := range registered() {
				name := method[strings.LastIndex(method, "/")+1:]
				lacks := minor < since[name] || strings.HasPrefix(method, wire.AgentService)
				code, err := link.tried(t, method)
				if (code == wire.CodeUnimplemented) != lacks {
					t.Errorf("%s 2.%d %s: code %d, %v", path, minor, name, code, err)
				}
			}
		}
	}
}

// TestRequestedVersions asks each socket for what it refuses.
func TestRequestedVersions(t *testing.T) {
	x := serve(t, Config{})
	id, token := x.create("demo")
	const newer = `{"message":"Unknown or unsupported API version","validations":[{"field":"version","detail":"server is at version 2.10, behind requested %s version %s"}]}`
	for _, socket := range []struct {
		path   string
		header []string
	}{
		{"/api/v2/workspaceagents/me/rpc", as(token)},
		{"/api/v2/workspaceagents/" + id.String() + "/coordinate", x.asUser()},
		{"/api/v2/tailnet", x.asUser()},
	} {
		for version, want := range map[string]string{
			"x": "invalid version string: x", "2": "invalid version string: 2", "2.0.1": "invalid version string: 2.0.1",
			"a.0": "invalid major version: a", "2.b": "invalid minor version: b", "2.": "invalid minor version: ",
			"1.0": "version 1.0 is no longer supported", "0.9": "version 0.9 is no longer supported",
			"2.11": fmt.Sprintf(newer, "minor", "2.11"), "3.0": fmt.Sprintf(newer, "major", "3.0"),
		} {
			if !strings.HasPrefix(want, "{") {
				want = fmt.Sprintf(`{"message":"Unknown or unsupported API version","validations":[{"field":"version","detail":%q}]}`, want)
			}
			if status, body := x.call("GET", socket.path+"?version="+version, "", socket.header...); status != http.StatusBadRequest || body != want+"\n" {
				t.Errorf("%s %q: %d %s", socket.path, version, status, body)
			}
		}
	}
}

// TestSocketsRefuse: a text message has no place in a stream of bytes, and what is no session is
// ended, each with its own code. Another link does not notice.
func TestSocketsRefuse(t *testing.T) {
	x := serve(t, Config{})
	id, token := x.create("demo")
	_, bystander := x.create("bystander")
	other := x.connect(bystander)
	for path, key := range map[string]wire.Secret{
		"/api/v2/workspaceagents/me/rpc?version=2.10":                        token,
		"/api/v2/workspaceagents/" + id.String() + "/coordinate?version=2.0": x.key,
		"/api/v2/tailnet": x.key,
	} {
		for name, tt := range map[string]struct {
			kind websocket.MessageType
			text string
			code websocket.StatusCode
		}{
			"text":    {websocket.MessageText, "hello", websocket.StatusUnsupportedData},
			"garbage": {websocket.MessageBinary, "GET / HTTP/1.1\r\n\r\n", websocket.StatusInternalError},
			"window":  {websocket.MessageBinary, "\x00\x00\x00\x01\x00\x00\x00\x01\x7f\xff\xff\xff", websocket.StatusInternalError},
		} {
			conn, _, err := websocket.Dial(t.Context(), x.url+path, &websocket.DialOptions{HTTPClient: x.http, HTTPHeader: http.Header{wire.HeaderSessionToken: {key.Reveal()}}})
			if err != nil {
				t.Fatal(err)
			}
			if err := conn.Write(t.Context(), tt.kind, []byte(tt.text)); err != nil {
				t.Fatal(err)
			}
			for err == nil {
				_, _, err = conn.Read(t.Context())
			}
			if got := websocket.CloseStatus(err); got != tt.code {
				t.Errorf("%s: %s: closed with %d, want %d: %v", path, name, got, tt.code, err)
			}
			conn.CloseNow()
		}
	}
	if _, err := other.agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{}); err != nil {
		t.Errorf("another link: %v", err)
	}
}
