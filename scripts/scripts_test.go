package scripts

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
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
	"github.com/berthd/berth/mask"
	"github.com/berthd/berth/scripts/hold"
	"github.com/berthd/berth/shell"
	"github.com/berthd/berth/wire/agentpb"
)

// envHolder makes the test binary a process that holds a script.
const envHolder = "BERTH_TEST_HOLDER"

func TestMain(m *testing.M) {
	if os.Getenv(envHolder) != "" {
		if err := hold.RunProcess(); err != nil {
			panic(err)
		}
		return
	}
	testhome.Main(m)
}

// bench is a runner and what came of it.
type bench struct {
	*Runner
	logs, data string
	progress   Progress

	mu      sync.Mutex
	changed *sync.Cond
	output  map[uuid.UUID]string
	timings []*agentpb.Timing
}

func newBench(t *testing.T) *bench {
	t.Helper()
	return newBenchIn(t, t.TempDir(), t.TempDir())
}

func newBenchIn(t *testing.T, logs, data string) *bench {
	t.Helper()
	b := &bench{logs: logs, data: data, output: map[uuid.UUID]string{}}
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
		Progress: func(p Progress) {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.progress = p
			b.changed.Broadcast()
		},
		Mask: mask.New(),
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
			output: "ERROR:cannot start the script: fork/exec /nowhere/sh: no such file or directory; install /nowhere/sh as a program that can be run, or correct the script's first line\n",
		},
		{
			name: "interpreter that cannot be run", script: "#!/etc/passwd\n", state: agentpb.Lifecycle_START_ERROR, status: agentpb.Timing_EXIT_FAILURE, code: 255,
			output: "ERROR:cannot start the script: fork/exec /etc/passwd: permission denied; install /etc/passwd as a program that can be run, or correct the script's first line\n",
		},
		{name: "shebang that ends as on Windows", script: "#!/bin/sh\r\necho hi", state: agentpb.Lifecycle_READY, output: "INFO:hi\n"},
		{
			name: "lines that end as on Windows", script: "if true\r\nthen exit 3\r\nfi\r\n", state: agentpb.Lifecycle_START_ERROR, status: agentpb.Timing_EXIT_FAILURE, code: 2,
			output: "(CR LF), which may be why it failed: save it with LF alone]\n",
		},
		{name: "interpreter without -c", script: "#!/usr/bin/env perl\nprint \"$]\\n\" if $0 =~ m{/.script-};", state: agentpb.Lifecycle_READY, output: "INFO:5.0"},
		{name: "interpreter of a file", script: "#!/usr/bin/busybox awk -f\nBEGIN { print 40+2 }", state: agentpb.Lifecycle_READY, output: "INFO:42\n"},
		{name: "longer than an argument may be", script: strings.Repeat("# a comment\n", 20_000) + "echo ${0##*/} | cut -c1-8", state: agentpb.Lifecycle_READY, output: "INFO:.script-\n"},
		{name: "bytes", script: `printf '\000\377\033[31m\n'`, state: agentpb.Lifecycle_READY, output: "INFO:\x00\xff\x1b[31m\n"},
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
			if got := b.printed(s); !strings.Contains(got, c.output) || c.output == "" && got != "" {
				t.Errorf("it printed %q, want %q", got, c.output)
			}
			if left, err := filepath.Glob(filepath.Join(b.data, dataName, "*", ".script-*")); err != nil || len(left) > 0 {
				t.Errorf("files of scripts are left: %v, %v", left, err)
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

// family starts, from a script of its own group: a child that ignores the hang-up as the script does, one in a group of its own, one in a session of its
// own whose child is in a third, and a daemon that left before. Each writes its id.
const family = `
	trap '' HUP
	sleep 1000 & echo $! >>pids
	bash -c 'set -m; sleep 1000 & echo $! >>pids; wait' &
	setsid bash -c 'echo $$ >>pids; setsid sleep 1000 & echo $! >>pids; wait' &
	(setsid sh -c 'echo $$ >daemon; exec sleep 1000' >/dev/null 2>&1 </dev/null &)
	until [ "$(wc -l <pids)" = 4 ] && [ -s daemon ]; do sleep 0.01; done
	echo up
	wait`

// TestTimeoutEndsTheWholeTree: whatever a script started ends with it, after its grace if it ignores the hang-up, but not a daemon that has left it.
func TestTimeoutEndsTheWholeTree(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.hangupGrace = 500 * time.Millisecond
	dir := t.TempDir()
	s := start("cd " + dir + family)
	s.Timeout = durationpb.New(3 * time.Second) // a busy machine takes a while to start all
	began := time.Now()
	if got := b.Start(t.Context(), []*agentpb.WorkspaceAgentScript{s}).State(); got != agentpb.Lifecycle_START_TIMEOUT {
		t.Error(got)
	}
	if took := time.Since(began); took < 3*time.Second+b.hangupGrace {
		t.Errorf("it was killed after %v, before its grace", took)
	}
	// Its output ends only when no process holds it any more: the children are gone too.
	if got := b.timing(t, s).GetStatus(); got != agentpb.Timing_TIMED_OUT {
		t.Error(got)
	}
	if got := b.printed(s); !strings.Contains(got, "up\n") || strings.Contains(got, "still shown") {
		t.Errorf("a child lives on: %q", got)
	}
	for _, pid := range pids(t, filepath.Join(dir, "pids"), 4) {
		eventually(t, fmt.Sprintf("process %d ended", pid), func() bool { return !alive(pid) })
	}
	daemon := pids(t, filepath.Join(dir, "daemon"), 1)[0]
	if !alive(daemon) {
		t.Error("the daemon was ended too")
	}
	if err := syscall.Kill(daemon, syscall.SIGKILL); err != nil {
		t.Error(err)
	}
}

// alive tells whether a process runs; the dead that nobody has waited for do not.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

func pids(t *testing.T, file string, n int) []int {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var found []int
	for word := range strings.FieldsSeq(string(text)) {
		pid, err := strconv.Atoi(word)
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, pid)
	}
	if len(found) != n {
		t.Fatalf("%d processes, want %d", len(found), n)
	}
	return found
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for limit := time.Now().Add(10 * time.Second); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("not in time: %s", what)
		}
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
	if got := b.Stop(ctx).State(); got != agentpb.Lifecycle_SHUTDOWN_TIMEOUT {
		t.Error(got)
	}
	if took := time.Since(began); took > 4*time.Second {
		t.Errorf("stop took %v of its second", took)
	}
	if timing := b.timing(t, stop); timing.GetStatus() != agentpb.Timing_TIMED_OUT || len(b.timings) != 1 {
		t.Errorf("%d reports, the first %v", len(b.timings), timing)
	}
	if got := b.printed(stop); !strings.Contains(got, "--shutdown-timeout") {
		t.Errorf("what ended it is not said: %q", got)
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
			schedule, err := parseCron(table)
			if err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			if _, ok := await(t.Context(), schedule, time.Time{}); !ok || time.Since(began) != want {
				t.Errorf("%s came after %v, want %v", table, time.Since(began), want)
			}
		})
	}
}

