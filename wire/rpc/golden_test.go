package rpc

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
	"storj.io/drpc"
	"storj.io/drpc/drpcmux"

	"github.com/berthd/berth/internal/golden"
	"github.com/berthd/berth/wire"
)

// raw carries messages as they are.
type raw struct{}

func (raw) Marshal(m drpc.Message) ([]byte, error) { return *m.(*[]byte), nil }
func (raw) Unmarshal(b []byte, m drpc.Message) error {
	*m.(*[]byte) = slices.Clone(b)
	return nil
}

// peer is the other end of a session, which speaks in bytes.
type peer struct {
	t    *testing.T
	conn net.Conn
}

// pair returns the two ends of a connection; the test's end does not wait for ever.
func pair(t *testing.T) (net.Conn, *peer) {
	here, there := net.Pipe()
	here.SetDeadline(time.Now().Add(patience))
	t.Cleanup(func() { here.Close() })
	return there, &peer{t, here}
}

func (p *peer) write(b ...[]byte) {
	p.t.Helper()
	if _, err := p.conn.Write(bytes.Join(b, nil)); err != nil {
		p.t.Fatal(err)
	}
}

// frame reads one yamux frame.
func (p *peer) frame() []byte {
	p.t.Helper()
	head := make([]byte, 12)
	if _, err := io.ReadFull(p.conn, head); err != nil {
		p.t.Fatalf("no frame came: %v", err)
	}
	if head[1] != 0 { // the length of any but a data frame is a number of its own
		return head
	}
	frame := append(head, make([]byte, binary.BigEndian.Uint32(head[8:]))...)
	if _, err := io.ReadFull(p.conn, frame[12:]); err != nil {
		p.t.Fatal(err)
	}
	return frame
}

func (p *peer) expect(name string) {
	p.t.Helper()
	if got, want := p.frame(), golden.Bytes(p.t, name); !bytes.Equal(got, want) {
		p.t.Errorf("the frame %x came, want %s: %x", got, name, want)
	}
}

// data reads data of stream 1 until there are n bytes.
func (p *peer) data(n int) []byte {
	p.t.Helper()
	var all []byte
	for len(all) < n {
		f := p.frame()
		if f[1] != 0 || binary.BigEndian.Uint32(f[4:]) != 1 {
			p.t.Fatalf("the frame %x came instead of data", f)
		}
		all = append(all, f[12:]...)
	}
	return all
}

func (p *peer) expectData(name string) {
	p.t.Helper()
	want := golden.Bytes(p.t, name)
	if got := p.data(len(want)); !bytes.Equal(got, want) {
		p.t.Errorf("the data %x came, want %s: %x", got, name, want)
	}
}

// dataFrame puts bytes on stream 1.
func dataFrame(b []byte) []byte { return muxFrame(0, 0, 1, string(b)) }

func TestGoldenDataFrame(t *testing.T) {
	if got, want := dataFrame([]byte("hello")), golden.Bytes(t, "yamux-data"); !bytes.Equal(got, want) {
		t.Errorf("this test writes %x, and a data frame is %x", got, want)
	}
}

