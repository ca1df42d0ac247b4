package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/berthd/berth/shell"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// collected keeps what a collector reports.
type collected struct {
	mu      sync.Mutex
	results map[string][]*agentpb.WorkspaceAgentMetadata_Result
}

func (c *collected) take(key string, r *agentpb.WorkspaceAgentMetadata_Result) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.results == nil {
		c.results = map[string][]*agentpb.WorkspaceAgentMetadata_Result{}
	}
	c.results[key] = append(c.results[key], r)
}

func newCollector(descriptions ...*agentpb.WorkspaceAgentMetadata_Description) (metadataCollector, *collected) {
	w := shell.New(shell.Config{})
	w.Update(&agentpb.Manifest{}, "")
	c := &collected{}
	return metadataCollector{descriptions, w.Command, c.take, slog.New(slog.DiscardHandler)}, c
}

// inSeconds is how the protocol writes a number of seconds here.
func inSeconds(n int64) *durationpb.Duration { return durationpb.New(time.Duration(n)) }

func TestMetadataIsCollectedWhenDue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, got := newCollector(
			&agentpb.WorkspaceAgentMetadata_Description{Key: "once", Script: "echo 1"},
			&agentpb.WorkspaceAgentMetadata_Description{Key: "each second", Script: "echo 1", Interval: inSeconds(1)},
			&agentpb.WorkspaceAgentMetadata_Description{Key: "every three", Script: "echo 1", Interval: inSeconds(3)},
			&agentpb.WorkspaceAgentMetadata_Description{Key: "never again", Script: "echo 1", Interval: durationpb.New(10 * time.Second)},
		)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second+time.Millisecond)
		defer cancel()
		if err := m.run(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		counts := map[string]int{}
		for key, results := range got.results {
			counts[key] = len(results)
		}
		want := map[string]int{"once": 1, "each second": 11, "every three": 4, "never again": 1}
		if diff := cmp.Diff(want, counts); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}

// TestMetadataDoesNotOverlap: one run of a key at a time, and other keys do not wait for it.
func TestMetadataDoesNotOverlap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, got := newCollector(
			&agentpb.WorkspaceAgentMetadata_Description{Key: "slow", Script: "slow", Interval: inSeconds(1)},
			&agentpb.WorkspaceAgentMetadata_Description{Key: "quick", Script: "echo 1", Interval: inSeconds(1)},
		)
		command := m.command
		running := 0
		m.command = func(line string, env []string) (shell.Spec, error) {
			if line != "slow" {
				return command(line, env)
			}
			if running++; running > 1 {
				t.Error("two runs of one key at a time")
			}
			time.Sleep(2500 * time.Millisecond)
			running--
			return command("echo 1", env)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 9*time.Second+time.Millisecond)
		defer cancel()
		_ = m.run(ctx)
		if slow, quick := len(got.results["slow"]), len(got.results["quick"]); slow != 3 || quick != 10 {
			t.Errorf("%d slow and %d quick runs in 9 s, want 3 and 10", slow, quick)
		}
	})
}

func TestMetadataOutput(t *testing.T) {
	tests := map[string]struct {
		script string
		value  string
		err    string
	}{
		"plain":             {"echo ' value '", "value", ""},
		"both streams":      {"echo out; echo err >&2", "out\nerr", ""},
		"nothing to read":   {"cat; echo end", "end", ""},
		"exit code":         {"echo value; exit 3", "value", "run cmd: exit status 3"},
		"no such command":   {"/nowhere/x 2>/dev/null", "", "run cmd: exit status 127"},
		"interpreter":       {"#!/nowhere/interpreter\nx", "", "start cmd: fork/exec /nowhere/interpreter: no such file or directory"},
		"NUL in the script": {"\x00", "", "create cmd: cannot start a command: it contains a NUL byte"},
		"too much":          {"head -c 20000 /dev/zero | tr '\\0' x", strings.Repeat("x", 10240), "output truncated from 20000 to 10240 bytes"},
		"just fits":         {"head -c 10240 /dev/zero | tr '\\0' x", strings.Repeat("x", 10240), ""},
		"too much and bad":  {"head -c 10241 /dev/zero | tr '\\0' x; exit 1", strings.Repeat("x", 10240), "run cmd: exit status 1\noutput truncated from 10241 to 10240 bytes"},
		"no text":           {"printf 'a\\377\\000b'", "a❌❌b", ""},
		"a signal":          {"kill -9 $$", "", "run cmd: signal: killed"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m, got := newCollector()
			m.collect(t.Context(), &agentpb.WorkspaceAgentMetadata_Description{Key: "k", Script: tt.script, Timeout: inSeconds(60)})
			r := got.results["k"][0]
			if r.GetValue() != tt.value || r.GetError() != tt.err || r.GetCollectedAt() == nil {
				t.Errorf("got %q, error %q, want %q, error %q", r.GetValue(), r.GetError(), tt.value, tt.err)
			}
		})
	}
}

