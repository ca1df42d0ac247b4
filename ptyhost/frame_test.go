package ptyhost

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
)

func TestFrames(t *testing.T) {
	stream := appendFrame(nil, frameInput, []byte("typed"))
	stream = appendFrame(stream, 200, []byte("from the future"))
	stream = appendSize(stream, Size{Rows: 5, Cols: 6})
	stream = appendFrame(stream, frameSignal, []byte("INT"))
	r := bufio.NewReader(bytes.NewReader(stream))
	var got []clientFrame
	var buf []byte
	for {
		ft, payload, err := readFrame(r, buf)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		f, err := parseClientFrame(ft, payload)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, f)
	}
	want := []clientFrame{{input: []byte("typed")}, {}, {resize: Size{Rows: 5, Cols: 6}}, {signal: "INT"}}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(clientFrame{})); diff != "" {
		t.Errorf("frames (-want +got):\n%s", diff)
	}
}

func TestFrameErrors(t *testing.T) {
	for name, tc := range map[string]struct {
		stream []byte
		want   error
	}{
		"nothing":     {nil, io.EOF},
		"half header": {[]byte{1, 0}, io.ErrUnexpectedEOF},
		"half frame":  {appendFrame(nil, frameInput, []byte("typed"))[:7], io.ErrUnexpectedEOF},
		"no payload":  {appendHeader(nil, frameInput, 3), io.ErrUnexpectedEOF},
		"too long":    {appendHeader(nil, frameInput, maxFrame+1), errFrame},
	} {
		if _, _, err := readFrame(bufio.NewReader(bytes.NewReader(tc.stream)), nil); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
}

// FuzzFrames reads any bytes as the frames of a client and wants no more memory taken than was sent.
func FuzzFrames(f *testing.F) {
	hello := appendJSON(nil, frameHello, helloMessage{Version: 1})
	f.Add(appendJSON(hello, frameAttach, AttachRequest{ID: "x", Create: shell("true")}))
	f.Add(appendSize(appendFrame(nil, frameInput, []byte("typed")), Size{1, 2}))
	f.Add(appendAck(appendFrame(nil, frameSignal, []byte("INT")), 1))
	f.Add(appendError(nil, ErrNoSession))
	f.Fuzz(func(t *testing.T, stream []byte) {
		r := bufio.NewReader(bytes.NewReader(stream))
		var buf []byte
		total := 0
		for {
			ft, payload, err := readFrame(r, buf)
			if err != nil {
				break
			}
			if total += headerLen + len(payload); total > len(stream) {
				t.Fatalf("read %d bytes of %d", total, len(stream))
			}
			if cf, err := parseClientFrame(ft, payload); err == nil && cf.resize != (Size{}) && cf.resize != cf.resize.clamped() {
				t.Fatalf("unbounded size %v", cf.resize)
			}
			var req AttachRequest
			if ft == frameAttach && json.Unmarshal(payload, &req) == nil {
				appendJSON(nil, frameAttach, req)
			}
			if ft == frameError {
				_ = parseError(payload).Error()
			}
			buf = payload
		}
	})
}

// TestOtherBuilds speaks to the host as a client of the future and of nobody would.
func TestOtherBuilds(t *testing.T) {
	c := startTestHost(t)
	dial := func(stream []byte) (*bufio.Reader, net.Conn) {
		conn, err := net.Dial("unix", c.socket)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		conn.SetDeadline(time.Now().Add(within))
		if _, err := conn.Write(stream); err != nil {
			t.Fatal(err)
		}
		return bufio.NewReader(conn), conn
	}
	future := appendFrame(nil, frameHello, []byte(`{"version":7,"wishes":["none"]}`))
	future = appendFrame(future, 99, []byte("unknown"))
	future = appendFrame(future, frameAttach, []byte(`{"id":"`+uuid.NewString()+`","new":1,"size":{"rows":10,"cols":20},"create":{"argv":["/bin/echo","hi"],"env":[],"mood":"good"}}`))
	r, _ := dial(future)
	var types []frameType
	var output []byte
	for {
		ft, payload, err := readFrame(r, nil)
		if err != nil {
			break
		}
		if ft == frameOutput {
			output = append(output, payload...)
			continue
		}
		types = append(types, ft)
	}
	if diff := cmp.Diff([]frameType{frameHello, frameAttached, frameExit}, types); diff != "" || string(output) != "hi\r\n" {
		t.Errorf("a client of a later version reads %q and frames (-want +got):\n%s", output, diff)
	}

	for name, stream := range map[string][]byte{
		"another protocol": []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		"no hello":         appendFrame(nil, frameList, nil),
		"too long":         appendHeader(nil, frameHello, maxFrame+1),
	} {
		r, _ := dial(stream)
		if _, err := r.ReadByte(); err == nil {
			t.Errorf("%s: the host answered", name)
		}
	}

	// Input beyond the window ends the connection, not the host's memory.
	a := attach(t, c, AttachRequest{Create: shell("stty raw -echo; echo up; sleep 60")})
	a.mu.Lock()
	a.room = 1 << 30
	a.mu.Unlock()
	w := watch(t, a)
	w.expect(t, "up")
	go a.Write(make([]byte, 1<<20))
	if _, err := w.Wait(); !errors.Is(err, ErrHostGone) {
		t.Errorf("after too much input: %v", err)
	}
	if err := c.Kill(testContext(t), a.Info().ID, ""); err != nil {
		t.Error(err)
	}
}
