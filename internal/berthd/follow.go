package berthd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/berthd/berth/agent"
	"github.com/berthd/berth/client"
	"github.com/berthd/berth/internal/upgrade"
	"github.com/berthd/berth/oom"
	"github.com/berthd/berth/shell"
)

// followEvery is how often a server is asked which berthd it hosts, beside each new link: an upgraded server has started
// anew, and so has the link.
const followEvery = time.Hour

// refusedFile is the name in the state directory under which an upgrade that failed is noted.
const refusedFile = "upgrade-refused.json"

// follower keeps this berthd at the version that its server hosts (--auto-upgrade), by starting the verb upgrade.
type follower struct {
	source  upgrade.Source
	refused string // where an upgrade that failed is noted
	command func() *exec.Cmd
	log     *slog.Logger
	linked  chan struct{} // a value for a new link
}

// follower makes what follows the server; nil if that is not wanted.
func (s *settings) follower(self []string, server agent.Server, state *agent.State, socket string, log *slog.Logger) *follower {
	if !s.autoUpgrade {
		return nil
	}
	f := &follower{
		source:  upgrade.Source{URL: server.URL, HTTP: server.HTTP, Header: server.Header},
		refused: state.Path(refusedFile), log: log, linked: make(chan struct{}, 1),
	}
	f.command = func() *exec.Cmd {
		cmd := exec.Command(self[0], append(append([]string{}, self[1:]...), "upgrade", "--socket", socket, "--record", f.refused)...)
		if exe, err := os.Executable(); err == nil {
			cmd.Path = exe
		}
		// It outlives this berthd, and needs no token.
		cmd.Env = append(append(os.Environ(), "BERTH_URL="+s.server.url), s.server.variables()...)
		cmd.Dir = filepath.Dir(f.refused)
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr // a file, not a pipe of this process
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		return cmd
	}
	return f
}

// tell is an agent's Event callback.
func (f *follower) tell(e agent.Event) {
	if f == nil || e.Step != agent.StepLinked {
		return
	}
	select {
	case f.linked <- struct{}{}:
	default:
	}
}

// run follows until ctx is done.
func (f *follower) run(ctx context.Context) {
	var told string // what was said last, not to say it every hour
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.linked:
		case <-time.After(followEvery/2 + rand.N(followEvery)): // not all machines at once
		}
		if err := f.once(ctx); err != nil && ctx.Err() == nil && err.Error() != told {
			told = err.Error()
			f.log.Warn("cannot follow the server's version of berthd", "error", err)
		}
	}
}

// once looks which version the server hosts, and upgrades to it.
func (f *follower) once(ctx context.Context) error {
	hosted, err := f.source.Version(ctx)
	if err != nil {
		return client.Explain(err)
	}
	if hosted == version {
		return nil
	}
	if was := readRefused(f.refused, f.log); was.Version == hosted {
		return fmt.Errorf("%s is hosted, but was tried already: %s; run berthd upgrade to try it again", hosted, was.Cause)
	}
	f.log.Info("the server hosts another version of berthd; it takes the place of this one", "this", version, "other", hosted)
	cmd := f.command()
	if err := oom.Start(cmd); err != nil {
		return fmt.Errorf("cannot start the upgrade: %w", err)
	}
	done := make(chan error, 1)
	go func() { done <- shell.Wait(cmd) }()
	select {
	case <-ctx.Done(): // for the new one, most likely: it goes on without us
		return nil
	case err := <-done:
		if err != nil {
			return errors.New("the upgrade failed; what it said is above")
		}
		return nil
	}
}
