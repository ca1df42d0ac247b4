package scripts

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/berthd/berth/scripts/hold"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// line is one workspace whose runners come and go, as when berthd is started again and again. Its account of streams is what a spool has.
type line struct {
	t                *testing.T
	logs, data, held string

	mu    sync.Mutex
	taken map[uuid.UUID]uint64
	text  map[agentpb.Log_Level]string
}

func newLine(t *testing.T) *line {
	t.Helper()
	held, err := os.MkdirTemp("", "held") // a short path, for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if left, err := os.ReadDir(held); err != nil || len(left) > 0 {
			t.Errorf("%v are left, %v", left, err)
		}
		os.RemoveAll(held)
	})
	return &line{t: t, logs: t.TempDir(), data: t.TempDir(), held: held, taken: map[uuid.UUID]uint64{}, text: map[agentpb.Log_Level]string{}}
}

// next is the next runner. At the test's end it is stopped.
func (l *line) next() *bench {
	b := newBenchIn(l.t, l.logs, l.data)
	b.cfg.HoldDir = l.held
	b.cfg.Holder = func() []*exec.Cmd {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), envHolder+"=1", "GORACE=atexit_sleep_ms=0")
		return []*exec.Cmd{{Path: "/nowhere"}, {Path: "/bin/true"}, cmd} // the first that works
	}
	b.cfg.Stream = func(_ uuid.UUID, level agentpb.Log_Level, id uuid.UUID, kept uint64) hold.Taker {
		l.mu.Lock()
		defer l.mu.Unlock()
		if kept > l.taken[id] {
			l.t.Errorf("%d bytes are kept from, only %d are taken", kept, l.taken[id])
		}
		return &account{l, level, id}
	}
	return b
}

// account takes a stream.
type account struct {
	*line
	level agentpb.Log_Level
	id    uuid.UUID
}

func (a *account) Write(b []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.text[a.level] += string(b)
	a.taken[a.id] += uint64(len(b))
	return len(b), nil
}

func (a *account) Settled() uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.taken[a.id]
}

func (a *account) Close() error { return nil }

func (l *line) printed(level agentpb.Log_Level) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text[level]
}

// begin starts scripts without waiting for them.
func (b *bench) begin(scripts ...*agentpb.WorkspaceAgentScript) (result <-chan Result, leave func()) {
	ctx, cancel := context.WithCancel(context.Background())
	started := make(chan Result, 1)
	go func() { started <- b.Start(ctx, scripts) }()
	return started, func() {
		cancel()
		<-started
		b.Leave()
	}
}

