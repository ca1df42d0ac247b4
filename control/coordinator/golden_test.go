package coordinator

import (
	"bytes"
	"testing"
	"testing/synctest"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	"github.com/berthd/berth/internal/golden"
	"github.com/berthd/berth/wire/tailnetpb"
)

// recorder is a stream that keeps what it is sent as bytes.
type recorder struct {
	*ClientStream
	got chan []byte // closed at the end
}

// The recorded exchange: each request is the recorded one, and each response must be, byte for byte.
func TestGoldenExchange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := alone("r1")
		agent, client := uuid.UUID{}, uuid.UUID{}
		for i := range agent {
			agent[i], client[i] = 0x10+byte(i), 0xa0+byte(i)
		}
		auths := map[string]Peer{"agent": {agent, AgentAuth(agent)}, "client": {client, ClientAuth(agent)}}
		peers := map[string]*recorder{}
		peer := func(name string) *recorder {
			if r := peers[name]; r != nil {
				return r
			}
			r := &recorder{c.Connect(t.Context(), auths[name]), make(chan []byte, 16)}
			peers[name] = r
			go func() {
				defer close(r.got)
				for {
					resp, err := r.Recv()
					if err != nil {
						return
					}
					b, err := proto.MarshalOptions{Deterministic: true}.Marshal(resp)
					if err != nil {
						t.Error(err)
					}
					r.got <- b
				}
			}()
			return r
		}
		for i, step := range golden.Exchange(t, "coordination") {
			r := peer(step.Who)
			if step.Sent {
				req := new(tailnetpb.CoordinateRequest)
				if err := proto.Unmarshal(step.Message, req); err != nil {
					t.Fatalf("step %d: %v", i+1, err)
				}
				if err := r.Send(req); err != nil {
					t.Fatalf("step %d: %v", i+1, err)
				}
				synctest.Wait() // two peers' requests are in no order otherwise
				continue
			}
			synctest.Wait()
			select {
			case got, ok := <-r.got:
				if ok == step.End || !bytes.Equal(got, step.Message) {
					t.Fatalf("step %d, %s:\n got %x\nwant %x", i+1, step.Who, got, step.Message)
				}
			default:
				t.Fatalf("step %d: %s got nothing", i+1, step.Who)
			}
		}
		for _, r := range peers {
			r.Close()
		}
		synctest.Wait()
		for name, r := range peers {
			if extra, ok := <-r.got; ok {
				t.Errorf("%s got more: %x", name, extra)
			}
		}
	})
}