// TestCronSetBack: a clock that was set back by less than three hours since a run does not repeat it.
func TestCronSetBack(t *testing.T) {
	for back, want := range map[time.Duration]time.Duration{
		500 * time.Millisecond: time.Hour,
		2 * time.Hour:          3 * time.Hour,
		4 * time.Hour:          time.Hour, // the clock was wrong before
	} {
		synctest.Test(t, func(t *testing.T) { // it begins at a full hour
			hourly, err := parseCron("0 0 * * * *")
			if err != nil {
				t.Fatal(err)
			}
			began := time.Now().Round(0)
			if due, ok := await(t.Context(), hourly, began.Add(back)); !ok || due.Sub(began) != want {
				t.Errorf("set back by %v it was due after %v, want %v", back, due.Sub(began), want)
			}
		})
	}
}

// TestCronWhereTheClockIsShifted: what is due in an hour that is not there comes at its end, and what names an hour that comes twice does so once.
func TestCronWhereTheClockIsShifted(t *testing.T) {
	for _, c := range []struct {
		zone, table, from string
		want              []string
	}{
		{"America/New_York", "0 30 2 * * *", "2027-03-13T12:00:00-05:00", []string{"2027-03-14T03:00:00-04:00", "2027-03-15T02:30:00-04:00"}},
		{"America/New_York", "0 0,30 2 * * *", "2027-03-14T01:00:00-05:00", []string{"2027-03-14T03:00:00-04:00", "2027-03-15T02:00:00-04:00"}},
		{"America/New_York", "0 30 1 * * *", "2027-11-07T00:00:00-04:00", []string{"2027-11-07T01:30:00-04:00", "2027-11-08T01:30:00-05:00"}},
		{"America/New_York", "0 30 1 * * *", "2027-11-07T01:10:00-05:00", []string{"2027-11-08T01:30:00-05:00"}},
		{"America/New_York", "0 0 2 * * *", "2027-11-07T01:10:00-05:00", []string{"2027-11-07T02:00:00-05:00"}},
		{"America/New_York", "0 */30 * * * *", "2027-11-07T00:59:00-04:00", []string{
			"2027-11-07T01:00:00-04:00", "2027-11-07T01:30:00-04:00", "2027-11-07T01:00:00-05:00", "2027-11-07T01:30:00-05:00", "2027-11-07T02:00:00-05:00",
		}},
		{"America/New_York", "0 30 * * * *", "2027-03-14T01:00:00-05:00", []string{"2027-03-14T01:30:00-05:00", "2027-03-14T03:30:00-04:00"}},
		{"America/Sao_Paulo", "0 0 0 * * *", "2018-11-03T12:00:00-03:00", []string{"2018-11-04T01:00:00-02:00", "2018-11-05T00:00:00-02:00"}}, // no midnight
		{"Australia/Lord_Howe", "0 15 2 * * *", "2026-10-04T00:00:00+10:30", []string{"2026-10-04T02:30:00+11:00", "2026-10-05T02:15:00+11:00"}},
		{"Pacific/Apia", "0 0 12 30 12 *", "2011-12-01T00:00:00-10:00", []string{"2011-12-31T00:00:00+14:00", "2012-12-30T12:00:00+14:00"}}, // no 30th that year
		{"Europe/Berlin", "0 0 2 * * SUN", "2027-03-27T00:00:00+01:00", []string{"2027-03-28T03:00:00+02:00", "2027-04-04T02:00:00+02:00"}},
		{"UTC", "CRON_TZ=Europe/Berlin 0 30 2 * * *", "2027-03-28T00:00:00Z", []string{"2027-03-28T01:00:00Z", "2027-03-29T00:30:00Z"}},
	} {
		zone, err := time.LoadLocation(c.zone)
		if err != nil {
			t.Fatal(err)
		}
		schedule, err := parseCron(c.table)
		if err != nil {
			t.Fatal(err)
		}
		at, err := time.Parse(time.RFC3339, c.from)
		if err != nil {
			t.Fatal(err)
		}
		at = at.In(zone)
		var got []string
		for range c.want {
			at = schedule.Next(at)
			got = append(got, at.Format(time.RFC3339))
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s in %s (-want +got):\n%s", c.table, c.zone, diff)
		}
	}
}