func open(t *testing.T, gate string) {
	t.Helper()
	if err := os.WriteFile(gate, nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestScriptsOutliveTheRunner: what runs when a runner leaves is taken up by the next, with every line, the secrets, the true times and how it ends, and with what
// ended before.
func TestScriptsOutliveTheRunner(t *testing.T) {
	t.Parallel()
	l := newLine(t)
	gate := filepath.Join(l.data, "gate")
	long := start("for i in 1 2 3; do seq -f \"$i %g\" 1000; seq -f \"$i err %g\" 1000 >&2; until [ -e " + gate + "$i ]; do sleep 0.01; done; done; exit 5")
	failed := start("exit 1")
	all := []*agentpb.WorkspaceAgentScript{long, failed}
	first := l.next()
	first.cfg.Mask.Add(wire.Secret("a-secret-of-the-first"))
	began := time.Now()
	_, leave := first.begin(all...)
	first.await(func() bool { return first.progress.Failed == 1 })
	eventually(t, "the first part is there", func() bool { return strings.HasSuffix(l.printed(agentpb.Log_ERROR), "1 err 1000\n") })
	leave()
	progress := first.progress
	if len(progress.Runs) != 1 {
		t.Fatalf("it leaves %+v", progress)
	}
	open(t, gate+"1") // the next part is printed while nobody is there

	second := l.next()
	second.TakeUp()
	eventually(t, "the second part is there", func() bool { return strings.HasSuffix(l.printed(agentpb.Log_INFO), "2 1000\n") })
	if got := second.cfg.Mask.String("a-secret-of-the-first"); strings.Contains(got, "secret") {
		t.Error("its secret is not hidden any more")
	}
	second.Leave() // before it has done anything
	open(t, gate+"2")
	open(t, gate+"3")
	eventually(t, "the script has ended", func() bool { return logFile(t, l, long, "3 err 1000\n") })
	ended := time.Now()

	third := l.next()
	third.TakeUp()
	if got := third.Resume(t.Context(), all, progress); got.Failed != 2 || got.State() != agentpb.Lifecycle_START_ERROR {
		t.Errorf("it ends as %+v", got)
	}
	timing := third.timing(t, long)
	if timing.GetExitCode() != 5 || timing.GetStage() != agentpb.Timing_START || timing.GetStatus() != agentpb.Timing_EXIT_FAILURE ||
		timing.GetStart().AsTime().Before(began) || timing.GetEnd().AsTime().After(ended.Add(time.Second)) {
		t.Errorf("reported %v", timing)
	}
	var out, errs strings.Builder
	for i := range 3 {
		for n := range 1000 {
			fmt.Fprintf(&out, "%d %d\n", i+1, n+1)
			fmt.Fprintf(&errs, "%d err %d\n", i+1, n+1)
		}
	}
	if got := l.printed(agentpb.Log_INFO); got != out.String() {
		t.Errorf("standard output: %d bytes, want %d", len(got), out.Len())
	}
	if got := l.printed(agentpb.Log_ERROR); got != errs.String() {
		t.Errorf("standard error: %d bytes, want %d", len(got), errs.Len())
	}
	if len(third.progress.Runs) > 0 {
		t.Errorf("it notes %+v", third.progress)
	}
}

// logFile tells whether a script's log file has a text.
func logFile(t *testing.T, l *line, s *agentpb.WorkspaceAgentScript, want string) bool {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(l.logs, "coder-script-"+uuid.UUID(s.GetLogSourceId()).String()+".log"))
	return err == nil && strings.Contains(string(text), want)
}

// TestTimeoutWhileNobodyIsThere: a script's time runs out between two runners, and all that came of it is ended.
func TestTimeoutWhileNobodyIsThere(t *testing.T) {
	t.Parallel()
	l := newLine(t)
	dir := t.TempDir()
	s := start("cd " + dir + family)
	s.Timeout = durationpb.New(3 * time.Second)
	first := l.next()
	first.hangupGrace = 500 * time.Millisecond
	_, leave := first.begin(s)
	eventually(t, "all are up", func() bool { return l.printed(agentpb.Log_INFO) == "up\n" })
	leave()
	for _, pid := range pids(t, filepath.Join(dir, "pids"), 4) {
		eventually(t, fmt.Sprintf("process %d ended", pid), func() bool { return !alive(pid) })
	}
	second := l.next()
	second.TakeUp()
	if got := second.Resume(t.Context(), []*agentpb.WorkspaceAgentScript{s}, first.progress).State(); got != agentpb.Lifecycle_START_TIMEOUT {
		t.Error(got)
	}
	if got := second.timing(t, s).GetStatus(); got != agentpb.Timing_TIMED_OUT {
		t.Error(got)
	}
	if err := syscall.Kill(pids(t, filepath.Join(dir, "daemon"), 1)[0], syscall.SIGKILL); err != nil {
		t.Error(err)
	}
}

// TestStopEndsWhatWasTakenUp: a stop hangs up what an earlier runner has started, and nothing is left; cron scripts do not overlap with what is held.
func TestStopEndsWhatWasTakenUp(t *testing.T) {
	t.Parallel()
	l := newLine(t)
	pid := filepath.Join(l.data, "pid")
	s, cron := start("trap 'echo hung; exit 3' HUP; echo $$ >"+pid+"; while :; do sleep 0.01; done"), script("echo tick; while :; do sleep 0.01; done")
	cron.Cron = "* * * * * *"
	first := l.next()
	_, leave := first.begin(s)
	eventually(t, "it runs", func() bool { text, err := os.ReadFile(pid); return err == nil && len(text) > 0 })
	first.Adopt([]*agentpb.WorkspaceAgentScript{cron})
	eventually(t, "the other runs", func() bool { return l.printed(agentpb.Log_INFO) == "tick\n" })
	leave()
	second := l.next()
	second.TakeUp()
	second.Adopt([]*agentpb.WorkspaceAgentScript{s, cron})
	<-time.After(1500 * time.Millisecond) // it would come again
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	second.Stop(ctx)
	if got := second.timing(t, s); got.GetExitCode() != 3 {
		t.Errorf("reported %v", got)
	}
	if got := l.printed(agentpb.Log_INFO); got != "tick\nhung\n" {
		t.Errorf("they printed %q", got)
	}
	if alive(pids(t, pid, 1)[0]) {
		t.Error("it lives on")
	}
}

// TestHolderIsKilled: it is said, the script counts as failed, and later runners find nothing.
func TestHolderIsKilled(t *testing.T) {
	t.Parallel()
	l := newLine(t)
	b := l.next()
	s := start("trap 'exit 0' PIPE; echo $PPID; while sleep 0.01; do echo; done 2>/dev/null")
	result, _ := b.begin(s)
	var holder int
	eventually(t, "it runs", func() bool { n, err := fmt.Sscan(l.printed(agentpb.Log_INFO), &holder); return n == 1 && err == nil })
	if err := syscall.Kill(holder, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if got := (<-result).State(); got != agentpb.Lifecycle_START_ERROR {
		t.Error(got)
	}
	if got := b.printed(s); !strings.Contains(got, "the process that held it was killed") {
		t.Errorf("it is not said: %q", got)
	}
	next := l.next()
	next.TakeUp()
	if len(next.taken) > 0 {
		t.Error("it was taken up")
	}
	if got := next.Resume(t.Context(), nil, Progress{Runs: []uuid.UUID{uuid.New()}, TimedOut: 1}); !cmp.Equal(got, Result{Stage: agentpb.Timing_START, Failed: 1, TimedOut: 1}) {
		t.Errorf("what is not held any more counts as %+v", got)
	}
}

// TestChildHoldsThePipeOverRunners: a child that a script left is named once, and what it prints arrives with each runner.
func TestChildHoldsThePipeOverRunners(t *testing.T) {
	t.Parallel()
	l := newLine(t)
	gate := filepath.Join(l.data, "gate")
	s := start("(until [ -e " + gate + " ]; do sleep 0.01; done; echo late) & exit 0")
	first := l.next()
	first.pipeGrace = 100 * time.Millisecond
	ended, told := first.Runner.begin(first.running, []*run{newRun(s, agentpb.Timing_START)})
	(<-ended).settle()
	<-told
	if got := first.timing(t, s).GetStatus(); got != agentpb.Timing_PIPES_LEFT_OPEN {
		t.Error(got)
	}
	first.Leave()
	second := l.next()
	second.TakeUp()
	second.Adopt(nil)
	open(t, gate)
	eventually(t, "it arrives", func() bool { return l.printed(agentpb.Log_INFO) == "late\n" })
	eventually(t, "the holder has ended", func() bool { left, err := os.ReadDir(l.held); return err == nil && len(left) == 0 })
	if len(second.timings) > 0 || second.printed(s) != "" {
		t.Errorf("it is said again: %v, %q", second.timings, second.printed(s))
	}
}
