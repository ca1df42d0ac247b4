package main

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
)

func berthPath(rest string) string {
	return "GET " + wire.PathBerth + "agents/" + agentID.String() + rest
}

// evilStatus has a text everywhere.
func evilStatus(evil string) wire.StatusReport {
	code := int32(3)
	return wire.StatusReport{
		Agent: wire.Agent{
			ID: agentID, Name: evil, Version: evil, LifecycleState: evil, ExpandedDirectory: evil, InstanceID: evil,
			Health:  wire.AgentHealth{Reason: evil},
			Latency: map[string]wire.Latency{evil: {}},
			Apps:    []wire.App{{Slug: evil, Health: evil, Statuses: []wire.AppStatus{{State: evil, Message: evil, URI: evil}}}},
			Scripts: []wire.Script{{DisplayName: evil, Status: evil, ExitCode: &code}},
		},
		Metadata: []wire.AgentMetadata{{
			Description: wire.MetadataDescription{DisplayName: evil, Key: evil}, Result: wire.MetadataResult{Value: evil, Error: evil},
		}},
		Usage:    &wire.Usage{Volumes: []wire.VolumeUsage{{Path: evil, Used: wire.Used{Used: 9, Total: 9}}}},
		Sessions: []wire.Session{{Type: evil, IP: evil, Reason: evil, EndedAt: &time.Time{}}},
	}
}

// fullStatus is that of a workspace that has one of each, some of them in trouble.
func fullStatus(now time.Time) wire.StatusReport {
	back := func(d time.Duration) *time.Time { at := now.Add(-d); return &at }
	failed := int32(3)
	return wire.StatusReport{
		Agent: wire.Agent{
			ID: agentID, Name: "demo", Status: wire.AgentConnected, LastConnectedAt: back(2 * time.Second),
			LifecycleState: "ready", ReadyAt: back(3 * time.Hour), OperatingSystem: "linux", Architecture: "amd64", Version: "v1.0.0",
			Health: wire.AgentHealth{Healthy: true}, LogsOverflowed: true,
			Apps: []wire.App{
				{Slug: "assistant", Health: "disabled", Statuses: []wire.AppStatus{
					{State: "idle", Message: "may I?", URI: "https://example.com/1", CreatedAt: *back(5 * time.Second)}, {State: "working", CreatedAt: *back(time.Minute)}}},
				{Slug: "web", Health: "unhealthy"},
				{Slug: "tests", Health: "healthy", Statuses: []wire.AppStatus{{State: "failure", Message: "3 fail", CreatedAt: *back(time.Minute)}}},
			},
			Scripts: []wire.Script{{DisplayName: "Install", Status: "exit_failure", ExitCode: &failed}, {DisplayName: "Never ran"}},
		},
		Metadata: []wire.AgentMetadata{
			{Description: wire.MetadataDescription{DisplayName: "Load", Key: "load"}, Result: wire.MetadataResult{Value: "0.42", CollectedAt: now}},
			{Description: wire.MetadataDescription{Key: "cost"}, Result: wire.MetadataResult{Error: "run cmd: exit status 1", CollectedAt: now}},
			{Description: wire.MetadataDescription{Key: "later"}},
		},
		Usage: &wire.Usage{CollectedAt: *back(10 * time.Second), Memory: &wire.Used{Used: 3 << 30, Total: 8 << 30},
			Volumes: []wire.VolumeUsage{{Path: "/home", Used: wire.Used{Used: 19 << 30, Total: 20 << 30}}}},
		Sessions: []wire.Session{
			{ID: uuid.UUID{1}, Type: "ssh", IP: "127.0.0.1", BeganAt: back(time.Minute)},
			{ID: uuid.UUID{2}, Type: "reconnecting_pty", BeganAt: back(time.Hour), EndedAt: back(50 * time.Minute), ExitCode: 1, Reason: "gone"},
		},
	}
}

