package reporter

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/rpc"
)

// killed returns a copy of a reporter's directory as it is now: what is left when the process is killed.
func killed(t *testing.T, dir string) string {
	t.Helper()
	left := filepath.Join(t.TempDir(), "spool")
	if err := os.CopyFS(left, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return left
}

// reportAll reports twice of each kind that outlives the process.
func reportAll(r *Reporter) {
	r.Lifecycle(agentpb.Lifecycle_SHUTTING_DOWN)
	r.Lifecycle(agentpb.Lifecycle_OFF)
	for i := range 2 {
		r.AppStatus(&agentpb.UpdateAppStatusRequest{Slug: "a", Message: fmt.Sprint(i)})
		r.Connection(&agentpb.Connection{StatusCode: int32(i)})
		r.ScriptCompleted(&agentpb.Timing{ExitCode: int32(i)})
	}
}

func TestReportsOutliveTheProcess(t *testing.T) {
	s := newServer(t)
	dir := t.TempDir()
	reportAll(open(t, Config{Dir: dir}))
	left := killed(t, dir)
	r := open(t, Config{Dir: left})
	r.For(sourceA)
	r.Lifecycle(agentpb.Lifecycle_STARTING)
	stop := deliver(t, r, s, wire.CurrentVersion)
	flush(t, r)
	stop()
	want := []agentpb.Lifecycle_State{agentpb.Lifecycle_SHUTTING_DOWN, agentpb.Lifecycle_OFF, agentpb.Lifecycle_STARTING}
	if diff := cmp.Diff(want, s.lifecycle); diff != "" {
		t.Errorf("lifecycle (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"a:1"}, s.statuses); diff != "" {
		t.Errorf("statuses (-want +got):\n%s", diff)
	}
	if s.connections != 2 || s.timings != 2 {
		t.Errorf("%d connections and %d timings, want 2 of each", s.connections, s.timings)
	}
	// What was delivered is not sent again.
	again := open(t, Config{Dir: killed(t, left)})
	for _, c := range again.channels() {
		if n := c.backlog(); n > 0 {
			t.Errorf("%d %s are left", n, c)
		}
	}
}

// TestSessionsOfAKilledProcessEnd: the next process says so, once, and not for another agent.
func TestSessionsOfAKilledProcessEnd(t *testing.T) {
	connection := func(id byte, action agentpb.Connection_Action) *agentpb.Connection {
		return &agentpb.Connection{Id: []byte{id, 0xff}, Action: action, Type: agentpb.Connection_SSH, Ip: "127.0.0.1"}
	}
	dir := t.TempDir()
	r := open(t, Config{Dir: dir})
	r.For(sourceA)
	for id := range byte(3) {
		r.Connection(connection(id, agentpb.Connection_CONNECT))
	}
	r.Connection(connection(1, agentpb.Connection_DISCONNECT))
	for _, tt := range []struct {
		agent uuid.UUID
		ends  []string
	}{{sourceA, []string{"1 0 ", "0 255 berthd was killed", "2 255 berthd was killed"}}, {sourceB, nil}} {
		left := killed(t, dir)
		for range 2 { // what the first one says is not said again
			r := open(t, Config{Dir: left})
			r.For(tt.agent)
			var ends []string
			batch, _ := r.connections.peek()
			for n := range r.connections.waiting {
				if c := r.connections.waiting[n].value; c.GetAction() == agentpb.Connection_DISCONNECT {
					ends = append(ends, fmt.Sprintf("%d %d %s", c.GetId()[0], c.GetStatusCode(), c.GetReason()))
				}
			}
			if diff := cmp.Diff(tt.ends, ends); diff != "" {
				t.Errorf("agent %s: ends (-want +got):\n%s", tt.agent, diff)
			}
			if tt.agent == sourceB && len(batch) > 0 {
				t.Errorf("another agent's connections wait: %v", batch)
			}
			left = killed(t, left)
		}
	}
}

// TestStateOfAnEarlierProcessIsNotRepeated: berthd says after each crash how its start scripts ended.
func TestStateOfAnEarlierProcessIsNotRepeated(t *testing.T) {
	dir := t.TempDir()
	open(t, Config{Dir: dir}).Lifecycle(agentpb.Lifecycle_READY)
	r := open(t, Config{Dir: killed(t, dir)})
	r.Lifecycle(agentpb.Lifecycle_READY)
	if n := r.lifecycle.backlog(); n != 1 {
		t.Errorf("%d states wait, want 1", n)
	}
}

func TestReportsOfAnotherAgentAreDropped(t *testing.T) {
	dir := t.TempDir()
	r := open(t, Config{Dir: dir})
	r.For(sourceA)
	reportAll(r)
	r = open(t, Config{Dir: killed(t, dir)})
	r.Connection(&agentpb.Connection{}) // before we know who we are
	r.For(sourceB)
	left := map[string]int64{}
	for _, c := range r.channels() {
		if n := c.backlog(); n > 0 {
			left[c.String()] = n
		}
	}
	if diff := cmp.Diff(map[string]int64{"connections": 1}, left); diff != "" {
		t.Errorf("left (-want +got):\n%s", diff)
	}
}

// TestDamagedReports: a file that was damaged is dropped, which is said, and costs no other.
func TestDamagedReports(t *testing.T) {
	dir := t.TempDir()
	reportAll(open(t, Config{Dir: dir}))
	for name, damage := range map[string]func(path string) error{
		"cut":     func(path string) error { return os.Truncate(path, 20) },
		"empty":   func(path string) error { return os.Truncate(path, 0) },
		"flipped": func(path string) error { return flipByte(path, 30) },
	} {
		t.Run(name, func(t *testing.T) {
			left := killed(t, dir)
			if err := damage(filepath.Join(left, "app-status.reports")); err != nil {
				t.Fatal(err)
			}
			var log bytes.Buffer
			r := open(t, Config{Dir: left, Log: slog.New(slog.NewTextHandler(&log, nil))})
			if n := r.appStatus.backlog(); n != 0 {
				t.Errorf("%d statuses of a damaged file wait", n)
			}
			if n := r.lifecycle.backlog(); n != 2 {
				t.Errorf("%d lifecycle states wait, want 2", n)
			}
			if !strings.Contains(log.String(), "reports that berthd left are damaged") {
				t.Errorf("nothing was said:\n%s", &log)
			}
		})
	}
}

func flipByte(path string, at int) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	b[at] ^= 0x40
	return os.WriteFile(path, b, 0o600)
}

// TestDiskRefusesReports: they wait in memory, which is said once, and no older ones come back instead.
func TestDiskRefusesReports(t *testing.T) {
	var log bytes.Buffer
	dir := t.TempDir()
	r := open(t, Config{Dir: dir, Log: slog.New(slog.NewTextHandler(&log, nil))})
	report := func(message string) {
		r.AppStatus(&agentpb.UpdateAppStatusRequest{Slug: "a", Message: message})
	}
	report("old")
	block := filepath.Join(dir, "app-status.reports.new")
	if err := os.Mkdir(block, 0o700); err != nil {
		t.Fatal(err)
	}
	report("newer")
	report("newest")
	if n := strings.Count(log.String(), "cannot be kept on disk"); n != 1 {
		t.Errorf("said %d times, want once:\n%s", n, &log)
	}
	if n := open(t, Config{Dir: killed(t, dir)}).appStatus.backlog(); n != 0 {
		t.Errorf("%d statuses came back, want none", n)
	}
	if err := os.Remove(block); err != nil {
		t.Fatal(err)
	}
	report("written")
	after := open(t, Config{Dir: killed(t, dir)})
	if last, _ := after.appStatus.newest(); last.GetMessage() != "written" {
		t.Errorf("after the disk takes it again: %v", last)
	}
}

// TestPace: of each key one report goes in the lane's pace, the newest there is by then; other keys do not
// wait for it, and none rests while somebody waits for all.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &Reporter{log: slog.New(slog.DiscardHandler)}
		began := time.Now()
		var sent []string
		l := newLane(r, "", kind[*agentpb.UpdateAppStatusRequest]{
			bound: 8, pace: time.Second,
			call: func(_ context.Context, _ link, batch []*agentpb.UpdateAppStatusRequest) error {
				sent = append(sent, fmt.Sprintf("%v %s%s", time.Since(began), batch[0].GetSlug(), batch[0].GetMessage()))
				return nil
			},
		})
		ctx, cancel := context.WithCancel(t.Context())
		defer synctest.Wait()
		defer cancel()
		go l.deliver(ctx, link{version: wire.CurrentVersion})
		for i := range 25 { // every 100 ms
			l.put("a", &agentpb.UpdateAppStatusRequest{Slug: "a", Message: fmt.Sprint(i)})
			if i == 3 {
				l.put("b", &agentpb.UpdateAppStatusRequest{Slug: "b"})
			}
			time.Sleep(100 * time.Millisecond)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		want := []string{"0s a0", "300ms b", "1s a9", "2s a19", "3s a24"}
		got := sent
		// The report of a full second and the timer come at one time, in either order.
		for i, s := range got {
			got[i] = strings.NewReplacer("a10", "a9", "a20", "a19").Replace(s)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("sent (-want +got):\n%s", diff)
		}
		sent = nil
		l.put("a", &agentpb.UpdateAppStatusRequest{Slug: "a", Message: "x"})
		synctest.Wait()
		r.flushing.Add(1)
		l.put("a", &agentpb.UpdateAppStatusRequest{Slug: "a", Message: "y"})
		synctest.Wait()
		if len(sent) != 2 {
			t.Errorf("in a hurry %v was sent, want two", sent)
		}
		if len(l.rests) > 2 {
			t.Errorf("%d keys are remembered", len(l.rests))
		}
	})
}

