package wire_test

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/berthd/berth/internal/golden"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/tailnetpb"
)

// run returns n bytes that count up, as the ids and keys of the golden files do.
func run(from byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = from + byte(i)
	}
	return b
}

var (
	goldenAgent  = run(0x10, 16)
	goldenClient = run(0xa0, 16)
	goldenTime   = &timestamppb.Timestamp{Seconds: 1700000000}
)

// goldenNode is the agent's, as this program would publish it.
func goldenNode() *tailnetpb.Node {
	var prefixes []string
	for _, p := range wire.AgentPrefixes(uuid.UUID(goldenAgent)) {
		prefixes = append(prefixes, p.String())
	}
	return &tailnetpb.Node{
		Id: 0x18191a1b1c1d1e1f, AsOf: goldenTime, Key: append([]byte(wire.NodeKeyPrefix), run(0x40, 32)...),
		Disco: "discokey:" + strings.Repeat("0123456789abcdef", 4), PreferredDerp: 999, DerpLatency: map[string]float64{"999-v4": 0.25},
		Addresses: prefixes, AllowedIps: prefixes, Endpoints: []string{"192.0.2.1:41641", "[2001:db8::1]:41641"},
	}
}

type (
	request  = tailnetpb.CoordinateRequest
	response = tailnetpb.CoordinateResponse
	update   = tailnetpb.CoordinateResponse_PeerUpdate
)

func TestGoldenMessages(t *testing.T) {
	ready := func(ids ...[]byte) []*tailnetpb.CoordinateRequest_ReadyForHandshake {
		var list []*tailnetpb.CoordinateRequest_ReadyForHandshake
		for _, id := range ids {
			list = append(list, &tailnetpb.CoordinateRequest_ReadyForHandshake{Id: id})
		}
		return list
	}
	relays := wire.DERPMap{Regions: map[int64]*wire.DERPRegion{999: {
		EmbeddedRelay: true, RegionID: 999, RegionCode: "berth", RegionName: "Berth Embedded Relay",
		Nodes: []*wire.DERPNode{{Name: "999b", RegionID: 999, HostName: "berth.example.com", STUNPort: -1, DERPPort: 8443, ForceHTTP: true}},
	}}}
	reason := "network_error"
	for name, m := range map[string]proto.Message{
		"coordinate-update-self":         &request{UpdateSelf: &tailnetpb.CoordinateRequest_UpdateSelf{Node: goldenNode()}},
		"coordinate-add-tunnel":          &request{AddTunnel: &tailnetpb.CoordinateRequest_Tunnel{Id: goldenAgent}},
		"coordinate-remove-tunnel":       &request{RemoveTunnel: &tailnetpb.CoordinateRequest_Tunnel{Id: goldenAgent}},
		"coordinate-disconnect":          &request{Disconnect: &tailnetpb.CoordinateRequest_Disconnect{}},
		"coordinate-ready":               &request{ReadyForHandshake: ready(goldenClient, goldenAgent)},
		"coordinate-node":                &response{PeerUpdates: []*update{{Id: goldenAgent, Node: goldenNode(), Kind: tailnetpb.CoordinateResponse_PeerUpdate_NODE, Reason: "node update"}}},
		"coordinate-ready-for-handshake": &response{PeerUpdates: []*update{{Id: goldenAgent, Kind: tailnetpb.CoordinateResponse_PeerUpdate_READY_FOR_HANDSHAKE}}},
		"coordinate-lost-and-gone": &response{PeerUpdates: []*update{
			{Id: goldenAgent, Kind: tailnetpb.CoordinateResponse_PeerUpdate_LOST, Reason: "lost"},
			{Id: goldenClient, Kind: tailnetpb.CoordinateResponse_PeerUpdate_DISCONNECTED, Reason: "graceful disconnect"},
		}},
		"coordinate-error": &response{Error: "authorization: agents cannot open tunnels"},
		"derp-map":         relays.Proto(),
		"resume-token": &tailnetpb.RefreshResumeTokenResponse{
			Token: "a.b.c", RefreshIn: durationpb.New(wire.ResumeRefresh), ExpiresAt: timestamppb.New(goldenTime.AsTime().Add(wire.ResumeLifetime)),
		},
		"startup": &agentpb.UpdateStartupRequest{Startup: &agentpb.Startup{
			Version: "v1.2.3", ExpandedDirectory: "/home/user", Subsystems: []agentpb.Startup_Subsystem{agentpb.Startup_ENVBOX, agentpb.Startup_EXECTRACE},
		}},
		"lifecycle": &agentpb.UpdateLifecycleRequest{Lifecycle: &agentpb.Lifecycle{
			State: agentpb.Lifecycle_READY, ChangedAt: &timestamppb.Timestamp{Seconds: 1700000000, Nanos: 500_000_000},
		}},
		"stats-interval": &agentpb.UpdateStatsResponse{ReportInterval: durationpb.New(wire.StatsInterval)},
		"metadata-description": &agentpb.WorkspaceAgentMetadata_Description{
			DisplayName: "Load", Key: "load", Script: "uptime", Interval: durationpb.New(10 * time.Nanosecond), Timeout: durationpb.New(3 * time.Nanosecond),
		},
		"metadata": &agentpb.BatchUpdateMetadataRequest{Metadata: []*agentpb.Metadata{{Key: "load", Result: &agentpb.WorkspaceAgentMetadata_Result{
			CollectedAt: goldenTime, Age: 1, Value: "0.42", Error: "run cmd: exit status 1",
		}}}},
		"logs": &agentpb.BatchCreateLogsRequest{LogSourceId: goldenAgent, Logs: []*agentpb.Log{
			{CreatedAt: goldenTime, Output: "hello", Level: agentpb.Log_INFO}, {CreatedAt: &timestamppb.Timestamp{Seconds: 1700000001}, Output: "bye"},
		}},
		"logs-numbered": &agentpb.BatchCreateLogsRequest{
			LogSourceId: goldenAgent, Logs: []*agentpb.Log{{CreatedAt: goldenTime, Output: "hello", Level: agentpb.Log_INFO}},
			BerthSpoolId: goldenClient, BerthFirstSequence: 300,
		},
		"connection": &agentpb.ReportConnectionRequest{Connection: &agentpb.Connection{
			Id: goldenClient, Action: agentpb.Connection_DISCONNECT, Type: agentpb.Connection_RECONNECTING_PTY, Timestamp: goldenTime,
			Ip: "192.0.2.7", StatusCode: 1, Reason: &reason,
		}},
	} {
		t.Run(name, func(t *testing.T) {
			want := golden.Bytes(t, "proto-"+name)
			got, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("we write\n%x, and it is\n%x", got, want)
			}
			read := m.ProtoReflect().New().Interface()
			if err := proto.Unmarshal(want, read); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(m, read, protocmp.Transform()); diff != "" {
				t.Errorf("we read something else (-want +got):\n%s", diff)
			}
		})
	}
}

