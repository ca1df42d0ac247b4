package store

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/nats-io/nats-server/v2/server"
	"go.uber.org/goleak"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// TestMain also is the process that TestKill kills: with the variable set it only stores lines.
func TestMain(m *testing.M) {
	if dir := os.Getenv("BERTH_TEST_STORE"); dir != "" {
		appendForever(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

func open(t *testing.T, opts Options) *Store {
	t.Helper()
	s, err := Open(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func testAgent(name string) Agent {
	return Agent{ID: uuid.New(), Name: name, CreatedAt: time.Now().UTC().Truncate(time.Second)}
}

func lines(text ...string) []LogLine {
	var ls []LogLine
	for _, s := range text {
		ls = append(ls, LogLine{Output: s, Level: agentpb.Log_INFO})
	}
	return ls
}

// logged returns the output of all lines above after, and the last id.
func logged(t *testing.T, s *Store, agent uuid.UUID, after int64) (output []string, last int64) {
	t.Helper()
	last = after
	for entries, err := range s.Logs(t.Context(), agent, after) {
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.ID <= last {
				t.Errorf("id %d follows %d", e.ID, last)
			}
			last = e.ID
			output = append(output, e.Output)
		}
	}
	return output, last
}

func TestAgents(t *testing.T) {
	s, ctx := open(t, Options{}), t.Context()
	a := testAgent("one")
	a.Instance = &Instance{Provider: "aws", ID: "i-0123"}
	if err := s.CreateAgent(ctx, a); err != nil {
		t.Fatal(err)
	}
	if err := s.CreateAgent(ctx, testAgent("ONE")); !errors.Is(err, ErrExists) {
		t.Errorf("a second agent with the same name: %v, want ErrExists", err)
	}
	got, err := s.AgentByName(ctx, "One")
	if diff := cmp.Diff(a, got); err != nil || diff != "" {
		t.Errorf("AgentByName: %v\n%s", err, diff)
	}
	// Changing name and instance frees the old ones.
	b := a
	b.Name, b.Instance = "two", &Instance{Provider: "aws", ID: "i-9999"}
	if err := s.PutAgent(ctx, b); err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string]int{"i-0123": 0, "i-9999": 1, "*": 0, "": 0} {
		found, err := s.AgentsOfInstance(ctx, "aws", id)
		if err != nil || len(found) != want {
			t.Errorf("AgentsOfInstance(%q) = %d agents, %v; want %d", id, len(found), err, want)
		}
	}
	if err := s.CreateAgent(ctx, testAgent("one")); err != nil {
		t.Errorf("the old name is not free: %v", err)
	}
	if err := s.DeleteAgent(ctx, a.ID); err != nil {
		t.Fatal(err)
	}
	all, err := s.Agents(ctx)
	if err != nil || len(all) != 1 || all[0].Name != "one" {
		t.Errorf("after the deletion: %v, %v", all, err)
	}
	if _, err := s.Agent(ctx, a.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("deleted agent: %v", err)
	}
}

func TestNameOfVanishedAgentIsFree(t *testing.T) {
	s, ctx := open(t, Options{}), t.Context()
	if err := s.claimName(t.Context(), Agent{ID: uuid.New(), Name: "half"}); err != nil {
		t.Fatal(err)
	}
	if err := s.CreateAgent(ctx, testAgent("half")); err != nil {
		t.Error(err)
	}
}

func TestTokens(t *testing.T) {
	s, ctx := open(t, Options{}), t.Context()
	agent := uuid.New()
	made, err := s.MintToken(ctx, agent, false)
	if err != nil {
		t.Fatal(err)
	}
	var exchanged []wire.Secret
	for range maxExchanged + 2 {
		token, err := s.MintToken(ctx, agent, true)
		if err != nil {
			t.Fatal(err)
		}
		exchanged = append(exchanged, token)
	}
	for i, token := range exchanged {
		_, err := s.Token(ctx, token)
		if old := i < 2; errors.Is(err, ErrNotFound) != old {
			t.Errorf("exchanged token %d of %d: %v", i, len(exchanged), err)
		}
	}
	if got, err := s.Token(ctx, made); err != nil || got.AgentID != agent {
		t.Errorf("the token made for a person ended: %v", err)
	}

	revoked := make(chan string, 32)
	watch, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- s.WatchRevoked(watch, func(hash string) { revoked <- hash }) }()
	// The watch begins some time after the call; tokens are minted and revoked until it reports one.
	for seen := false; !seen; {
		token, err := s.MintToken(ctx, agent, false)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.RevokeTokens(ctx, agent); err != nil {
			t.Fatal(err)
		}
		select {
		case hash := <-revoked:
			seen = hash == TokenHash(token) || len(hash) == 64
		case <-time.After(50 * time.Millisecond):
		}
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := s.Token(ctx, made); !errors.Is(err, ErrNotFound) {
		t.Errorf("revoked token: %v", err)
	}
}

func TestLogs(t *testing.T) {
	s, ctx := open(t, Options{}), t.Context()
	agent, other, source := uuid.New(), uuid.New(), uuid.New()
	if got, _ := logged(t, s, agent, 0); len(got) != 0 {
		t.Errorf("lines of an agent that never logged: %q", got)
	}
	var want []string
	for i := range 3 {
		var batch []string
		for j := range 300 { // more than a message takes
			batch = append(batch, fmt.Sprintf("line %d.%d", i, j))
		}
		if err := s.AppendLogs(ctx, agent, LogBatch{Source: source, Lines: lines(batch...)}); err != nil {
			t.Fatal(err)
		}
		if err := s.AppendLogs(ctx, other, LogBatch{Source: source, Lines: lines("not mine")}); err != nil {
			t.Fatal(err)
		}
		want = append(want, batch...)
	}
	got, _ := logged(t, s, agent, 0)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	// From any id on, the rest follows.
	var ids []int64
	for entries, err := range s.Logs(ctx, agent, 0) {
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			ids = append(ids, e.ID)
		}
	}
	for _, i := range []int{0, 1, 254, 255, 256, 257, 299, 300, 898, 899} {
		rest, _ := logged(t, s, agent, ids[i])
		if diff := cmp.Diff(want[i+1:], rest, cmp.Comparer(func(a, b []string) bool { return strings.Join(a, "\n") == strings.Join(b, "\n") })); diff != "" {
			t.Errorf("after line %d: %s", i, diff)
		}
	}
	length, err := s.LogsLength(ctx, agent)
	if wantLength := len(strings.Join(want, "")); err != nil || length != int64(wantLength) {
		t.Errorf("LogsLength = %d, %v; want %d", length, err, wantLength)
	}
}

func TestLogsDropDoubles(t *testing.T) {
	s, ctx := open(t, Options{}), t.Context()
	agent, source, spool := uuid.New(), uuid.New(), uuid.New()
	add := func(b LogBatch) {
		t.Helper()
		if err := s.AppendLogs(ctx, agent, b); err != nil {
			t.Fatal(err)
		}
	}
	add(LogBatch{Source: source, Spool: spool, First: 1, Lines: lines("1", "2")})
	add(LogBatch{Source: source, Spool: spool, First: 1, Lines: lines("1", "2")})      // the answer was lost
	add(LogBatch{Source: source, Spool: spool, First: 2, Lines: lines("2", "3", "4")}) // part of it new
	add(LogBatch{Source: source, Spool: spool, First: 1, Lines: lines("1")})
	add(LogBatch{Source: uuid.New(), Spool: spool, First: 1, Lines: lines("other source")})
	add(LogBatch{Source: source, Spool: uuid.New(), First: 1, Lines: lines("other spool")})
	add(LogBatch{Source: source, Lines: lines("stock")})
	add(LogBatch{Source: source, Lines: lines("stock")}) // a stock agent said it twice
	add(LogBatch{Source: source, Spool: spool, First: 5, Lines: lines("5")})
	want := []string{"1", "2", "3", "4", "other source", "other spool", "stock", "stock", "5"}
	got, _ := logged(t, s, agent, 0)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestLogsConcurrent(t *testing.T) {
	s, ctx := open(t, Options{}), t.Context()
	agent := uuid.New()
	const writers, each = 8, 50
	errs := make(chan error, writers)
	for w := range writers {
		go func() {
			source, spool := uuid.New(), uuid.New()
			for i := range each {
				b := LogBatch{Source: source, Spool: spool, First: uint64(i + 1), Lines: lines(fmt.Sprint(w, " ", i))}
				if err := s.appendUntilStored(ctx, agent, b); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	for range writers {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	got, _ := logged(t, s, agent, 0)
	if len(got) != writers*each {
		t.Errorf("%d lines, want %d", len(got), writers*each)
	}
	length, err := s.LogsLength(ctx, agent)
	if want := len(strings.Join(got, "")); err != nil || length != int64(want) {
		t.Errorf("LogsLength = %d, %v; want %d", length, err, want)
	}
}

// appendUntilStored appends past this process's lock, as another server would.
func (s *Store) appendUntilStored(ctx context.Context, agent uuid.UUID, b LogBatch) error {
	for {
		err := s.appendLogs(ctx, agent, logSubject(agent)+"."+b.Spool.String()+"."+b.Source.String(), b)
		if !conflict(err) {
			return err
		}
	}
}

// TestCluster runs two servers on one NATS server outside of them: both see and number the same log.
func TestCluster(t *testing.T) {
	ns, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, NoSigs: true, NoLog: true, JetStream: true, StoreDir: t.TempDir(),
	})
	if err != nil {
		t.Fatal(err)
	}
	ns.Start()
	t.Cleanup(func() {
		ns.Shutdown()
		ns.WaitForShutdown()
	})
	if !ns.ReadyForConnections(10 * time.Second) {
		t.Fatal("no NATS server")
	}
	a, b, ctx := open(t, Options{URL: ns.ClientURL()}), open(t, Options{URL: ns.ClientURL()}), t.Context()
	agent, source, spool := testAgent("shared"), uuid.New(), uuid.New()
	if err := a.CreateAgent(ctx, agent); err != nil {
		t.Fatal(err)
	}
	if err := b.CreateAgent(ctx, testAgent("shared")); !errors.Is(err, ErrExists) {
		t.Errorf("the same name on the other server: %v", err)
	}
	token, err := a.MintToken(ctx, agent.ID, true)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := b.Token(ctx, token); err != nil || got.AgentID != agent.ID {
		t.Errorf("token on the other server: %v", err)
	}
	id := func(s *Store) string {
		v, err := s.Once(ctx, "id", func() ([]byte, error) { return []byte(uuid.NewString()), nil })
		if err != nil {
			t.Fatal(err)
		}
		return string(v)
	}
	if id(a) != id(b) {
		t.Error("two ids of one deployment")
	}
	// The agent's link moves while its first batch is still on the way: both servers store it at once.
	follow, stop := context.WithCancel(ctx)
	defer stop()
	seen := make(chan string, 1000)
	go func() {
		defer close(seen)
		for entries, err := range b.FollowLogs(follow, agent.ID, 0) {
			if err != nil {
				t.Error(err)
			}
			for _, e := range entries {
				seen <- e.Output
			}
		}
	}()
	var want []string
	for i := range 100 {
		want = append(want, fmt.Sprint(i))
	}
	errs := make(chan error, 2)
	for _, s := range []*Store{a, b} {
		go func() {
			for i := 0; i < len(want); i += 10 {
				batch := LogBatch{Source: source, Spool: spool, First: uint64(i + 1), Lines: lines(want[i : i+10]...)}
				if err := s.AppendLogs(ctx, agent.ID, batch); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	for range 2 {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	got, _ := logged(t, a, agent.ID, 0)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for _, line := range want {
		if s := <-seen; s != line {
			t.Errorf("followed %q, want %q", s, line)
		}
	}
}

func TestLogLimit(t *testing.T) {
	s, ctx := open(t, Options{Logs: LogLimits{Total: 10}}), t.Context()
	agent := uuid.New()
	if err := s.AppendLogs(ctx, agent, LogBatch{Lines: lines("123456")}); err != nil {
		t.Fatal(err)
	}
	if err := s.AppendLogs(ctx, agent, LogBatch{Lines: lines("1", "2345")}); !errors.Is(err, ErrLogLimit) {
		t.Errorf("crossing the limit: %v", err)
	}
	if err := s.AppendLogs(ctx, agent, LogBatch{Lines: lines("1234")}); err != nil {
		t.Errorf("reaching the limit: %v", err)
	}
	got, _ := logged(t, s, agent, 0)
	if diff := cmp.Diff([]string{"123456", "1234"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestLogsAreTrimmed(t *testing.T) {
	const keep = 64 << 10
	s, ctx := open(t, Options{Logs: LogLimits{Keep: keep}}), t.Context()
	agent, other, spool := uuid.New(), uuid.New(), uuid.New()
	if err := s.AppendLogs(ctx, other, LogBatch{Lines: lines("stays")}); err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		line := fmt.Sprintf("%04d", i) + strings.Repeat("x", 1020)
		if err := s.AppendLogs(ctx, agent, LogBatch{Spool: spool, First: uint64(i + 1), Lines: lines(line)}); err != nil {
			t.Fatal(err)
		}
	}
	got, _ := logged(t, s, agent, 0)
	if n := len(got); n < keep/1024-1 || n > keep/1024*9/8+1 {
		t.Errorf("%d lines of 1 KiB are kept, want between %d and %d", n, keep/1024, keep/1024*9/8)
	}
	if last := got[len(got)-1][:4]; last != "0199" {
		t.Errorf("the last line is %s", last)
	}
	if rest, _ := logged(t, s, other, 0); len(rest) != 1 {
		t.Error("another agent's log was trimmed")
	}
}

func TestFollowLogs(t *testing.T) {
	s, ctx := open(t, Options{}), t.Context()
	agent := uuid.New()
	follow, stop := context.WithCancel(ctx)
	defer stop()
	seen := make(chan string, 100)
	go func() {
		defer close(seen)
		for entries, err := range s.FollowLogs(follow, agent, 0) {
			if err != nil {
				t.Error(err)
			}
			if len(entries) == 0 {
				seen <- "(none)"
			}
			for _, e := range entries {
				seen <- e.Output
			}
		}
	}()
	if first := <-seen; first != "(none)" {
		t.Errorf("first came %q", first)
	}
	for i := range 20 {
		if err := s.AppendLogs(ctx, agent, LogBatch{Lines: lines(fmt.Sprint(i))}); err != nil {
			t.Fatal(err)
		}
		if got := <-seen; got != fmt.Sprint(i) {
			t.Errorf("line %d came as %q", i, got)
		}
	}
	stop()
	if _, more := <-seen; more {
		t.Error("a line came from nowhere")
	}
}

func TestLongLine(t *testing.T) {
	s, ctx := open(t, Options{}), t.Context()
	agent := uuid.New()
	long := strings.Repeat("é", 700<<10/2)
	if err := s.AppendLogs(ctx, agent, LogBatch{Spool: uuid.New(), First: 1, Lines: lines("a", long, "b")}); err != nil {
		t.Fatal(err)
	}
	got, last := logged(t, s, agent, 0)
	if diff := cmp.Diff([]string{"a", long, "b"}, got); diff != "" {
		t.Errorf("a long line is not what it was: %.300s", diff)
	}
	// Who read up to it reads on after it.
	long2 := strings.Repeat("x", 300<<10)
	if err := s.AppendLogs(ctx, agent, LogBatch{Lines: lines(long2)}); err != nil {
		t.Fatal(err)
	}
	rest, last := logged(t, s, agent, last)
	if len(rest) != 1 || rest[0] != long2 {
		t.Errorf("then come %d lines", len(rest))
	}
	if more, _ := logged(t, s, agent, last); len(more) != 0 {
		t.Errorf("after the last line come %d", len(more))
	}
	// As it is stored, it is cut, but not within a character.
	pieces := 0
	for part := range chunks(lines(long, long)) {
		for _, l := range part.logs {
			pieces++
			if !utf8.ValidString(l.GetOutput()) || len(l.GetOutput()) > maxChunkBytes {
				t.Error("a line was cut within a character, or not short enough")
			}
		}
	}
	if pieces < 4 {
		t.Errorf("%d pieces", pieces)
	}
}

func TestHistoryIsBounded(t *testing.T) {
	s, ctx := open(t, Options{}), t.Context()
	agent, app := uuid.New(), uuid.New()
	for i := range historyDepth + 10 {
		if err := s.AddAppStatus(ctx, wire.AppStatus{AgentID: agent, AppID: app, Message: fmt.Sprint(i)}); err != nil {
			t.Fatal(err)
		}
	}
	newest, err := s.NewestStatuses(ctx, agent, app)
	if err != nil || len(newest) != newestStatuses {
		t.Errorf("newest statuses: %v, %v", newest, err)
	}
	all, err := s.AppStatuses(ctx, agent, app)
	if err != nil || len(all) != historyDepth {
		t.Errorf("%d statuses are kept, want %d (%v)", len(all), historyDepth, err)
	}
	for i, status := range append(newest, all...) {
		if want := fmt.Sprint(historyDepth + 9 - i%newestStatuses); i < 2*newestStatuses && status.Message != want {
			t.Errorf("status %d is %q, want %q", i, status.Message, want)
		}
	}
}

func TestSessionsAreBounded(t *testing.T) {
	s, ctx := open(t, Options{}), t.Context()
	agent, ids := uuid.New(), make([]uuid.UUID, maxSessions+10)
	for i := range ids {
		ids[i] = uuid.New()
		if err := s.UpdateSession(ctx, agent, ids[i], func(v *wire.Session) { v.Type = "ssh" }); err != nil {
			t.Fatal(err)
		}
	}
	// What is known already is changed where it stands, however often that comes.
	for range 2 {
		if err := s.UpdateSession(ctx, agent, ids[len(ids)-2], func(v *wire.Session) { v.ExitCode = 7 }); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.Sessions(ctx, agent)
	if err != nil || len(got) != maxSessions {
		t.Fatalf("%d sessions are kept, want %d (%v)", len(got), maxSessions, err)
	}
	want := []wire.Session{{ID: ids[len(ids)-1], Type: "ssh"}, {ID: ids[len(ids)-2], Type: "ssh", ExitCode: 7}}
	if diff := cmp.Diff(want, got[:2]); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestNewestReports(t *testing.T) {
	s, ctx := open(t, Options{}), t.Context()
	agent := uuid.New()
	if stats, _, err := s.Stats(ctx, agent); stats != nil || err != nil {
		t.Errorf("before the first: %v, %v", stats, err)
	}
	before := time.Now().Add(-time.Second)
	if err := s.PutStats(ctx, agent, &agentpb.Stats{RxBytes: 7}); err != nil {
		t.Fatal(err)
	}
	if stats, at, err := s.Stats(ctx, agent); err != nil || stats.GetRxBytes() != 7 || at.Before(before) {
		t.Errorf("%v, %v, %v", stats, at, err)
	}
	usage := &agentpb.PushResourcesMonitoringUsageRequest{Datapoints: make([]*agentpb.PushResourcesMonitoringUsageRequest_Datapoint, 0)}
	if err := s.PutResources(ctx, agent, usage); err != nil {
		t.Fatal(err)
	}
	if usage, err := s.Resources(ctx, agent); usage == nil || err != nil {
		t.Errorf("%v, %v", usage, err)
	}
}

func TestReopen(t *testing.T) {
	dir := t.TempDir()
	s, ctx := open(t, Options{Dir: dir}), t.Context()
	a := testAgent("kept")
	if err := s.CreateAgent(ctx, a); err != nil {
		t.Fatal(err)
	}
	token, err := s.MintToken(ctx, a.ID, false)
	if err != nil {
		t.Fatal(err)
	}
	spool := uuid.New()
	if err := s.AppendLogs(ctx, a.ID, LogBatch{Spool: spool, First: 1, Lines: lines("1", "2")}); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(ctx, Options{Dir: dir}); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), dir) {
		t.Errorf("a second server with the same directory: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, Options{Dir: dir})
	if got, err := s.Token(ctx, token); err != nil || got.AgentID != a.ID {
		t.Errorf("token after reopening: %v", err)
	}
	if err := s.AppendLogs(ctx, a.ID, LogBatch{Spool: spool, First: 2, Lines: lines("2", "3")}); err != nil {
		t.Fatal(err)
	}
	got, _ := logged(t, s, a.ID, 0)
	if diff := cmp.Diff([]string{"1", "2", "3"}, got); diff != "" {
		t.Error(diff)
	}
	if err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if strings.Contains(string(data), token.Reveal()) {
			t.Errorf("%s holds the token itself", path)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// killAgent, killSpool are what the process of TestKill writes to.
var (
	killAgent = uuid.MustParse("11111111-1111-4111-8111-111111111111")
	killSpool = uuid.MustParse("22222222-2222-4222-8222-222222222222")
)

func appendForever(dir string) {
	ctx := context.Background()
	s, err := Open(ctx, Options{Dir: dir})
	if err != nil {
		panic(err)
	}
	for i := uint64(1); ; i++ {
		if err := s.AppendLogs(ctx, killAgent, LogBatch{Spool: killSpool, First: i, Lines: lines(fmt.Sprint(i))}); err != nil {
			panic(err)
		}
		fmt.Println(i) // acknowledged
	}
}

// TestKill kills a server with -9 while it stores lines: every acknowledged one is there, and what
// the agent sends again is not stored twice.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), "BERTH_TEST_STORE="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	acknowledged := 0
	for acknowledged < 500+rand.IntN(200) {
		if _, err := fmt.Fscanln(out, &acknowledged); err != nil {
			t.Fatal(err)
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	s := open(t, Options{Dir: dir})
	got, _ := logged(t, s, killAgent, 0)
	if len(got) < acknowledged {
		t.Fatalf("%d lines survive, %d were acknowledged", len(got), acknowledged)
	}
	var resent []string
	for i := acknowledged + 1; i <= acknowledged+50; i++ {
		resent = append(resent, fmt.Sprint(i))
	}
	if err := s.AppendLogs(t.Context(), killAgent, LogBatch{Spool: killSpool, First: uint64(acknowledged + 1), Lines: lines(resent...)}); err != nil {
		t.Fatal(err)
	}
	got, _ = logged(t, s, killAgent, 0)
	for i, line := range got {
		if line != fmt.Sprint(i+1) {
			t.Fatalf("line %d is %q", i+1, line)
		}
	}
}

func TestFullDisk(t *testing.T) {
	s, ctx := open(t, Options{Dir: t.TempDir()}), t.Context()
	var free atomic.Uint64
	s.embed.disk.free = func(string) (uint64, error) { return free.Load(), nil }
	agent := uuid.New()
	free.Store(minFree - 1)
	err := s.AppendLogs(ctx, agent, LogBatch{Lines: lines("lost")})
	if !errors.Is(err, ErrDiskFull) || !strings.Contains(err.Error(), "free some space") {
		t.Errorf("writing to a full disk: %v", err)
	}
	if err := s.CreateAgent(ctx, testAgent("late")); !errors.Is(err, ErrDiskFull) {
		t.Errorf("creating on a full disk: %v", err)
	}
	if _, err := s.Agents(ctx); err != nil {
		t.Errorf("reading from a full disk: %v", err)
	}
	free.Store(minFree)
	if err := s.AppendLogs(ctx, agent, LogBatch{Lines: lines("kept")}); err != nil {
		t.Errorf("after space was freed: %v", err)
	}
}

func TestBadDirectory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), Options{Dir: file}); err == nil || !strings.Contains(err.Error(), "cannot use the data directory") {
		t.Errorf("a file as data directory: %v", err)
	}
	if _, err := Open(t.Context(), Options{URL: "nats://user:hunter2@127.0.0.1:1"}); err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("a cluster that is not there: %v", err)
	}
}

func BenchmarkAppendLogs(b *testing.B) {
	s, err := Open(b.Context(), Options{Dir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	agent, spool := uuid.New(), uuid.New()
	batch := LogBatch{Spool: spool, First: 1, Lines: lines(strings.Split(strings.Repeat("a line of a usual length, more or less\n", 99), "\n")...)}
	for b.Loop() {
		if err := s.AppendLogs(b.Context(), agent, batch); err != nil {
			b.Fatal(err)
		}
		batch.First += uint64(len(batch.Lines))
	}
	b.ReportMetric(float64(b.N*len(batch.Lines))/b.Elapsed().Seconds(), "lines/s")
}

// TestSubAgents keeps sub-agents with their parent: by name, by token, and in the end.
func TestSubAgents(t *testing.T) {
	s, ctx := open(t, Options{}), t.Context()
	parent, other := testAgent("parent"), testAgent("other")
	for _, a := range []Agent{parent, other} {
		if err := s.CreateAgent(ctx, a); err != nil {
			t.Fatal(err)
		}
	}
	sub := func(name string, of Agent) Agent { return Agent{ID: uuid.New(), Name: name, ParentID: of.ID} }
	one, two := sub("one", parent), sub("other", parent) // an agent elsewhere is called so, too
	for _, a := range []Agent{one, two, sub("One", other)} {
		if err := s.CreateSubAgent(ctx, a); err != nil {
			t.Fatalf("%s: %v", a.Name, err)
		}
	}
	if err := s.CreateSubAgent(ctx, sub("ONE", parent)); !errors.Is(err, ErrExists) {
		t.Errorf("a name that is taken: %v", err)
	}
	if err := s.CreateSubAgent(ctx, sub("orphan", Agent{ID: uuid.New()})); !errors.Is(err, ErrNotFound) {
		t.Errorf("a parent that is gone: %v", err)
	}
	names := func(of Agent) (names []string) {
		t.Helper()
		found, err := s.SubAgents(ctx, of.ID)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range found {
			names = append(names, a.Name)
		}
		return names
	}
	if diff := cmp.Diff([]string{"one", "other"}, names(parent)); diff != "" {
		t.Error(diff)
	}
	if a, err := s.AgentByName(ctx, "one"); !errors.Is(err, ErrNotFound) {
		t.Errorf("found by its name alone: %v, %v", a, err)
	}

	held, err := s.HeldToken(ctx, one.ID)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := s.HeldToken(ctx, one.ID); err != nil || again != held {
		t.Errorf("held another token, %v", err)
	}
	if got, err := s.Token(ctx, held); err != nil || got.AgentID != one.ID {
		t.Errorf("token of %v, %v", got.AgentID, err)
	}
	if err := s.RevokeTokens(ctx, parent.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Token(ctx, held); !errors.Is(err, ErrNotFound) {
		t.Errorf("a token outlived those of the parent: %v", err)
	}
	fresh, err := s.HeldToken(ctx, one.ID)
	if err != nil || fresh == held {
		t.Errorf("the token that ended is held, %v", err)
	}

	if err := s.DeleteAgent(ctx, two.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.CreateSubAgent(ctx, sub("Other", parent)); err != nil {
		t.Errorf("a name that is free again: %v", err)
	}
	if err := s.DeleteAgent(ctx, parent.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Token(ctx, fresh); !errors.Is(err, ErrNotFound) {
		t.Errorf("a token outlived the parent: %v", err)
	}
	left, err := s.Agents(ctx)
	if err != nil || len(left) != 2 || len(names(parent)) != 0 || len(names(other)) != 1 {
		t.Errorf("left %v, %v", left, err)
	}
	held1, err := keys(ctx, s, s.tokens, ">")
	if err != nil || len(held1) != 0 {
		t.Errorf("tokens left behind: %v, %v", held1, err)
	}
}

// A machine that takes the place of another has nothing of what that one was given for its sub-agents.
func TestSubAgentsOfAnotherMachine(t *testing.T) {
	s, ctx := open(t, Options{}), t.Context()
	parent := testAgent("parent")
	parent.Instance = &Instance{Provider: "aws", ID: "i-1"}
	if err := s.CreateAgent(ctx, parent); err != nil {
		t.Fatal(err)
	}
	child := Agent{ID: uuid.New(), Name: "sub", ParentID: parent.ID}
	if err := s.CreateSubAgent(ctx, child); err != nil {
		t.Fatal(err)
	}
	held, err := s.HeldToken(ctx, child.ID)
	if err != nil {
		t.Fatal(err)
	}
	parent.Instance = &Instance{Provider: "aws", ID: "i-2"}
	if err := s.PutAgent(ctx, parent); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Token(ctx, held); !errors.Is(err, ErrNotFound) {
		t.Errorf("the other machine's token is good: %v", err)
	}
}

func TestWatchAgents(t *testing.T) {
	s, ctx := open(t, Options{}), t.Context()
	if err := s.CreateAgent(ctx, testAgent("first")); err != nil {
		t.Fatal(err)
	}
	watching, stop := context.WithCancel(ctx)
	seen := make(chan []string)
	done := make(chan error, 1)
	go func() {
		done <- s.WatchAgents(watching, func(agents map[uuid.UUID]Agent) {
			names := []string{}
			for _, a := range agents {
				names = append(names, a.Name)
			}
			slices.Sort(names)
			seen <- names
		})
	}()
	expect := func(want ...string) {
		t.Helper()
		if diff := cmp.Diff(want, <-seen); diff != "" {
			t.Error(diff)
		}
	}
	expect("first")
	second := testAgent("second")
	if err := s.CreateAgent(ctx, second); err != nil {
		t.Fatal(err)
	}
	expect("first", "second")
	second.Name = "renamed"
	if err := s.PutAgent(ctx, second); err != nil {
		t.Fatal(err)
	}
	expect("first", "renamed")
	if err := s.DeleteAgent(ctx, second.ID); err != nil {
		t.Fatal(err)
	}
	expect("first")
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
