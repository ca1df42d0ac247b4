package coordinator

import (
	"encoding/json"
	"fmt"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	"github.com/berthd/berth/wire/tailnetpb"
)

// epoch tells the streams of one peer id apart, across replicas: the newer one holds.
type epoch struct {
	// At is the time of joining in nanoseconds since 1970, made larger than that of any stream of
	// the id known before: a clock that is behind cannot make a new stream look old.
	At      int64  `json:"at"`
	Replica string `json:"replica"`
}

func (e epoch) newer(than epoch) bool {
	return e.At > than.At || e.At == than.At && e.Replica > than.Replica
}

// op is what an event says.
type op string

const (
	opJoin     op = "join"     // the peer has a stream: Agent
	opNode     op = "node"     // it published a node: Node
	opTunnel   op = "tunnel"   // it opened a tunnel: To
	opUntunnel op = "untunnel" // it closed one: To
	opReady    op = "ready"    // it acknowledged a peer: To
	opLeave    op = "leave"    // its stream is over: Kind, Reason

	// Around a restatement of everything the replica owns. What stands not between them is gone.
	opSync   op = "sync"
	opSynced op = "synced"
)

// event is one change of the state. All replicas apply the same ones.
type event struct {
	Op     op        `json:"op"`
	Peer   uuid.UUID `json:"peer,omitzero"`
	Epoch  epoch     `json:"epoch,omitzero"`
	Agent  bool      `json:"agent,omitempty"`
	Node   node      `json:"node,omitzero"`
	To     uuid.UUID `json:"to,omitzero"`
	Kind   kind      `json:"kind,omitempty"`
	Reason string    `json:"reason,omitempty"`
}

// kind says how a peer update ends a peer: DISCONNECTED or LOST.
type kind = tailnetpb.CoordinateResponse_PeerUpdate_Kind

const (
	kindNode         = tailnetpb.CoordinateResponse_PeerUpdate_NODE
	kindDisconnected = tailnetpb.CoordinateResponse_PeerUpdate_DISCONNECTED
	kindLost         = tailnetpb.CoordinateResponse_PeerUpdate_LOST
	kindReady        = tailnetpb.CoordinateResponse_PeerUpdate_READY_FOR_HANDSHAKE
)

// node is a node as JSON: base64 of the protobuf, which keeps fields that this version does not know.
type node struct{ *tailnetpb.Node }

func (n node) MarshalJSON() ([]byte, error) {
	b, err := proto.Marshal(n.Node)
	if err != nil {
		return nil, err
	}
	return json.Marshal(b)
}

func (n *node) UnmarshalJSON(text []byte) error {
	var b []byte
	if err := json.Unmarshal(text, &b); err != nil {
		return err
	}
	n.Node = new(tailnetpb.Node)
	return proto.Unmarshal(b, n.Node)
}

// frame is one message between replicas.
type frame struct {
	// From names the process that sends, Seq counts its frames from 1.
	From string `json:"from"`
	Seq  uint64 `json:"seq"`
	// Hello asks replica To, or all when empty, to restate what they own.
	Hello bool   `json:"hello,omitempty"`
	To    string `json:"to,omitempty"`
	// Bye says that From has ended all its streams.
	Bye    bool              `json:"bye,omitempty"`
	Events []json.RawMessage `json:"events,omitempty"`
}

// maxFrame in bytes is where a frame is cut. An event has at most 88 KiB (a node of [maxNode] in
// base64), so that a frame stays far below the 1 MiB that NATS takes by default.
const maxFrame = 128 << 10

// pack lays events out in frames, at least one.
func pack(events []event) ([]frame, error) {
	frames := []frame{{}}
	size := 0
	for _, ev := range events {
		text, err := json.Marshal(ev)
		if err != nil {
			return nil, fmt.Errorf("cannot encode a coordination event: %w", err)
		}
		if size > maxFrame {
			frames, size = append(frames, frame{}), 0
		}
		last := &frames[len(frames)-1]
		last.Events = append(last.Events, text)
		size += len(text)
	}
	return frames, nil
}

// unpack decodes what another replica published.
func unpack(text []byte) (frame, []event, error) {
	var f frame
	if err := json.Unmarshal(text, &f); err != nil {
		return f, nil, fmt.Errorf("cannot decode a coordination frame: %w", err)
	}
	events := make([]event, len(f.Events))
	for i, text := range f.Events {
		if err := json.Unmarshal(text, &events[i]); err != nil {
			return f, nil, fmt.Errorf("cannot decode a coordination event: %w", err)
		}
	}
	return f, events, nil
}
