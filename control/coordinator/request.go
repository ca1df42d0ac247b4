package coordinator

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	"github.com/berthd/berth/wire/tailnetpb"
)

// request is a checked [tailnetpb.CoordinateRequest].
type request struct {
	node         *tailnetpb.Node
	addrs        []netip.Addr
	open, shut   uuid.UUID
	acknowledges []uuid.UUID
	disconnect   bool
}

// check parses what a peer sent and refuses what it may not.
func check(auth Auth, req *tailnetpb.CoordinateRequest) (request, error) {
	var r request
	var err error
	if self := req.GetUpdateSelf(); self != nil {
		r.node = self.GetNode()
		if size := proto.Size(r.node); r.node == nil || size > maxNode || len(r.node.Addresses)+len(r.node.AllowedIps) > maxAddresses {
			return r, fmt.Errorf("node of %d bytes (limit %d) with %d addresses (limit %d)", size, maxNode,
				len(r.node.GetAddresses())+len(r.node.GetAllowedIps()), maxAddresses)
		}
		if r.addrs, err = auth.addresses(r.node); err != nil {
			return r, err
		}
	}
	if t := req.GetAddTunnel(); t != nil {
		if r.open, err = parseID(t.GetId()); err != nil {
			return r, err
		}
		if err := auth.mayTunnel(r.open); err != nil {
			return r, err
		}
	}
	if t := req.GetRemoveTunnel(); t != nil {
		if r.shut, err = parseID(t.GetId()); err != nil {
			return r, err
		}
	}
	r.disconnect = req.GetDisconnect() != nil
	for _, ack := range req.GetReadyForHandshake() {
		if err := auth.mayAcknowledge(); err != nil {
			return r, err
		}
		id, err := parseID(ack.GetId())
		if err != nil {
			return r, err
		}
		r.acknowledges = append(r.acknowledges, id)
	}
	return r, nil
}

func parseID(b []byte) (uuid.UUID, error) {
	id, err := uuid.FromBytes(b)
	if err == nil && id == uuid.Nil {
		err = errors.New("it is all zeros")
	}
	if err != nil {
		return id, fmt.Errorf("invalid peer id: %w", err)
	}
	return id, nil
}

// handle carries out a request of p and tells whether to read another: not after a refused one or
// a disconnect, which end the stream.
func (h *hub) handle(p *peer, req *tailnetpb.CoordinateRequest) (more bool) {
	r, err := check(p.link.auth, req)
	if err != nil {
		h.log.Warn("coordination request refused", "peer", p.id, "error", err)
		h.leave(p, kindLost, "lost", fmt.Errorf("authorization: %w", err))
		return false
	}
	h.do(func() {
		if p.link.over {
			return
		}
		defer func() { more = !p.link.over }()
		if r.node != nil && !p.agent {
			if o, addr := h.rival(p, r.node, r.addrs); o != nil {
				h.log.Warn("client announced the address of another peer", "peer", p.id, "address", addr, "owner", o.id)
				h.remove(p, kindLost, "lost", taken(addr))
				return
			}
		}
		if r.node != nil {
			h.emit(event{Op: opNode, Peer: p.id, Epoch: p.epoch, Node: node{r.node}})
		}
		if r.open != uuid.Nil {
			h.emit(event{Op: opTunnel, Peer: p.id, Epoch: p.epoch, To: r.open})
		}
		if r.shut != uuid.Nil {
			h.emit(event{Op: opUntunnel, Peer: p.id, Epoch: p.epoch, To: r.shut})
		}
		if r.disconnect {
			h.remove(p, kindDisconnected, "graceful disconnect", nil)
			return
		}
		h.acknowledge(p, r.acknowledges)
	})
	return more
}

func (h *hub) acknowledge(p *peer, ids []uuid.UUID) {
	done := make(map[uuid.UUID]bool, len(ids))
	for _, id := range ids {
		if p.link.over {
			return
		}
		if done[id] {
			continue // or one request could fill the other's queue
		}
		done[id] = true
		_, out := p.tunnels[id]
		_, in := h.sources[p.id][id]
		if !out && !in {
			h.respond(p, &tailnetpb.CoordinateResponse{
				Error: fmt.Sprintf("ready for handshake error: you do not share a tunnel with %q", id),
			})
			continue
		}
		h.emit(event{Op: opReady, Peer: p.id, Epoch: p.epoch, To: id})
	}
}
