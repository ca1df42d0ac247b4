package main

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"github.com/berthd/berth/wire"
)

// TestOutboxBlocked: while a program does not read what was pasted, sizes and probes do not wait; then all of it arrives, the size
// first, and leaving waits for the rest.
func TestOutboxBlocked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		o := newOutbox()
		stop := o.serve(near)
		pasted := strings.Repeat("aä大😀", 100_000)
		o.put(pasted)
		synctest.Wait() // the first piece is being written
		o.resize(windowSize{24, 80})
		o.resize(windowSize{30, 100})
		o.probe()
		o.leave()
		requests := readRequests(t, far)
		near.Close()
		stop()
		if len(requests) < 3 || requests[1] != (wire.PTYRequest{Height: 30, Width: 100}) {
			t.Fatalf("%d requests, the second is not the newest size", len(requests))
		}
		var got strings.Builder
		for i, r := range requests {
			if i != 1 && (r.Height != 0 || r.Data == "") {
				t.Errorf("request %d is %d bytes and a size of %dx%d", i, len(r.Data), r.Width, r.Height)
			}
			got.WriteString(r.Data)
		}
		if got.String() != pasted {
			t.Error("what arrives is not what was pasted")
		}
	})
}

// TestOutboxFull: typing waits when too much is queued, and no longer than the attachment.
func TestOutboxFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer far.Close()
		o := newOutbox()
		stop := o.serve(near)
		typed := make(chan struct{})
		go func() {
			for range 2*maxQueued/inputSize + 1 {
				o.put(strings.Repeat("x", inputSize))
			}
			close(typed)
		}()
		synctest.Wait()
		select {
		case <-typed:
			t.Error("typing did not wait")
		default:
		}
		if n := len(o.text); n < maxQueued || n > maxQueued+inputSize {
			t.Errorf("%d bytes are queued", n)
		}
		near.Close()
		stop()
		<-typed
	})
}

// TestOutboxBetween: what is typed before the first attachment is kept, between two it is dropped; the size is not.
func TestOutboxBetween(t *testing.T) {
	o := newOutbox()
	o.put("ahead")
	o.put(strings.Repeat("x", maxAhead)) // too much
	serve := func() []wire.PTYRequest {
		near, far := net.Pipe()
		stop := o.serve(near)
		o.leave()
		requests := readRequests(t, far)
		near.Close()
		stop()
		return requests
	}
	if diff := cmp.Diff([]wire.PTYRequest{{Data: "ahead"}}, serve()); diff != "" {
		t.Errorf("the first attachment (-want +got):\n%s", diff)
	}
	o.put("blind")
	o.resize(windowSize{30, 100})
	if diff := cmp.Diff([]wire.PTYRequest{{Height: 30, Width: 100}}, serve()); diff != "" {
		t.Errorf("the second (-want +got):\n%s", diff)
	}
	o.probe()
	if diff := cmp.Diff([]wire.PTYRequest(nil), serve()); diff != "" {
		t.Errorf("the third (-want +got):\n%s", diff)
	}
}

// readRequests reads to the end of input.
func readRequests(t *testing.T, conn net.Conn) (all []wire.PTYRequest) {
	t.Helper()
	dec := json.NewDecoder(conn)
	for {
		var r wire.PTYRequest
		err := dec.Decode(&r)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, r)
	}
}
