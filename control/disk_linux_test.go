package control

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/rpc"
)

// TestFullDisk fills a real disk under a running server: writing answers in plain words, reading goes
// on, and all is well once there is space again.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err != nil {
		t.Fatalf("this test needs root, to mount a disk of its own: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	x := serve(t, Config{DataDir: filepath.Join(dir, "data")})
	id, token := x.create("demo")
	ballast := filepath.Join(dir, "ballast")
	fill := func() {
		t.Helper()
		f, err := os.Create(ballast)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for err == nil {
			_, err = f.Write(make([]byte, 1<<20))
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
	say := func() (int, string) {
		return x.call("PATCH", "/api/v2/workspaceagents/me/logs", `{"logs":[{"output":"x"}]}`, as(token)...)
	}
	if status, body := say(); status != http.StatusOK {
		t.Fatalf("%d %s", status, body)
	}
	l := x.connect(token)
	fill()
	eventually(t, "a write is refused", func() bool {
		status, body := say()
		return status == http.StatusInternalServerError && strings.Contains(body, "free some space")
	})
	// A report that an agent would drop if it were refused is put off.
	_, err := l.agent.ReportConnection(t.Context(), &agentpb.ReportConnectionRequest{Connection: &agentpb.Connection{
		Id: id[:], Action: agentpb.Connection_CONNECT, Type: agentpb.Connection_SSH}})
	if rpc.Code(err) != wire.CodeUnavailable {
		t.Errorf("a connection: %v, code %d", err, rpc.Code(err))
	}
	if status, body := x.call("GET", "/api/v2/workspaceagents/"+id.String(), "", x.asUser()...); status != http.StatusOK {
		t.Errorf("reading: %d %s", status, body)
	}
	x.stop()
	if _, err := New(t.Context(), x.config); !errors.Is(err, store.ErrDiskFull) || !strings.Contains(err.Error(), "free some space") {
		t.Errorf("starting on a full disk: %v", err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	x = serve(t, Config{DataDir: filepath.Join(dir, "data")})
	if status, body := say(); status != http.StatusOK {
		t.Errorf("after space was freed: %d %s", status, body)
	}
}