// TestManyReportsAreBoundedOnDisk: a shelf's file never outgrows what is read of one.
func TestManyReportsAreBoundedOnDisk(t *testing.T) {
	dir := t.TempDir()
	r := open(t, Config{Dir: dir})
	long := &agentpb.UpdateAppStatusRequest{
		Slug: strings.Repeat("s", 64), Message: strings.Repeat("m", wire.MaxAppStatusMessage), Uri: strings.Repeat("u", 2048),
	}
	body, err := proto.Marshal(long)
	if err != nil {
		t.Fatal(err)
	}
	for i := range maxKept {
		r.appStatus.waiting = append(r.appStatus.waiting, report[*agentpb.UpdateAppStatusRequest]{key: fmt.Sprint(i, long.Slug), value: long, body: body})
	}
	r.AppStatus(long)
	info, err := os.Stat(filepath.Join(dir, "app-status.reports"))
	if err != nil || info.Size() >= maxShelf {
		t.Fatalf("%v, %v", info.Size(), err)
	}
	if n := open(t, Config{Dir: killed(t, dir)}).appStatus.backlog(); n != maxKept {
		t.Errorf("%d came back, want %d", n, maxKept)
	}
}

// FuzzShelf reads any file as a shelf, and with fits also one whose checksum is right.
func FuzzShelf(f *testing.F) {
	good, err := encodeNote(shelved{Agent: sourceA, Reports: []shelvedReport{{"a", []byte("\n\x01a")}, {"", nil}}})
	if err != nil {
		f.Fatal(err)
	}
	_, body, _ := bytes.Cut(good, []byte("\n"))
	f.Add(good, false)
	f.Add(good[:20], false)
	f.Add([]byte("00000000\n{}\n"), false)
	f.Add([]byte{}, false)
	f.Add(bytes.TrimSpace(body), true)
	f.Add([]byte(`{"reports":[{},{"body":"AAAA"},{"key":"a"},{},{},{}]}`), true)
	f.Fuzz(func(t *testing.T, b []byte, fits bool) {
		if fits {
			b = fmt.Appendf(nil, "%08x\n%s\n", crc32.Checksum(b, castagnoli), b)
		}
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "x.reports"), b, 0o600); err != nil {
			t.Fatal(err)
		}
		r := &Reporter{log: slog.New(slog.DiscardHandler), unsynced: make(chan struct{}, 1)}
		l := newLane(r, dir, kind[*agentpb.UpdateAppStatusRequest]{file: "x", bound: 4})
		if n := l.backlog(); n > 4 {
			t.Errorf("%d reports of a lane of 4", n)
		}
		l.belongTo(uuid.New())
		l.put("a", &agentpb.UpdateAppStatusRequest{Slug: "a"})
		again := newLane(r, dir, kind[*agentpb.UpdateAppStatusRequest]{file: "x", bound: 4})
		if last, ok := again.newest(); !ok || last.GetSlug() != "a" && l.backlog() == 1 {
			t.Errorf("%v came back", last)
		}
	})
}

