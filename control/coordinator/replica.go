package coordinator

import (
	"maps"
	"slices"
	"time"
)

// Pace of the replicas. A replica that was not heard of for replicaTimeout has lost its peers; a
// lost peer keeps its connections, so that a false alarm costs little.
const (
	heartbeat      = 2 * time.Second
	replicaTimeout = 5 * heartbeat
)

// replica is another process that coordinates with this one.
type replica struct {
	seq  uint64    // of the last frame
	seen time.Time // when it came
	// round counts the restatements. What one did not confirm is gone at its end.
	round   uint64
	syncing bool // a restatement has begun and none of its frames is missing
	behind  bool // frames are missing that no restatement has made up for
}

// round of the latest restatement of a replica; this one's own state needs none.
func (h *hub) round(name string) uint64 {
	if r := h.replicas[name]; r != nil {
		return r.round
	}
	return 0
}

// announce makes this replica known: it states what it owns and asks all others to.
func (h *hub) announce() {
	h.do(func() { h.restate, h.asking[""] = true, true })
}

// outgoing takes what there is to publish.
func (h *hub) outgoing() (asking []string, events []event) {
	h.do(func() {
		asking = slices.Collect(maps.Keys(h.asking))
		clear(h.asking)
		events, h.pending = h.pending, nil
		if !h.restate {
			return
		}
		h.restate = false
		events = append(events, event{Op: opSync})
		for _, p := range h.peers {
			if p.link == nil {
				continue
			}
			events = append(events, event{Op: opJoin, Peer: p.id, Epoch: p.epoch, Agent: p.agent})
			if p.node != nil {
				events = append(events, event{Op: opNode, Peer: p.id, Epoch: p.epoch, Node: node{p.node}})
			}
			for to := range p.tunnels {
				events = append(events, event{Op: opTunnel, Peer: p.id, Epoch: p.epoch, To: to})
			}
		}
		events = append(events, event{Op: opSynced})
	})
	return asking, events
}

// receive applies a frame of another replica.
func (h *hub) receive(f frame, events []event, now time.Time) {
	if f.From == h.self || f.From == "" {
		return
	}
	h.do(func() {
		if h.closed {
			return
		}
		if f.Hello && (f.To == "" || f.To == h.self) {
			h.restate = true
		}
		if f.Bye {
			h.drop(f.From)
			return
		}
		r := h.replicas[f.From]
		if r == nil {
			r = &replica{seq: f.Seq, behind: true}
			h.replicas[f.From] = r
			h.asking[f.From] = true
			h.log.Info("replica found", "replica", f.From)
		} else if r.seq++; r.seq != f.Seq {
			h.log.Warn("replica's events were missed", "replica", f.From, "expected", r.seq, "got", f.Seq)
			if !r.behind { // else tick asks again: many gaps are a sign of too much traffic already
				h.asking[f.From] = true
			}
			r.seq, r.behind, r.syncing = f.Seq, true, false
		}
		r.seen = now
		for _, ev := range events {
			h.receiveEvent(f.From, r, ev)
		}
	})
}

func (h *hub) receiveEvent(from string, r *replica, ev event) {
	switch {
	case ev.Op == opSync:
		r.round++
		r.syncing = true
	case ev.Op == opSynced && r.syncing:
		r.syncing, r.behind = false, false
		delete(h.asking, from)
		h.sweep(from, r.round)
	case ev.Epoch.Replica == from:
		h.apply(ev, nil)
	}
}

// sweep drops what a replica did not confirm in its latest restatement.
func (h *hub) sweep(name string, round uint64) {
	for _, p := range h.owned(name) {
		if p.round != round {
			h.applyLeave(p, kindLost, "lost")
			continue
		}
		for to, confirmed := range p.tunnels {
			if confirmed != round {
				h.applyUntunnel(p, to)
			}
		}
	}
}

// owned returns the peers of another replica.
func (h *hub) owned(name string) []*peer {
	var all []*peer
	for _, p := range h.peers {
		if p.epoch.Replica == name {
			all = append(all, p)
		}
	}
	return all
}

// drop forgets a replica and loses its peers.
func (h *hub) drop(name string) {
	for _, p := range h.owned(name) {
		h.applyLeave(p, kindLost, "lost")
	}
	delete(h.replicas, name)
	delete(h.asking, name)
	h.log.Info("replica gone", "replica", name)
}

// tick drops replicas that fell silent and asks again those whose restatement did not arrive. While
// this replica itself is cut off, silence says nothing about the others.
func (h *hub) tick(now time.Time, connected bool) {
	h.do(func() {
		for name, r := range h.replicas {
			switch {
			case !connected:
				r.seen = now
			case now.Sub(r.seen) > replicaTimeout:
				h.drop(name)
			case r.behind:
				h.asking[name] = true
			}
		}
	})
}
