package agent

import (
	"context"
	"net"
	"net/netip"

	"github.com/berthd/berth/resume"
)

// serveResumed serves SSH over streams that outlive the connections on l.
func (a *agent) serveResumed(ctx context.Context, l net.Listener) error {
	up, ok := a.mesh.wait(ctx)
	if !ok {
		return nil
	}
	streams := resume.Listen(l, resume.Config{
		Patience: a.cfg.Services.SSHResumeWindow,
		// Addresses may be taken by others one day; keys cannot.
		Peer: func(addr net.Addr) string {
			ap, err := netip.ParseAddrPort(addr.String())
			if err != nil {
				return ""
			}
			return up.node.PeerKey(ap.Addr())
		},
		Log: a.log.With("part", "resume"),
	})
	defer streams.Shutdown()
	return a.ssh.Serve(ctx, streams)
}
