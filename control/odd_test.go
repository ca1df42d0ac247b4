package control

import (
	"math"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"storj.io/drpc"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/tailnetpb"
)

// oddities returns messages of a kind that no honest peer sends: one field of each holds what it cannot,
// or a message that is empty.
func oddities(kind protoreflect.MessageType, depth int) []protoreflect.Message {
	all := []protoreflect.Message{kind.New()}
	if depth == 0 {
		return all
	}
	fields := kind.Descriptor().Fields()
	for i := range fields.Len() {
		field := fields.Get(i)
		if field.IsMap() {
			continue // of texts and numbers, which are odd elsewhere
		}
		for _, value := range oddValues(field, depth) {
			m := kind.New()
			if field.IsList() {
				m.Mutable(field).List().Append(value)
			} else {
				m.Set(field, value)
			}
			all = append(all, m)
		}
	}
	return all
}

func oddValues(field protoreflect.FieldDescriptor, depth int) (odd []protoreflect.Value) {
	switch field.Kind() {
	case protoreflect.BytesKind:
		for _, n := range []int{0, 1, 15, 17, 5000} {
			odd = append(odd, protoreflect.ValueOfBytes(make([]byte, n)))
		}
	case protoreflect.StringKind:
		odd = append(odd, protoreflect.ValueOfString(strings.Repeat("\x1b\x00é", 20000)), protoreflect.ValueOfString("\n"))
	case protoreflect.EnumKind:
		odd = append(odd, protoreflect.ValueOfEnum(77), protoreflect.ValueOfEnum(-1), protoreflect.ValueOfEnum(math.MinInt32))
	case protoreflect.Int32Kind:
		odd = append(odd, protoreflect.ValueOfInt32(math.MinInt32), protoreflect.ValueOfInt32(math.MaxInt32))
	case protoreflect.Int64Kind:
		odd = append(odd, protoreflect.ValueOfInt64(math.MinInt64), protoreflect.ValueOfInt64(math.MaxInt64))
	case protoreflect.Uint64Kind:
		odd = append(odd, protoreflect.ValueOfUint64(math.MaxUint64))
	case protoreflect.DoubleKind:
		odd = append(odd, protoreflect.ValueOfFloat64(math.NaN()), protoreflect.ValueOfFloat64(math.Inf(-1)))
	case protoreflect.BoolKind:
		odd = append(odd, protoreflect.ValueOfBool(true))
	case protoreflect.MessageKind:
		sub, err := protoregistry.GlobalTypes.FindMessageByName(field.Message().FullName())
		if err != nil {
			panic(err)
		}
		for _, m := range oddities(sub, depth-1) {
			odd = append(odd, protoreflect.ValueOfMessage(m))
		}
	}
	return odd
}

// TestOddRequests sends each call what no honest peer sends. Each is answered, with or without an error,
// none breaks a handler, and the link lives on.
func TestOddRequests(t *testing.T) {
	x := configured(t, Config{})
	id, token := x.declared("demo")
	agent, client := x.connect(token), x.user("/api/v2/workspaceagents/"+id.String()+"/coordinate?version=2.10")
	sent := 0
	for file, link := range map[protoreflect.FileDescriptor]*agentLink{agentpb.File_wire_agentpb_agent_proto: agent, tailnetpb.File_wire_tailnetpb_tailnet_proto: client} {
		services := file.Services()
		for i := range services.Len() {
			methods := services.Get(i).Methods()
			for j := range methods.Len() {
				method := methods.Get(j)
				if method.Name() == "StreamDERPMaps" || method.Name() == "WorkspaceUpdates" {
					continue // they take next to nothing and never end; see TestWorkspaceUpdates
				}
				kind, err := protoregistry.GlobalTypes.FindMessageByName(method.Input().FullName())
				if err != nil {
					t.Fatal(err)
				}
				name := "/" + string(services.Get(i).FullName()) + "/" + string(method.Name())
				for _, m := range oddities(kind, 4) {
					m.SetUnknown(append(m.GetUnknown(), 0xfa, 0x7f, 0x03, 'o', 'd', 'd')) // field 2047
					text, err := proto.Marshal(m.Interface())
					if err != nil {
						t.Fatal(err)
					}
					if err := link.odd(t, name, text); err != nil && strings.Contains(err.Error(), "internal server error") {
						t.Errorf("%s(%v): %v", name, m, err)
					}
					sent++
				}
			}
		}
	}
	if sent < 400 {
		t.Errorf("only %d requests", sent)
	}
	if strings.Contains(x.log.String(), "a call failed badly") {
		t.Error("a handler panicked; see the log")
	}
	if _, err := agent.agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{}); err != nil {
		t.Errorf("the agent's link: %v", err)
	}
	if _, err := client.tailnet.PostTelemetry(t.Context(), &tailnetpb.TelemetryRequest{}); err != nil {
		t.Errorf("the client's link: %v", err)
	}
	var view wire.Agent
	x.get("/api/v2/workspaceagents/"+id.String(), &view) // and what was stored can be shown
}

// odd makes a call with one request and returns the error of its answer.
func (l *agentLink) odd(t *testing.T, method string, request []byte) error {
	t.Helper()
	if method == wire.TailnetService+"Coordinate" {
		stream, err := l.NewStream(t.Context(), method, raw{})
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close()
		leave, err := proto.Marshal(&tailnetpb.CoordinateRequest{Disconnect: &tailnetpb.CoordinateRequest_Disconnect{}})
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range [][]byte{request, leave} {
			if stream.MsgSend(&text, raw{}) != nil {
				break // refused
			}
		}
		for {
			var answer []byte
			if err := stream.MsgRecv(&answer, raw{}); err != nil {
				return err
			}
		}
	}
	var answer []byte
	return l.Invoke(t.Context(), method, raw{}, drpc.Message(&request), drpc.Message(&answer))
}