// TestTablesThatAreRefused: what a stock agent does not read, neither do we.
func TestTablesThatAreRefused(t *testing.T) {
	for _, text := range []string{"", "@daily", "@every 1s", "* * * *", "60 * * * * *", "* * * * * * *", "every day", "CRON_TZ=Nowhere/X * * * * * *"} {
		if _, err := parseCron(text); err == nil {
			t.Errorf("%q was read", text)
		}
	}
	never, err := parseCron("0 0 0 31 FEB *")
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := await(t.Context(), never, time.Time{}); ok {
		t.Error("the 31st of February came")
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

// TestMuchOutput: bytes without a line end go to the log file whole, and hold nothing up.
func TestMuchOutput(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	s := start("head -c 100000000 /dev/zero")
	sum := 0
	b.cfg.Logs = func(uuid.UUID, agentpb.Log_Level) io.WriteCloser { return count{&sum} }
	if got := b.Start(t.Context(), []*agentpb.WorkspaceAgentScript{s}).State(); got != agentpb.Lifecycle_READY {
		t.Error(got)
	}
	b.timing(t, s)
	info, err := os.Stat(filepath.Join(b.logs, "coder-script-"+uuid.UUID(s.GetLogSourceId()).String()+".log"))
	if err != nil || info.Size() != 100_000_000 || sum != 100_000_000 {
		t.Errorf("%d bytes came, the file has %v, %v", sum, info, err)
	}
}

// count counts what one stream writes.
type count struct{ sum *int }

func (c count) Write(p []byte) (int, error) { *c.sum += len(p); return len(p), nil }
func (c count) Close() error                { return nil }
