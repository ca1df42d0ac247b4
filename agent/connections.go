package agent

import (
	"context"
	"net"
	"slices"
	"sync"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/berthd/berth/ports"
	"github.com/berthd/berth/sshd"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// connected reports that somebody came; the function it returns reports, once, that they left.
func (a *agent) connected(kind agentpb.Connection_Type, ip string) func(exit int, reason string) {
	id := uuid.New()
	a.reporter.Connection(&agentpb.Connection{
		Id: id[:], Action: agentpb.Connection_CONNECT, Type: kind, Ip: ip, Timestamp: timestamppb.Now(),
	})
	var once sync.Once
	return func(exit int, reason string) {
		reason = wire.Text(reason)
		once.Do(func() {
			a.reporter.Connection(&agentpb.Connection{
				Id: id[:], Action: agentpb.Connection_DISCONNECT, Type: kind, Ip: ip, Timestamp: timestamppb.Now(),
				StatusCode: int32(exit), Reason: &reason,
			})
		})
	}
}

func (a *agent) connectedPTY(ip string) func(exit int, reason string) {
	return a.connected(agentpb.Connection_RECONNECTING_PTY, ip)
}

// connectedSSH reports sessions of the kinds that the protocol knows; it has no word for others.
func (a *agent) connectedSSH(c sshd.Connection) func(exit int, reason string) {
	kinds := map[sshd.SessionType]agentpb.Connection_Type{
		sshd.SessionSSH:       agentpb.Connection_SSH,
		sshd.SessionVSCode:    agentpb.Connection_VSCODE,
		sshd.SessionJetBrains: agentpb.Connection_JETBRAINS,
	}
	kind, ok := kinds[c.Type]
	if !ok {
		return func(int, string) {}
	}
	return a.connected(kind, hostOf(c.Remote))
}

// hostOf returns an address without its port.
func hostOf(addr net.Addr) string {
	host, _, err := net.SplitHostPort(addr.String())
	if err != nil {
		return addr.String()
	}
	return host
}

// jetBrains tells whether a JetBrains program listens on a port of this machine.
func (a *agent) jetBrains(port uint16) bool {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	all, err := a.ports.List(ctx)
	if err != nil {
		a.log.Debug("cannot tell who listens on a forwarded port", "error", err)
		return false
	}
	return slices.ContainsFunc(all, func(p wire.ListeningPort) bool {
		return p.Port == port && p.Network == "tcp" && p.Namespace == 0 && p.Hidden == ports.JetBrains
	})
}
