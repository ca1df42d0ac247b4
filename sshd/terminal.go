package sshd

import (
	"context"
	"fmt"
	"io"

	"github.com/google/uuid"

	"github.com/berthd/berth/ptyhost"
	"github.com/berthd/berth/shell"
)

// attach runs spec in a terminal of the terminal host. It returns when the program has ended and all it wrote was sent, or when the session has,
// which ends the program.
func (s *session) attach(spec shell.Spec, login bool) (int, error) {
	if login && s.conn.srv.cfg.Banner != nil {
		s.conn.srv.shield("banner", func() { s.conn.srv.cfg.Banner(s.ch) })
	}
	att, err := s.conn.srv.cfg.Terminals.Attach(s.ctx, ptyhost.AttachRequest{
		ID: uuid.NewString(),
		Create: &ptyhost.CreateRequest{
			Argv: spec.Argv, Dir: spec.Dir, Env: spec.Env,
			TTYVariable:  "SSH_TTY",
			Modes:        s.terminal.modes,
			KillOnDetach: true,
		},
		Size: s.terminal.size,
		Raw:  true,
	})
	if err != nil {
		return exitInternal, fmt.Errorf("cannot open a terminal: %w", err)
	}
	defer att.Close()
	stop := context.AfterFunc(s.ctx, func() { att.Close() })
	defer stop()

	// A terminal has no end of input that a client could pass on, so this just stops when the client has no more to type.
	s.conn.run("terminal input", func() { io.Copy(att, s.ch) })
	s.conn.run("terminal control", func() { s.control(att) })
	if _, err := io.Copy(s.ch, att); err != nil && s.ctx.Err() == nil {
		return exitInternal, fmt.Errorf("cannot follow the terminal: %w", err)
	}
	if s.ctx.Err() != nil {
		return exitSignal, nil
	}
	status, err := att.Wait()
	switch {
	case err != nil:
		return exitInternal, fmt.Errorf("cannot tell how the program ended: %w", err)
	case status.Signal != "":
		return exitSignal, nil
	}
	return status.Code, nil
}

// control passes sizes and signals on to the terminal until the session ends.
func (s *session) control(att *ptyhost.Attachment) {
	for {
		select {
		case size := <-s.sizes:
			att.Resize(size)
		case name := <-s.signals:
			att.Signal(name)
		case <-s.ctx.Done():
			return
		}
	}
}