// A caller writes the frames of the worked example and reads each kind of answer.
func TestGoldenCaller(t *testing.T) {
	for answer, check := range map[string]func([]byte, error) error{
		"drpc-answer": func(out []byte, err error) error {
			if err != nil || string(out) != "\x12\x04demo" {
				return fmt.Errorf("the answer is %q, %w", out, err)
			}
			return nil
		},
		"drpc-unknown": func(_ []byte, err error) error {
			if Code(err) != 0 || !Unimplemented(err) || !strings.Contains(err.Error(), `unknown rpc: "/x.Y/Z"`) {
				return fmt.Errorf("the error is %w, of code %d", err, Code(err))
			}
			return nil
		},
		"drpc-unimplemented": func(_ []byte, err error) error {
			if Code(err) != wire.CodeUnimplemented || !Unimplemented(err) || err.Error() != "Unimplemented" {
				return fmt.Errorf("the error is %w, of code %d", err, Code(err))
			}
			return nil
		},
	} {
		t.Run(answer, func(t *testing.T) {
			conn, p := pair(t)
			c, err := NewClient(conn)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			result := make(chan error, 1)
			go func() {
				var in, out []byte
				err := c.Invoke(context.Background(), "/x.Y/Z", raw{}, &in, &out)
				result <- check(out, err)
			}()
			p.expect("yamux-open")
			p.expectData("drpc-call")
			p.write(golden.Bytes(t, "yamux-accept"), dataFrame(golden.Bytes(t, answer)))
			// It may say that it closes, and then has nothing more to send.
			for f := p.frame(); !bytes.Equal(f, golden.Bytes(t, "yamux-close")); f = p.frame() {
				if f[1] != 0 {
					t.Fatalf("the frame %x came, want the end of the stream", f)
				}
			}
			p.write(golden.Bytes(t, "yamux-close"))
			if err := <-result; err != nil {
				t.Error(err)
			}
		})
	}
}

func TestGoldenGoAway(t *testing.T) {
	conn, p := pair(t)
	c, err := NewClient(conn)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// The answer to the ping behind it tells that it was read.
	p.write(golden.Bytes(t, "yamux-go-away"), golden.Bytes(t, "yamux-ping"))
	p.expect("yamux-pong")
	var in, out []byte
	if err := c.Invoke(t.Context(), "/x.Y/Z", raw{}, &in, &out); !errors.Is(err, yamux.ErrRemoteGoAway) {
		t.Errorf("a call after that: %v", err)
	}
}

// echo answers /x.Y/Z and keeps what was sent.
type echo struct{ got chan []byte }

// HandleRPC implements [drpc.Handler].
func (e echo) HandleRPC(stream drpc.Stream, name string) error {
	if name != "/x.Y/Z" {
		return fmt.Errorf("a call of %q", name)
	}
	var in []byte
	if err := stream.MsgRecv(&in, raw{}); err != nil {
		return err
	}
	e.got <- in
	out := []byte("\x12\x04demo")
	if err := stream.MsgSend(&out, raw{}); err != nil {
		return err
	}
	return stream.CloseSend()
}

// A server reads each form of a call and writes the frames of the worked example.
func TestGoldenServer(t *testing.T) {
	handler := echo{make(chan []byte, 1)}
	for _, tt := range []struct {
		call, message, answer string
		handler               drpc.Handler
	}{
		{"drpc-call", "", "drpc-answer", handler},
		{"drpc-metadata", "", "drpc-answer", handler},
		{"drpc-split", "\x0a\x03abc", "drpc-answer", handler},
		{"drpc-call", "", "drpc-unknown", drpcmux.New()},
	} {
		t.Run(tt.call+" "+tt.answer, func(t *testing.T) {
			conn, p := pair(t)
			served := make(chan error, 1)
			go func() { served <- Serve(t.Context(), conn, tt.handler, ServeOptions{}) }()
			p.write(golden.Bytes(t, "yamux-open"), dataFrame(golden.Bytes(t, tt.call)))
			p.expect("yamux-accept")
			p.expectData(tt.answer)
			if tt.answer == "drpc-answer" {
				if got := string(<-handler.got); got != tt.message {
					t.Errorf("the message came as %q, want %q", got, tt.message)
				}
			}
			p.conn.Close()
			if err := <-served; err != nil {
				t.Error(err)
			}
		})
	}
}

// A server probes its caller by a ping, and lives on with its answer.
func TestGoldenProbe(t *testing.T) {
	conn, p := pair(t)
	alive := make(chan struct{}, 1)
	served := make(chan error, 1)
	go func() {
		served <- Serve(t.Context(), conn, drpcmux.New(), ServeOptions{PingInterval: time.Hour, PingTimeout: time.Hour, Alive: func() { alive <- struct{}{} }})
	}()
	p.expect("yamux-ping")
	p.write(golden.Bytes(t, "yamux-pong"))
	<-alive
	p.conn.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