func TestPrintStatus(t *testing.T) {
	p := &program{out: create(t, t.TempDir()+"/out")}
	now := time.Now()
	if err := p.printStatus(fullStatus(now), now); err != nil {
		t.Fatal(err)
	}
	want := `name        demo
id          ` + agentID.String() + `
status      connected, last seen 2s ago
state       ready since 3h ago
address     ` + wire.AgentAddr(agentID).String() + `
system      linux/amd64
version     v1.0.0
trouble     the server keeps no more logs of this agent: its log is full
trouble     app web is not well
trouble     app tests has failed
trouble     script Install: exit_failure, exit code 3
trouble     metadata cost: run cmd: exit status 1
trouble     disk /home is 95% full

WHAT      NAME              STATE             SINCE    DETAIL
app       assistant         idle              5s ago   may I? https://example.com/1
app       web               unhealthy         -        -
app       tests             failure, healthy  60s ago  3 fail
script    Install           exit_failure      -        exit_failure, exit code 3
metadata  Load              ok                -        0.42
metadata  cost              error             -        run cmd: exit status 1
metadata  later             none yet          -        -
memory    -                 37%               10s ago  3.0 GiB of 8.0 GiB
disk      /home             95%               10s ago  19.0 GiB of 20.0 GiB
session   ssh               open              60s ago  from 127.0.0.1
session   reconnecting_pty  ended             50m ago  exit code 1, gone
`
	if diff := cmp.Diff(want, readFile(t, p.out.Name())); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestStatusOfAnAgentThatIsAway: nobody knows whether its sessions go on.
func TestStatusOfAnAgentThatIsAway(t *testing.T) {
	report := fullStatus(time.Now())
	report.Status = wire.AgentDisconnected
	for _, row := range statusRows(report) {
		if row.ID == (uuid.UUID{1}).String() && row.State != stateUnknown {
			t.Errorf("an open session is %q", row.State)
		}
	}
}

// TestWatchStatus: what changes is told, and ages are no change.
func TestWatchStatus(t *testing.T) {
	now := time.Now()
	p := &program{out: create(t, t.TempDir()+"/out"), errOut: create(t, t.TempDir()+"/err")}
	l := &listing[statusRow]{program: p, agent: "demo", source: "the server", what: "status", key: statusKey, table: statusTable}
	v := &lineView[statusRow]{listing: l, output: formatText, had: map[string]statusRow{}, warned: map[string]bool{}}
	show := func(r wire.StatusReport) {
		if err := v.show(snapshot[statusRow]{items: statusRows(r), warnings: troubles(r)}); err != nil {
			t.Fatal(err)
		}
	}
	report := fullStatus(now)
	show(report)
	before := len(readFile(t, p.out.Name()))
	v.lose()
	report.Metadata[0].Result.CollectedAt, report.Metadata[0].Result.Age = now.Add(time.Second), 1
	report.LastConnectedAt = &now
	show(report)
	if got := readFile(t, p.out.Name())[before:]; got != "" {
		t.Errorf("nothing changed, but it says:\n%s", got)
	}
	report.Apps[0].Statuses = append(report.Apps[0].Statuses, wire.AppStatus{State: "complete", Message: "done", CreatedAt: now.Add(time.Second)})
	show(report)
	if got := readFile(t, p.out.Name())[before:]; !strings.Contains(got, "~ app  assistant  complete  now  done\n") || strings.Count(got, "\n") != 1 {
		t.Errorf("one app changed, but it says:\n%s", got)
	}
	if said := readFile(t, p.errOut.Name()); !strings.Contains(said, "lost the connection to the server; trying again") || strings.Count(said, "app web is not well") != 1 {
		t.Errorf("it said:\n%s", said)
	}
}

// TestWatchStatusAsksTheServer until it is interrupted.
func TestWatchStatusAsksTheServer(t *testing.T) {
	answers(t, map[string]any{
		agentsPath:           []wire.AgentSummary{{ID: agentID, Name: "demo"}},
		berthPath("/status"): fullStatus(time.Now()),
	})
	p := &program{out: create(t, t.TempDir()+"/out"), errOut: create(t, t.TempDir()+"/err")}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.watchStatus(ctx, "demo", formatJSON) }()
	for limit := time.Now().Add(20 * time.Second); !strings.Contains(readFile(t, p.out.Name()), `"item":{"kind":"app","name":"assistant","state":"idle"`); {
		if time.Now().After(limit) {
			t.Fatalf("it shows:\n%s%s", readFile(t, p.out.Name()), readFile(t, p.errOut.Name()))
		}
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
