package main

import (
	"strings"
	"testing"

	"github.com/berthd/berth/wire"
)

func TestFindContainer(t *testing.T) {
	some := wire.Containers{Containers: []wire.Container{
		{Name: "web", ID: "aaaa1111", Running: true}, {Name: "db", ID: "bbbb2222", Running: true}, {Name: "old", ID: "cccc3333", Status: "exited with code 3"},
	}}
	for _, name := range []string{"web", "bbbb", "aaaa1111"} {
		if err := findContainer(some, name, "demo"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, tt := range []struct {
		found wire.Containers
		name  string
		want  string
	}{
		{some, "old", "exited with code 3"},
		{some, "wbe", "db, web"},
		{wire.Containers{Warnings: []string{"docker does not answer"}}, "web", "docker does not answer"},
		{wire.Containers{}, "web", "berth containers demo"},
	} {
		if err := findContainer(tt.found, tt.name, "demo"); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v; want %q in it", tt.name, err, tt.want)
		}
	}
}

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