func TestGoldenPTY(t *testing.T) {
	id := uuid.UUID(goldenAgent)
	for name, p := range map[string]wire.PTYInit{
		"pty-init":       {ID: id, Height: 24, Width: 80, Command: "bash -l", Container: "c1", ContainerUser: "dev", BackendType: "screen"},
		"pty-init-short": {ID: id, Height: 50, Width: 200},
	} {
		want := golden.Bytes(t, name)
		var out oneWrite
		if err := wire.WritePTYInit(&out, p); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out.Bytes(), want) || out.writes != 1 {
			t.Errorf("%s: in %d writes we write\n%s, and it is\n%s", name, out.writes, out.Bytes(), want)
		}
		rest := bytes.NewReader(append(want, "more"...))
		if got, err := wire.ReadPTYInit(rest); err != nil || got != p || rest.Len() != 4 {
			t.Errorf("%s: we read %+v, %v and leave %d bytes", name, got, err, rest.Len())
		}
	}
	r := wire.NewPTYRequestReader(bytes.NewReader(golden.Bytes(t, "pty-requests")))
	for _, want := range []wire.PTYRequest{{Data: "ls\r"}, {Height: 50, Width: 200}, {Data: "\x03", Height: 24, Width: 80}} {
		if got, err := r.Next(); err != nil || got != want {
			t.Errorf("we read %+v, %v; want %+v", got, err, want)
		}
	}
	if _, err := r.Next(); err != io.EOF {
		t.Errorf("at the end: %v", err)
	}
}

// oneWrite counts writes: a stock agent reads the frame with a single read.
type oneWrite struct {
	bytes.Buffer
	writes int
}

func (w *oneWrite) Write(p []byte) (int, error) {
	w.writes++
	return w.Buffer.Write(p)
}

// Golden files are only ever added: what was agreed on once stays the measure. Each is here as it was when
// it was first added.
func TestGoldenFilesAreOnlyAdded(t *testing.T) {
	dir := filepath.Dir(golden.Path(t, "x"))
	git := func(args ...string) string {
		t.Helper()
		out, err := exec.Command("git", append([]string{"-C", dir}, args...)...).Output()
		if err != nil {
			t.Fatalf("git %q: %v", args, err)
		}
		return string(out)
	}
	// The oldest commit last, each followed by what it added.
	var commit string
	first := map[string]string{}
	for line := range strings.Lines(git("log", "--diff-filter=A", "--no-renames", "--relative", "--format=commit %H", "--name-only", "--", ".")) {
		line = strings.TrimSpace(line)
		if hash, ok := strings.CutPrefix(line, "commit "); ok {
			commit = hash
		} else if line != "" {
			first[line] = commit
		}
	}
	for name, commit := range first {
		was := git("show", commit+":./"+name)
		if is, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(is) != was {
			t.Errorf("%s is not what it was when it was added: %v; add another file instead", name, err)
		}
	}
	// Each is read by some test.
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Dir(filepath.Dir(filepath.Dir(dir)))
	for _, f := range files {
		name := strings.TrimPrefix(strings.TrimSuffix(strings.TrimSuffix(f.Name(), ".golden"), ".exchange"), "proto-")
		if err := exec.Command("git", "-C", root, "grep", "-qF", `"`+name+`"`, "--", "*_test.go").Run(); err != nil {
			t.Errorf("no test reads %s: %v", f.Name(), err)
		}
	}
}
