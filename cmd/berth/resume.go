package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/berthd/berth/resume"
	"github.com/berthd/berth/wire"
)

// openSSH opens the stream that an SSH connection to the agent goes over. It outlives its network for a while, unless the
// agent is one that cannot do that.
func (p *program) openSSH(ctx context.Context, m *mesh) (net.Conn, error) {
	if err := m.await(ctx); err != nil {
		return nil, err
	}
	stream, err := resume.Client{
		Dial:  func(ctx context.Context) (net.Conn, error) { return m.dial(ctx, wire.PortResume) },
		Probe: m.probe,
		Lost: func(kept time.Duration, why error) {
			m.log.Debug("the connection broke", "error", why)
			fmt.Fprintf(p.errOut, "\r\nberth: the connection to %s is lost; it goes on when the network is back within %v\r\n", clean(m.agent.Name), kept)
		},
		Back: func() { fmt.Fprintf(p.errOut, "berth: %s is back\r\n", clean(m.agent.Name)) },
	}.Open(ctx)
	if err == nil {
		return stream, nil
	}
	m.log.Debug("the agent does not take up connections that broke", "error", err)
	return m.connect(ctx, wire.PortSSH)
}

// resumes reports whether a stream outlives its network.
func resumes(stream net.Conn) bool {
	_, ok := stream.(*resume.Conn)
	return ok
}

// sshBroke says why an SSH connection cannot go on, and what to do.
func sshBroke(name string, err error) error {
	switch {
	case errors.Is(err, resume.ErrUnknown):
		return fmt.Errorf("cannot go on: agent %s does not know this connection any more, because berthd was started anew or the network was away for too long; connect again, or use \"berth shell\", which survives that", name)
	case errors.Is(err, resume.ErrAway):
		return fmt.Errorf("cannot go on: agent %s could not be reached for as long as it keeps a connection (%w); connect again when the network is back", name, err)
	}
	return fmt.Errorf("cannot go on: the connection to %s broke (%w); connect again, or use \"berth shell\", which survives that", name, err)
}
