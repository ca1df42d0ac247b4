package agent

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"

	"github.com/berthd/berth/ptyhost"
)

// terminalHost reaches the process that owns the terminals, and starts it anew should it have died.
type terminalHost struct {
	socket string
	start  func(socket string) error
	log    *slog.Logger

	starting sync.Mutex
}

// Attach implements sshd.Terminals.
func (t *terminalHost) Attach(ctx context.Context, req ptyhost.AttachRequest) (*ptyhost.Attachment, error) {
	att, err := ptyhost.Dial(t.socket).Attach(ctx, req)
	var unreachable *net.OpError
	if !errors.As(err, &unreachable) || unreachable.Op != "dial" {
		return att, err
	}
	t.log.Warn("the process that owns the terminals is gone; starting another", "error", err)
	if err := t.ensure(ctx); err != nil {
		return nil, err
	}
	return ptyhost.Dial(t.socket).Attach(ctx, req)
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