// TestReportIsKeptWithoutAnAnswer: it waits for one that says yes or no, while newer ones replace it.
func TestReportIsKeptWithoutAnAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &Reporter{log: slog.New(slog.DiscardHandler)}
		answers := []error{errNoAnswer, rpc.Unavailable(errors.New("the disk is full")), errors.New("refused"), nil}
		var sent []string
		l := newLane(r, "", kind[*agentpb.UpdateAppStatusRequest]{
			bound: 8,
			call: func(_ context.Context, _ link, batch []*agentpb.UpdateAppStatusRequest) error {
				sent = append(sent, batch[0].GetMessage())
				answer := answers[0]
				answers = answers[1:]
				return answer
			},
		})
		ctx, cancel := context.WithCancel(t.Context())
		defer synctest.Wait()
		defer cancel()
		go l.deliver(ctx, link{version: wire.CurrentVersion})
		l.put("a", &agentpb.UpdateAppStatusRequest{Slug: "a", Message: "1"})
		synctest.Wait()
		l.put("a", &agentpb.UpdateAppStatusRequest{Slug: "a", Message: "2"})
		time.Sleep(10 * verdictDelay)
		l.put("a", &agentpb.UpdateAppStatusRequest{Slug: "a", Message: "3"})
		time.Sleep(10 * verdictDelay)
		synctest.Wait()
		if diff := cmp.Diff([]string{"1", "2", "2", "3"}, sent); diff != "" {
			t.Errorf("sent (-want +got):\n%s", diff)
		}
	})
}
