package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/berthd/berth/wire"
)

func TestCompletionOfContainers(t *testing.T) {
	answers(t, map[string]any{
		agentsPath: []wire.AgentSummary{{ID: agentID, Name: "demo", Status: wire.AgentConnected}},
		agentPath("/containers"): wire.Containers{Containers: []wire.Container{
			{Name: "web", Image: "img\x1b", Running: true}, {Name: "worker"}, {Name: "w$(x)", Running: true}, {Name: "db", Running: true}}},
	})
	if _, stdout, _ := berth(t, "__complete", "ssh", "demo", "--container", "w"); !strings.HasPrefix(stdout, "web\timg\\x1b\n:") {
		t.Errorf("after the name, <Tab> offers %q", stdout)
	}
}

// Where ports are from is said unless that is what tells the most; containers show their health and
// what they are part of.
func TestMoreOfLists(t *testing.T) {
	listed := func(source string) {
		answers(t, map[string]any{
			agentsPath:                    []wire.AgentSummary{{ID: agentID, Name: "demo", Status: wire.AgentConnected}},
			agentPath("/listening-ports"): wire.ListeningPorts{Source: source, Ports: []wire.ListeningPort{{Network: "tcp", Port: 80}}},
			agentPath("/containers"): wire.Containers{Engines: []string{"docker"}, Containers: []wire.Container{
				{Name: "alone", ID: "1", Running: true, Status: "running", Engine: "docker"},
				{Name: "web", ID: "2", Running: true, Status: "running", Health: "unhealthy", ComposeProject: "shop", ComposeService: "we\x1bb", Engine: "docker"}}},
		})
	}
	for source, want := range map[string]string{"": "", "netlink": "", "/proc/net": "berth: note: the agent has its ports from /proc/net\n", "\x1bc": "berth: note: the agent has its ports from \\x1bc\n"} {
		listed(source)
		if code, stdout, stderr := berth(t, "ports", "demo"); code != 0 || !strings.Contains(stdout, "80/tcp") || stderr != want {
			t.Errorf("from %q: code %d, %q; want %q", source, code, stderr, want)
		}
	}
	_, stdout, _ := berth(t, "containers", "demo")
	want := `NAME   ID  STATUS               PROJECT       ENGINE  CREATED  PORTS  IMAGE
alone  1   running              -             docker  -        -      -
web    2   running (unhealthy)  shop/we\x1bb  docker  -        -      -
`
	if diff := cmp.Diff(want, stdout); diff != "" {
		t.Error(diff)
	}
}

// What is asked of a list holds: filters, order, and what is printed when nothing is left.
func TestListFilters(t *testing.T) {
	answers(t, map[string]any{
		agentsPath: []wire.AgentSummary{{ID: agentID, Name: "demo", Status: wire.AgentConnected}},
		agentPath("/listening-ports"): wire.ListeningPorts{Ports: []wire.ListeningPort{
			{Network: "udp", Port: 53, ProcessName: "dnsmasq"}, {Network: "tcp", Port: 8080, ProcessName: "node"}, {Network: "tcp", Port: 53, ProcessName: "dnsmasq"}}},
		agentPath("/containers"): wire.Containers{Engines: []string{"docker"}, Containers: []wire.Container{
			{Name: "old", ID: "1", Labels: map[string]string{"app": "shop", "tier": "web"}, Status: "exited with code 1"},
			{Name: "web", ID: "2", Running: true, Status: "running", Labels: map[string]string{"app": "shop"}}, {Name: "api", ID: "3", Running: true, Status: "running"}}},
	})
	for _, tt := range []struct {
		args, names string // of the first column
		stderr      string
	}{
		{"ports demo", "53/tcp 53/udp 8080/tcp", ""},
		{"ports demo --udp", "53/udp", ""},
		{"ports demo --tcp", "53/tcp 8080/tcp", ""},
		{"containers demo", "api web old", ""},
		{"containers demo --running", "api web", ""},
		{"containers demo --label app=shop", "web old", ""},
		{"containers demo --label app=shop --label tier", "old", ""},
		{"containers demo --label tier --running", "", "none of the 3 containers"},
	} {
		code, stdout, stderr := berth(t, strings.Fields(tt.args)...)
		var names []string
		for i, line := range strings.Split(stdout, "\n") {
			if fields := strings.Fields(line); i > 0 && len(fields) > 0 {
				names = append(names, fields[0])
			}
		}
		if got := strings.Join(names, " "); code != 0 || got != tt.names || !strings.Contains(stderr, tt.stderr) {
			t.Errorf("berth %s: code %d, %q, want %q: %s", tt.args, code, got, tt.names, stderr)
		}
	}
}
