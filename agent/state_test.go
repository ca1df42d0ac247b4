package agent

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/berthd/berth/wire/agentpb"
)

func openState(t *testing.T) *State {
	t.Helper()
	s, err := OpenState(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestStateIsPrivateAndHeldByOne(t *testing.T) {
	s := openState(t)
	info, err := os.Stat(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o700 {
		t.Errorf("mode %o, want 700", info.Mode().Perm())
	}
	if _, err := OpenState(s.dir); !errors.Is(err, ErrStateBusy) {
		t.Errorf("a second OpenState = %v, want ErrStateBusy", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := OpenState(s.dir)
	if err != nil {
		t.Fatalf("after Close: %v", err)
	}
	again.Close()
}

func TestStateThatCannotBeMade(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenState(filepath.Join(file, "state")); err == nil || errors.Is(err, ErrStateBusy) {
		t.Errorf("OpenState below a file = %v, want an error that is not ErrStateBusy", err)
	}
}

func TestSocketPathIsUsable(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	for _, dir := range []string{t.TempDir(), filepath.Join(t.TempDir(), strings.Repeat("long", 40))} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		path, err := SocketPath(dir, LocalSocket)
		if err != nil {
			t.Fatal(err)
		}
		again, err := SocketPath(dir, LocalSocket)
		if err != nil || again != path {
			t.Errorf("SocketPath = %q, then %q, %v: it must be found again", path, again, err)
		}
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Errorf("cannot listen: %v", err)
			continue
		}
		l.Close()
	}
}

func TestSocketPathRefusesAForeignDirectory(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	dir := filepath.Join(tmp, strings.Repeat("long", 40))
	path, err := SocketPath(dir, LocalSocket)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(path), 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := SocketPath(dir, LocalSocket); err == nil {
		t.Error("SocketPath used a directory that others can write to")
	}
}

func TestStartupIsRememberedForOneBootOfOneAgent(t *testing.T) {
	s := openState(t)
	id := uuid.New()
	if _, ran := loadStartup(s, "boot1", id); ran {
		t.Error("an empty directory remembers a startup")
	}
	note := startup{Boot: "boot1", AgentID: id, Outcome: agentpb.Lifecycle_START_TIMEOUT.String()}
	if err := note.save(s); err != nil {
		t.Fatal(err)
	}
	last, ran := loadStartup(s, "boot1", id)
	if !ran || last.state() != agentpb.Lifecycle_START_TIMEOUT {
		t.Errorf("loadStartup = %v, %v; want the outcome saved", last, ran)
	}
	if _, ran := loadStartup(s, "boot2", id); ran {
		t.Error("a startup of another boot counts")
	}
	if _, ran := loadStartup(s, "boot1", uuid.New()); ran {
		t.Error("a startup of another agent counts")
	}
	if err := forgetStartup(s); err != nil {
		t.Fatal(err)
	}
	if err := forgetStartup(s); err != nil {
		t.Errorf("forgetting twice: %v", err)
	}
	if _, ran := loadStartup(s, "boot1", id); ran {
		t.Error("a forgotten startup counts")
	}
}

func TestStartupCutOffCountsAsFailed(t *testing.T) {
	for _, outcome := range []string{"", "nonsense"} {
		if got := (startup{Outcome: outcome}).state(); got != agentpb.Lifecycle_START_ERROR {
			t.Errorf("state of %q = %v, want START_ERROR", outcome, got)
		}
	}
}

func TestDamagedStartupRunsScripts(t *testing.T) {
	s := openState(t)
	if err := os.WriteFile(s.Path(startupFile), []byte(`{"boot":"boot1"`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, ran := loadStartup(s, "boot1", uuid.Nil); ran {
		t.Error("a damaged note counts")
	}
}

func TestBootIDIsSteady(t *testing.T) {
	if _, err := os.Stat("/proc/1/stat"); err != nil {
		t.Skip("this system has no /proc")
	}
	if id := bootID(); id == "" || id != bootID() {
		t.Errorf("bootID = %q, then %q", id, bootID())
	}
}
