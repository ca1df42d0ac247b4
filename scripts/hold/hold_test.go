package hold

import (
	"bufio"
	"bytes"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// taker takes a stream from some offset on.
type taker struct {
	mu     sync.Mutex
	from   uint64
	text   bytes.Buffer
	closed bool
}

func (t *taker) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.text.Write(b)
}

func (t *taker) Settled() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.from + uint64(t.text.Len())
}

func (t *taker) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	return nil
}

// holding runs a job of a shell's; log has what it printed.
func holding(t *testing.T, script string, patience time.Duration) (held *Held, socket, log string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "hold") // a short path, for the socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket, log = filepath.Join(dir, "s"), filepath.Join(dir, "log")
	file, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := net.Pipe()
	var running sync.WaitGroup
	running.Go(func() {
		Run(Job{
			Path: "/bin/sh", Args: []string{"sh", "-c", script}, Dir: dir, Env: []string{"PATH=/usr/bin:/bin"},
			Grace: time.Second, Patience: patience, Socket: socket, Tag: []byte(`"tag"`),
		}, nil, theirs, file)
	})
	t.Cleanup(running.Wait)
	held, err = Attach(ours)
	if err != nil {
		t.Fatal(err)
	}
	return held, socket, log
}

func attach(t *testing.T, socket string) *Held {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	held, err := Attach(conn)
	if err != nil {
		t.Fatal(err)
	}
	return held
}

// TestOutputWaits: with nobody attached a command prints as much as there is room for, then it waits, and who comes next misses nothing.
func TestOutputWaits(t *testing.T) {
	const size = 8 << 20 // more than all rooms together
	held, socket, log := holding(t, "head -c 8388608 /dev/zero; echo done >done; exit 7", time.Hour)
	held.Close()
	grown := func() int64 {
		info, err := os.Stat(log)
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	for limit := time.Now().Add(10 * time.Second); grown() < window-minRead; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("only %d bytes were read", grown())
		}
	}
	if got := grown(); got > window {
		t.Errorf("%d bytes were read, %d is to be kept", got, window)
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(log), "done")); err == nil {
		t.Error("it did not wait")
	}
	next := attach(t, socket)
	if next.State.Pid != os.Getpid() || string(next.State.Tag) != `"tag"` || next.State.Kept != [streams]uint64{} {
		t.Errorf("it finds %+v", next.State)
	}
	var out, errs taker
	var exit Exit
	if err := next.Follow([streams]Taker{&out, &errs}, func(e Exit) { exit = e }); err != nil {
		t.Fatal(err)
	}
	if out.text.Len() != size || exit.Code != 7 || !out.closed || !errs.closed || grown() != size {
		t.Errorf("%d bytes came, %d are in its log file; exit %+v", out.text.Len(), grown(), exit)
	}
	if err := next.Reported(); err != nil {
		t.Error(err)
	}
	next.Close()
	last := attach(t, socket)
	if !last.State.Reported || last.State.Kept[Stdout] < size-window {
		t.Errorf("the last finds %+v", last.State)
	}
	if err := last.Release(); err != nil {
		t.Error(err)
	}
	last.Wait(5 * time.Second)
}

// TestPatience: with nobody there for long the command goes on into its log file, and the holder ends with it.
func TestPatience(t *testing.T) {
	held, socket, log := holding(t, "head -c 8388608 /dev/zero; until [ -e go ]; do sleep 0.01; done", 50*time.Millisecond)
	held.Close()
	for limit := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if info, err := os.Stat(log); err == nil && info.Size() == 8<<20 {
			break
		}
		if time.Now().After(limit) {
			t.Fatal("the command does not go on")
		}
	}
	if _, err := os.Stat(socket); err == nil {
		t.Error("it can be attached to")
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(log), "go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestJobTravels: what is no text arrives as it is.
func TestJobTravels(t *testing.T) {
	want := Job{Path: "/bin/\xff", Args: []string{"\xfe", ""}, Dir: "/\xfd", Env: []string{"A=\xfc"}, Timeout: time.Second, Tag: []byte(`{}`)}
	text, err := bequeath(want, true)
	if err != nil {
		t.Fatal(err)
	}
	got, hasLog, err := inherit(text)
	if diff := cmp.Diff(want, got); diff != "" || err != nil || !hasLog {
		t.Errorf("%v: (-want +got)\n%s", err, diff)
	}
	if _, _, err := inherit([]byte("{}")); err == nil {
		t.Error("a job without a command")
	}
}

func FuzzFrames(f *testing.F) {
	f.Add(appendFrame(appendFrame(nil, frame{kindData, Stderr, []byte("text")}), frame{kind: kindEnd}))
	f.Add(appendFrame(nil, frame{kindTaken, 9, nil}))
	f.Add([]byte{1, 0, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bufio.NewReader(bytes.NewReader(b))
		var read, buf []byte
		for {
			var got frame
			var err error
			if got, buf, err = readFrame(r, buf, maxCommand); err != nil {
				break
			}
			if len(got.body) > maxCommand || got.stream >= streams {
				t.Fatalf("a frame of stream %d with %d bytes", got.stream, len(got.body))
			}
			read = appendFrame(read, got)
		}
		if !strings.HasPrefix(string(b), string(read)) {
			t.Errorf("%q was read as %q", b, read)
		}
	})
}
