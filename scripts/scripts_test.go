package scripts

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/berthd/berth/internal/testhome"
	"github.com/berthd/berth/shell"
	"github.com/berthd/berth/wire/agentpb"
)

func TestMain(m *testing.M) { testhome.Main(m) }

// bench is a runner and what came of it.
type bench struct {
	*Runner
	logs, data string

	mu      sync.Mutex
	changed *sync.Cond
	output  map[uuid.UUID]string
	timings []*agentpb.Timing
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{logs: t.TempDir(), data: t.TempDir(), output: map[uuid.UUID]string{}}
	b.changed = sync.NewCond(&b.mu)
	ws := shell.New(shell.Config{})
	ws.Update(&agentpb.Manifest{Directory: t.TempDir()}, "")
	b.Runner = New(Config{
		Shell: ws, LogDir: b.logs, DataDir: b.data,
		Logs: func(source uuid.UUID, level agentpb.Log_Level) io.WriteCloser { return &sink{b, source, level} },
		Completed: func(timing *agentpb.Timing) {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.timings = append(b.timings, timing)
			b.changed.Broadcast()
		},
	})
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		b.Stop(ctx)
	})
	return b
}

// sink keeps what is written, each chunk marked with its level.
type sink struct {
	b      *bench
	source uuid.UUID
	level  agentpb.Log_Level
}

func (s *sink) Write(p []byte) (int, error) {
	s.b.mu.Lock()
	defer s.b.mu.Unlock()
	s.b.output[s.source] += s.level.String() + ":" + string(p)
	s.b.changed.Broadcast()
	return len(p), nil
}

func (s *sink) Close() error { return nil }

// await waits until done holds; the test's own deadline bounds it.
func (b *bench) await(done func() bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for !done() {
		b.changed.Wait()
	}
}

func (b *bench) timing(t *testing.T, s *agentpb.WorkspaceAgentScript) *agentpb.Timing {
	t.Helper()
	var found *agentpb.Timing
	b.await(func() bool {
		i := slices.IndexFunc(b.timings, func(o *agentpb.Timing) bool { return string(o.GetScriptId()) == string(s.GetId()) })
		if i >= 0 {
			found = b.timings[i]
		}
		return i >= 0
	})
	return found
}

func (b *bench) printed(s *agentpb.WorkspaceAgentScript) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.output[uuid.UUID(s.GetLogSourceId())]
}

func script(text string) *agentpb.WorkspaceAgentScript {
	id, source := uuid.New(), uuid.New()
	return &agentpb.WorkspaceAgentScript{Id: id[:], LogSourceId: source[:], Script: text}
}

func start(text string) *agentpb.WorkspaceAgentScript {
	s := script(text)
	s.RunOnStart = true
	return s
}

func TestOutcomes(t *testing.T) {
	for _, c := range []struct {
		name, script string
		timeout      time.Duration
		state        agentpb.Lifecycle_State
		status       agentpb.Timing_Status
		code         int32
		output       string
	}{
		{name: "fine", script: "echo hi", state: agentpb.Lifecycle_READY, output: "INFO:hi\n"},
		{name: "stderr", script: "echo hi >&2", state: agentpb.Lifecycle_READY, output: "ERROR:hi\n"},
		{name: "shebang", script: "#!/usr/bin/env sh\necho $0", state: agentpb.Lifecycle_READY, output: "INFO:sh\n"},
		{name: "no input", script: "cat; echo end", state: agentpb.Lifecycle_READY, output: "INFO:end\n"},
		{name: "exit code", script: "exit 7", state: agentpb.Lifecycle_START_ERROR, status: agentpb.Timing_EXIT_FAILURE, code: 7},
		{name: "killed", script: "kill -9 $$", state: agentpb.Lifecycle_START_ERROR, status: agentpb.Timing_EXIT_FAILURE, code: -1},
		{
			name: "bad interpreter", script: "#!/nowhere/sh\n", state: agentpb.Lifecycle_START_ERROR, status: agentpb.Timing_EXIT_FAILURE, code: 255,
			output: "ERROR:cannot start the script: fork/exec /nowhere/sh: no such file or directory\n",
		},
		{
			name: "timeout", script: "sleep 1000", timeout: 50 * time.Millisecond,
			state: agentpb.Lifecycle_START_TIMEOUT, status: agentpb.Timing_TIMED_OUT, code: -1,
			output: "ERROR:[berth: the script was ended because it ran for longer than 50ms]\n",
		},
		{
			name: "timeout that is taken calmly", script: "exec 2>/dev/null; trap 'exit 0' HUP; while :; do sleep 0.01; done", timeout: 300 * time.Millisecond,
			state: agentpb.Lifecycle_START_TIMEOUT, status: agentpb.Timing_TIMED_OUT,
			output: "ERROR:[berth: the script was ended because it ran for longer than 300ms]\n",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			s := start(c.script)
			if c.timeout > 0 {
				s.Timeout = durationpb.New(c.timeout)
			}
			result := b.Start(t.Context(), []*agentpb.WorkspaceAgentScript{s, script("echo never")})
			if result.State() != c.state {
				t.Errorf("state %v, want %v", result.State(), c.state)
			}
			timing := b.timing(t, s)
			if timing.GetStatus() != c.status || timing.GetExitCode() != c.code || timing.GetStage() != agentpb.Timing_START {
				t.Errorf("reported %v", timing)
			}
			if timing.GetEnd().AsTime().Before(timing.GetStart().AsTime()) {
				t.Error("it ended before it began")
			}
			if diff := cmp.Diff(c.output, b.printed(s)); diff != "" {
				t.Errorf("output (-want +got):\n%s", diff)
			}
			if len(b.timings) != 1 {
				t.Errorf("%d reports", len(b.timings))
			}
		})
	}
}