// TestMetadataTimeout: what was printed until then is kept, in bounded memory, and nothing runs on.
func TestMetadataTimeout(t *testing.T) {
	for name, script := range map[string]string{
		"silent":        "echo before; sleep 1000",
		"deaf":          "trap '' HUP; echo before; while :; do sleep 0.1; done",
		"endless lines": "echo before; yes",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m, got := newCollector()
			m.collect(t.Context(), &agentpb.WorkspaceAgentMetadata_Description{Key: "k", Script: script, Timeout: inSeconds(1)})
			r := got.results["k"][0]
			if !strings.HasPrefix(r.GetValue(), "before") || len(r.GetValue()) > maxMetadataOutput {
				t.Errorf("value of %d bytes", len(r.GetValue()))
			}
			if !strings.HasPrefix(r.GetError(), "run cmd: ") || !strings.Contains(r.GetError(), "context deadline exceeded") {
				t.Errorf("error %q", r.GetError())
			}
		})
	}
}

// TestMetadataLeavesNothingBehind: neither a child in the background nor the wait for its output.
func TestMetadataLeavesNothingBehind(t *testing.T) {
	m, got := newCollector()
	m.collect(t.Context(), &agentpb.WorkspaceAgentMetadata_Description{Key: "k", Script: "sleep 1000 & echo $!", Timeout: inSeconds(60)})
	r := got.results["k"][0]
	if r.GetError() != "" {
		t.Errorf("error %q", r.GetError())
	}
	var pid int
	if _, err := fmt.Sscan(r.GetValue(), &pid); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the child ends", func() bool { return !alive(pid) })
}

// TestMetadataEndsWhatLeftItsSession, when it runs out of time.
func TestMetadataEndsWhatLeftItsSession(t *testing.T) {
	m, got := newCollector()
	m.collect(t.Context(), &agentpb.WorkspaceAgentMetadata_Description{
		Key: "k", Script: "setsid sh -c 'echo $$; trap \"\" HUP; while :; do sleep 0.1; done' & wait", Timeout: inSeconds(1),
	})
	r := got.results["k"][0]
	var pid int
	if _, err := fmt.Sscan(r.GetValue(), &pid); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the child ends", func() bool { return !alive(pid) })
}

// alive tells whether a process runs; one that only waits to be reaped does not.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(rest, "Z")
}

// TestMetadataIsCutOffWithItsLink: a script that is stopped for us is no fault of the script.
func TestMetadataIsCutOffWithItsLink(t *testing.T) {
	m, got := newCollector()
	ctx, cancel := context.WithCancel(t.Context())
	command := m.command
	m.command = func(line string, env []string) (shell.Spec, error) {
		defer cancel()
		return command(line, env)
	}
	m.collect(ctx, &agentpb.WorkspaceAgentMetadata_Description{Key: "k", Script: "sleep 1000", Timeout: inSeconds(60)})
	if len(got.results) != 0 {
		t.Errorf("reported %v", got.results)
	}
}

func TestMetadataSeconds(t *testing.T) {
	second := time.Second
	tests := map[string]struct {
		interval, timeout *durationpb.Duration
		seconds           int64
		limit             time.Duration
	}{
		"ten seconds":     {&durationpb.Duration{Nanos: 10}, nil, 10, 10 * second},
		"own timeout":     {&durationpb.Duration{Nanos: 10}, &durationpb.Duration{Nanos: 2}, 10, 2 * second},
		"nothing":         {nil, nil, 0, 3 * second},
		"once":            {nil, &durationpb.Duration{Nanos: 7}, 0, 7 * second},
		"negative":        {&durationpb.Duration{Nanos: -1}, &durationpb.Duration{Seconds: -1}, 0, 3 * second},
		"a true duration": {durationpb.New(10 * second), nil, 100 * 365 * 24 * 3600, 100 * 365 * 24 * time.Hour},
		"absurd":          {&durationpb.Duration{Seconds: 1 << 62, Nanos: 1 << 30}, nil, 100 * 365 * 24 * 3600, 100 * 365 * 24 * time.Hour},
	}
	for name, tt := range tests {
		d := &agentpb.WorkspaceAgentMetadata_Description{Interval: tt.interval, Timeout: tt.timeout}
		if got := metadataSeconds(d.GetInterval()); got != tt.seconds {
			t.Errorf("%s: interval of %d s, want %d", name, got, tt.seconds)
		}
		if got := metadataTimeout(d); got != tt.limit {
			t.Errorf("%s: timeout %v, want %v", name, got, tt.limit)
		}
	}
}

func TestMetadataKeyThatNoServerTakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, got := newCollector(&agentpb.WorkspaceAgentMetadata_Description{Key: strings.Repeat("k", wire.MaxMetadataKeys+1), Script: "echo 1"})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_ = m.run(ctx)
		if len(got.results) != 0 {
			t.Error("it was collected")
		}
	})
}
