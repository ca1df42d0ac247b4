package rpc

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"storj.io/drpc/drpcmux"

	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/tailnetpb"
)

// muxFrame is one yamux frame.
func muxFrame(kind byte, flags uint16, stream uint32, payload string) []byte {
	b := []byte{0, kind}
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint32(b, stream)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return append(b, payload...)
}

// call is a unary call with an empty message, as a first stream.
func call(name string) []byte {
	payload := "\x03\x01\x01" + string(rune(len(name))) + name + "\x05\x01\x02\x00\x0d\x01\x03\x00"
	return append(muxFrame(1, 1, 1, ""), muxFrame(0, 0, 1, payload)...)
}

func seedSessions(f *testing.F) {
	ping := muxFrame(2, 1, 0, "")
	f.Add([]byte{})
	f.Add(ping)
	f.Add(call("/coder.agent.v2.Agent/GetManifest"))
	f.Add(call("/coder.tailnet.v2.Tailnet/Coordinate"))
	f.Add(append(call("/x.Y/Z"), muxFrame(0, 4, 1, "")...))
	f.Add(muxFrame(3, 0, 0, ""))                                      // go away
	f.Add(append(muxFrame(0, 1, 1, ""), muxFrame(0, 8, 1, "")...))    // opened and reset
	f.Add(muxFrame(0, 1, 2, ""))                                      // an even stream
	f.Add(append(ping, "\x00\x00\x00\x00\x00\x00\x00\x01\xff"...))    // cut short
	f.Add([]byte("\x01\x00\x00\x01\x00\x00\x00\x01\x00\x00\x00\x00")) // another version
	huge := muxFrame(0, 1, 1, "")
	binary.BigEndian.PutUint32(huge[8:], 1<<31)
	f.Add(huge)
	// A packet that claims 2^63 bytes.
	f.Add(append(muxFrame(1, 1, 1, ""), muxFrame(0, 0, 1, "\x05\x01\x01\xff\xff\xff\xff\xff\xff\xff\xff\x7f")...))
}

// patience bounds one try; nothing here takes more than milliseconds.
const patience = 30 * time.Second

// FuzzServe sends a server whatever a caller might. It answers or gives up, and ends with the connection.
func FuzzServe(f *testing.F) {
	seedSessions(f)
	mux := drpcmux.New()
	if err := agentpb.DRPCRegisterAgent(mux, &agentService{}); err != nil {
		f.Fatal(err)
	}
	if err := tailnetpb.DRPCRegisterTailnet(mux, &tailnetService{gaveUp: make(chan error, 1<<10)}); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, sent []byte) {
		here, there := net.Pipe()
		served := make(chan error, 1)
		go func() { served <- Serve(t.Context(), there, mux, ServeOptions{WriteTimeout: 10 * time.Millisecond}) }()
		go io.Copy(io.Discard, here)
		here.SetWriteDeadline(time.Now().Add(patience))
		here.Write(sent)
		here.Close()
		select {
		case err := <-served:
			if err != nil && !errors.Is(err, ErrProtocol) {
				t.Errorf("Serve = %v, though the caller left", err)
			}
		case <-time.After(patience):
			t.Fatal("Serve outlives its connection")
		}
	})
}

// FuzzCall answers a caller with whatever a server might. The call ends with the connection.
func FuzzCall(f *testing.F) {
	seedSessions(f)
	f.Add(append(muxFrame(1, 2, 1, ""), muxFrame(0, 0, 1, "\x05\x01\x01\x06\x12\x04demo\x0d\x01\x02\x00")...)) // an answer
	f.Add(append(muxFrame(1, 2, 1, ""), muxFrame(0, 4, 1, "\x07\x01\x01\x0a\x00\x00\x00\x00\x00\x00\x00\x0cno")...))
	f.Fuzz(func(t *testing.T, answer []byte) {
		here, there := net.Pipe()
		c, err := NewClient(there)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		go func() {
			// Answer when something was asked: yamux opens the stream with its first frame.
			here.SetDeadline(time.Now().Add(patience))
			buf := make([]byte, 64<<10)
			here.Read(buf)
			go io.Copy(io.Discard, here)
			here.Write(answer)
			here.Close()
		}()
		if _, err := agentpb.NewDRPCAgentClient(c).GetManifest(ctx, &agentpb.GetManifestRequest{}); ctx.Err() != nil {
			t.Errorf("the call outlives its connection: %v", err)
		}
		c.Close()
	})
}