func TestScriptsOfAStageRunAtTheSameTime(t *testing.T) {
	b := newBench(t)
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	// Each waits for the other.
	result := b.Start(t.Context(), []*agentpb.WorkspaceAgentScript{start("echo x >" + fifo), start("cat " + fifo)})
	if result.State() != agentpb.Lifecycle_READY {
		t.Error(result.State())
	}
}

func TestEnvironmentAndFiles(t *testing.T) {
	b := newBench(t)
	s := start(`echo "$CODER_SCRIPT_DATA_DIR $BERTH_SCRIPT_BIN_DIR"; echo err >&2; test -d "$CODER_SCRIPT_DATA_DIR" && test -d "$CODER_SCRIPT_BIN_DIR"`)
	s.LogPath = "sub/own.log"
	if got := b.Start(t.Context(), []*agentpb.WorkspaceAgentScript{s}).State(); got != agentpb.Lifecycle_READY {
		t.Error(got)
	}
	b.timing(t, s)
	source := uuid.UUID(s.GetLogSourceId()).String()
	want := fmt.Sprintf("%s %s\n", filepath.Join(b.data, "coder-script-data", source), BinDir(b.data))
	log, err := os.ReadFile(filepath.Join(b.logs, "sub", "own.log"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(log), want) || !strings.Contains(string(log), "err\n") {
		t.Errorf("log file %q, want %q and err", log, want)
	}
	info, err := os.Stat(filepath.Join(b.logs, "sub", "own.log"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("log file mode %v, %v", info.Mode(), err)
	}
}

func TestDefaultLogFileAndNone(t *testing.T) {
	b := newBench(t)
	fine, blocked := start("echo a"), start("echo b")
	blocked.LogPath = "/proc/none/x.log"
	if got := b.Start(t.Context(), []*agentpb.WorkspaceAgentScript{fine, blocked}).State(); got != agentpb.Lifecycle_READY {
		t.Error(got)
	}
	b.timing(t, fine)
	b.timing(t, blocked)
	log, err := os.ReadFile(filepath.Join(b.logs, "coder-script-"+uuid.UUID(fine.GetLogSourceId()).String()+".log"))
	if err != nil || string(log) != "a\n" {
		t.Errorf("%q, %v", log, err)
	}
	if got := b.printed(blocked); got != "INFO:b\n" {
		t.Errorf("without a log file: %q", got)
	}
}

func TestBackgroundChildThatHoldsThePipe(t *testing.T) {
	b := newBench(t)
	b.pipeGrace = 200 * time.Millisecond
	gate := filepath.Join(t.TempDir(), "gate")
	if err := syscall.Mkfifo(gate, 0o600); err != nil {
		t.Fatal(err)
	}
	s := start("echo begun; (read x <" + gate + "; echo late $x) & exit 0")
	began := time.Now()
	result := b.Start(t.Context(), []*agentpb.WorkspaceAgentScript{s})
	if result.State() != agentpb.Lifecycle_READY {
		t.Errorf("state %v", result.State())
	}
	timing := b.timing(t, s)
	if timing.GetStatus() != agentpb.Timing_PIPES_LEFT_OPEN || timing.GetExitCode() != 0 {
		t.Errorf("reported %v", timing)
	}
	if ended := timing.GetEnd().AsTime(); ended.Sub(began) > time.Since(began)-b.pipeGrace {
		t.Errorf("its end, %v after the start, includes the wait for the child", ended.Sub(began))
	}
	if got := b.printed(s); !strings.Contains(got, "sh (pid ") || !strings.Contains(got, "WARN:[berth: the script has ended, but ") {
		t.Errorf("the child is not named: %q", got)
	}
	if err := os.WriteFile(gate, []byte("word\n"), 0); err != nil {
		t.Fatal(err)
	}
	b.await(func() bool { return strings.Contains(b.output[uuid.UUID(s.GetLogSourceId())], "late word\n") })
}

func TestTimeoutEndsTheWholeGroup(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	s := start("trap '' HUP; sleep 1000 & echo $!; wait") // the child ignores the hang-up too
	s.Timeout = durationpb.New(time.Second)               // a busy machine takes a while to come to the trap
	began := time.Now()
	if got := b.Start(t.Context(), []*agentpb.WorkspaceAgentScript{s}).State(); got != agentpb.Lifecycle_START_TIMEOUT {
		t.Error(got)
	}
	if took := time.Since(began); took < shell.HangupGrace {
		t.Errorf("it was killed after %v, before its grace", took)
	}
	// Its output ends only when no process holds it any more: the child is gone too.
	if got := b.timing(t, s).GetStatus(); got != agentpb.Timing_TIMED_OUT {
		t.Error(got)
	}
	if got := b.printed(s); strings.Contains(got, "still shown") {
		t.Errorf("the child lives on: %q", got)
	}
}

func TestStopHangsUpAndRunsStopScripts(t *testing.T) {
	b := newBench(t)
	hung, stop := start("trap 'echo hung; exit 3' HUP; echo up; while :; do sleep 0.01; done"), script("echo bye; exit 4")
	stop.RunOnStop = true
	started := make(chan Result)
	go func() { started <- b.Start(context.Background(), []*agentpb.WorkspaceAgentScript{hung, stop}) }()
	b.await(func() bool { return b.output[uuid.UUID(hung.GetLogSourceId())] != "" })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if got := b.Stop(ctx).State(); got != agentpb.Lifecycle_SHUTDOWN_ERROR {
		t.Error(got)
	}
	<-started
	if got := b.printed(stop); got != "INFO:bye\n" {
		t.Errorf("stop script printed %q", got)
	}
	timing := b.timing(t, stop)
	if timing.GetStage() != agentpb.Timing_STOP || timing.GetExitCode() != 4 {
		t.Errorf("reported %v", timing)
	}
	if len(b.timings) != 2 {
		t.Errorf("%d reports, want 2", len(b.timings))
	}
	if got := b.Stop(ctx).State(); got != agentpb.Lifecycle_OFF || len(b.timings) != 2 {
		t.Errorf("a second stop ran something: %v", got)
	}
}

func TestStopKeepsItsBudget(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	stop := script("trap '' HUP; while :; do sleep 0.05; done")
	stop.RunOnStop = true
	b.Adopt([]*agentpb.WorkspaceAgentScript{stop})
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	began := time.Now()
	if got := b.Stop(ctx).State(); got != agentpb.Lifecycle_SHUTDOWN_ERROR {
		t.Error(got)
	}
	if took := time.Since(began); took > 4*time.Second {
		t.Errorf("stop took %v of its second", took)
	}
	if len(b.timings) != 1 {
		t.Errorf("%d reports, want 1", len(b.timings))
	}
}

func TestCron(t *testing.T) {
	b := newBench(t)
	s, broken := script("echo tick; sleep 1.2"), script("echo never")
	s.Cron, broken.Cron = "* * * * * *", "every day"
	b.Adopt([]*agentpb.WorkspaceAgentScript{s, broken})
	b.await(func() bool { return len(b.timings) == 2 })
	first, second := b.timings[0], b.timings[1]
	if first.GetStage() != agentpb.Timing_CRON || second.GetStart().AsTime().Before(first.GetEnd().AsTime()) {
		t.Errorf("runs overlap: %v, %v", first, second)
	}
	if got := b.printed(broken); !strings.Contains(got, `its cron table "every day" cannot be read`) {
		t.Errorf("the broken table was not named: %q", got)
	}
}

func TestCronFollowsTheWallClock(t *testing.T) {
	for table, want := range map[string]time.Duration{
		"0 */5 * * * *":  5 * time.Minute,
		"30 0 1 * *":     time.Hour + 30*time.Second, // five fields: no weekday
		"0 0 12 1 JAN *": 12 * time.Hour,
	} {
		synctest.Test(t, func(t *testing.T) { // its clock begins on 1 January 2000, midnight UTC
			time.Local = time.UTC
			schedule, err := cronParser.Parse(table)
			if err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			if !await(t.Context(), schedule) || time.Since(began) != want {
				t.Errorf("%s came after %v, want %v", table, time.Since(began), want)
			}
		})
	}
}

func TestManyLines(t *testing.T) {
	b := newBench(t)
	s := start("i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done")
	if got := b.Start(t.Context(), []*agentpb.WorkspaceAgentScript{s}).State(); got != agentpb.Lifecycle_READY {
		t.Error(got)
	}
	b.timing(t, s)
	lines := strings.Split(strings.TrimSuffix(strings.ReplaceAll(b.printed(s), "INFO:", ""), "\n"), "\n")
	for i, line := range lines {
		if line != fmt.Sprint(i) {
			t.Fatalf("line %d is %q", i, line)
		}
	}
	if len(lines) != 20000 {
		t.Errorf("%d lines", len(lines))
	}
}
