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

	"github.com/berthd/berth/ptyhost"
)

// terminalHost reaches the process that owns the terminals, and starts it anew should it have died.
type terminalHost struct {
	socket string
	start  func(socket string) error
	idle   idleTimes
	log    *slog.Logger

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

// list returns the terminals that can be attached to: not those that belong to one SSH session.
func (t *terminalHost) list(ctx context.Context) (all []ptyhost.SessionInfo, err error) {
	err = t.ask(ctx, func(c *ptyhost.Client) error {
		all, err = c.List(ctx)
		return err
	})
	return slices.DeleteFunc(all, func(info ptyhost.SessionInfo) bool { return info.Bound }), err
}

// close ends a terminal.
func (t *terminalHost) close(ctx context.Context, id string) error {
	return t.ask(ctx, func(c *ptyhost.Client) error { return c.Kill(ctx, id, "") })
}

// rename gives a terminal a name, and the lifetime of one that has a name.
func (t *terminalHost) rename(ctx context.Context, id, name string) error {
	return t.ask(ctx, func(c *ptyhost.Client) error { return c.Rename(ctx, id, name, t.idle.named) })
}

// ask calls the process, and once more if it was gone and another was started.
func (t *terminalHost) ask(ctx context.Context, call func(*ptyhost.Client) error) error {
	err := call(ptyhost.Dial(t.socket))
	var unreachable *net.OpError
	if !errors.As(err, &unreachable) || unreachable.Op != "dial" {
		return err
	}
	t.log.Warn("the process that owns the terminals is gone; starting another", "error", err)
	if err := t.ensure(ctx); err != nil {
		return err
	}
	return call(ptyhost.Dial(t.socket))
}

// watch starts another process whenever the one that owns the terminals ends, until ctx is done.
func (t *terminalHost) watch(ctx context.Context) {
	for ctx.Err() == nil {
		err := ptyhost.Dial(t.socket).Watch(ctx)
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
		if !pause(ctx, watchAgain, nil) {
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
	_, err := ptyhost.Ensure(context.WithoutCancel(ctx), t.socket, func() error {
		if t.start == nil {
			return errors.New("cannot start the process that owns the terminals: it is run by something else")
		}
		return t.start(t.socket)
	})
	return err
}

// end ends every terminal and the process.
func (t *terminalHost) end(ctx context.Context) error { return ptyhost.Dial(t.socket).Shutdown(ctx) }
