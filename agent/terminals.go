package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/berthd/berth/account"
	"github.com/berthd/berth/ptyhost"
	"github.com/berthd/berth/sshd"
)

// terminalHost reaches the process that owns the terminals, and starts it anew should it have died.
type terminalHost struct {
	socket string
	user   *account.User // whom it runs as
	start  func(socket string) error
	idle   idleTimes
	log    *slog.Logger

	// ssh are the SSH clients that hold terminals; nil means that there are none.
	ssh sshHolders

	scrollback int // lines of new terminals; 0 is the host's default

	starting sync.Mutex
	lost     atomic.Pointer[time.Time] // when it was last found killed
}

// idleTimes are how long a terminal lives on with nobody attached; 0 means for ever.
type idleTimes struct{ unnamed, named time.Duration }

// of is the time of a terminal that has this name or, "", none.
func (t idleTimes) of(name string) time.Duration {
	if name == "" {
		return t.unnamed
	}
	return t.named
}

// sshHolders knows the terminals of SSH sessions; *sshd.Server is one.
type sshHolders interface {
	Held(ctx context.Context) map[string]time.Time
	TakeUp(ctx context.Context, id string)
}

// terminalsSocket is the file name of the process's socket.
const terminalsSocket = "ptyhost.sock"

// watchAgain is how long to wait before watching anew what could not be watched.
const watchAgain = 10 * time.Second

// Attach implements sshd.Terminals.
func (t *terminalHost) Attach(ctx context.Context, req ptyhost.AttachRequest) (att *ptyhost.Attachment, err error) {
	if req.Create != nil {
		req.Create.Scrollback = t.scrollback
	}
	err = t.ask(ctx, func(c *ptyhost.Client) error {
		att, err = c.Attach(ctx, req)
		return err
	})
	return att, err
}

// Kill implements sshd.Terminals.
func (t *terminalHost) Kill(ctx context.Context, id, signal string) error {
	return t.ask(ctx, func(c *ptyhost.Client) error { return c.Kill(ctx, id, signal) })
}

// shownTerminal is a terminal that can be attached to.
type shownTerminal struct {
	ptyhost.SessionInfo
	cutOff time.Time // since when the SSH client that opened it is gone; zero for other terminals
}

// list returns the terminals that can be attached to: of those of SSH sessions only the ones that were cut off.
func (t *terminalHost) list(ctx context.Context) ([]shownTerminal, error) {
	var all []ptyhost.SessionInfo
	err := t.ask(ctx, func(c *ptyhost.Client) (err error) {
		all, err = c.List(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}
	var held map[string]time.Time
	if t.ssh != nil && slices.ContainsFunc(all, func(info ptyhost.SessionInfo) bool { return info.Kind == sshd.KindSSH && info.Viewers > 0 }) {
		held = t.ssh.Held(ctx)
	}
	var shown []shownTerminal
	for _, info := range all {
		silent, isHeld := held[info.ID]
		switch {
		case info.Bound || isHeld && silent.IsZero(): // its client is there
		case info.Kind != sshd.KindSSH:
			shown = append(shown, shownTerminal{SessionInfo: info})
		case isHeld:
			shown = append(shown, shownTerminal{info, silent})
		default:
			shown = append(shown, shownTerminal{info, info.LeftAt})
		}
	}
	return shown, nil
}

// takenUp is told that somebody attached to a terminal, and may type in it.
func (t *terminalHost) takenUp(ctx context.Context, info ptyhost.SessionInfo) {
	if t.ssh != nil && info.Kind == sshd.KindSSH {
		t.ssh.TakeUp(ctx, info.ID)
	}
}

// close ends a terminal.
func (t *terminalHost) close(ctx context.Context, id string) error { return t.Kill(ctx, id, "") }

// rename gives a terminal a name, and the lifetime of one that has a name.
func (t *terminalHost) rename(ctx context.Context, id, name string) error {
	return t.ask(ctx, func(c *ptyhost.Client) error { return c.Rename(ctx, id, name, t.idle.named) })
}

// ask calls the process, and once more if it was gone and another was started.
func (t *terminalHost) ask(ctx context.Context, call func(*ptyhost.Client) error) error {
	err := call(t.dial())
	var unreachable *net.OpError
	if !errors.As(err, &unreachable) || unreachable.Op != "dial" {
		return err
	}
	t.log.Warn("the process that owns the terminals is gone; starting another", "error", err)
	if err := t.ensure(ctx); err != nil {
		return err
	}
	return call(t.dial())
}

// watch starts another process whenever the one that owns the terminals ends, until ctx is done.
func (t *terminalHost) watch(ctx context.Context) {
	for ctx.Err() == nil {
		err := t.dial().Watch(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			lost := time.Now()
			t.lost.Store(&lost)
			t.log.Error("the process that owns the terminals was killed, and every terminal ended with it; starting another")
			if err = t.ensure(ctx); err == nil {
				continue
			}
			t.log.Warn("terminals do not work yet; trying again when one is opened", "error", err)
		}
		// It cannot be started now, or is of a berthd that cannot tell: whoever opens a terminal next will notice.
		if !pause(ctx, watchAgain) {
			return
		}
	}
}

// lostAt tells when terminals were last lost, as an addition to a sentence.
func (t *terminalHost) lostAt() string {
	if lost := t.lost.Load(); lost != nil {
		return fmt.Sprintf("; the process that owned the terminals was killed at %s", lost.UTC().Format("15:04:05 MST"))
	}
	return ""
}

// ensure finds the process or starts it. It sees a start through even when ctx ends meanwhile: a
// process that does not listen yet could not be told to end, and would stay behind.
func (t *terminalHost) ensure(ctx context.Context) error {
	t.starting.Lock()
	defer t.starting.Unlock()
	return t.dial().Ensure(context.WithoutCancel(ctx), func() error {
		if t.start == nil {
			return errors.New("cannot start the process that owns the terminals: it is run by something else")
		}
		return t.start(t.socket)
	})
}

func (t *terminalHost) dial() *ptyhost.Client { return ptyhost.DialAs(t.user, t.socket) }

// end ends every terminal and the process.
func (t *terminalHost) end(ctx context.Context) error { return t.dial().Shutdown(ctx) }
