package main

import (
	"encoding/json"
	"net"
	"sync"
	"unicode/utf8"

	"github.com/berthd/berth/wire"
)

const (
	// maxAhead bounds what is kept of typing ahead: a few lines.
	maxAhead = 4 << 10
	// maxQueued bounds what waits for a program that does not read: more than anybody pastes. From there on typing waits too.
	maxQueued = 4 << 20
)

// outbox holds what is to be sent to the agent. One goroutine per attachment sends it, so that nobody else waits for the network,
// or for a program that does not read. What is typed before the first attachment is typed ahead and kept; between two it is dropped,
// as a person would not want blind keystrokes to arrive minutes later.
type outbox struct {
	mu      sync.Mutex
	changed sync.Cond
	begun   bool // there was an attachment
	open    bool // there is one
	leaving bool // it ends when what waits is sent
	text    []byte
	size    windowSize // the newest that was not sent yet
	probing bool       // something is to be sent, if only nothing
}

func newOutbox() *outbox {
	o := &outbox{}
	o.changed.L = &o.mu
	return o
}

// put queues what was typed, in whole characters. It waits while too much is queued.
func (o *outbox) put(text string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.open && !o.leaving && len(o.text) >= maxQueued {
		o.changed.Wait()
	}
	if o.open || !o.begun && len(o.text)+len(text) <= maxAhead {
		o.text = append(o.text, text...)
		o.changed.Broadcast()
	}
}

// resize queues the size of the window; only the newest is sent. It does not wait.
func (o *outbox) resize(size windowSize) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.size = size
	o.changed.Broadcast()
}

// probe has something sent. It does not wait.
func (o *outbox) probe() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.probing = true
	o.changed.Broadcast()
}

// leave lets serve end when all is sent.
func (o *outbox) leave() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.leaving = true
	o.changed.Broadcast()
}

// serve starts to send to an attachment. The function it returns, which is called after conn was closed, ends that.
func (o *outbox) serve(conn net.Conn) (stop func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.begun, o.open = true, true
	done := make(chan struct{})
	go func() {
		defer close(done)
		for r, ok := o.next(); ok; r, ok = o.next() {
			data, err := json.Marshal(r)
			if err == nil {
				_, err = conn.Write(data)
			}
			if err != nil {
				return // so does the read of this attachment, which tells
			}
		}
		closeWrite(conn)
	}()
	return func() {
		o.mu.Lock()
		o.open, o.text, o.probing = false, nil, false
		o.changed.Broadcast()
		o.mu.Unlock()
		<-done
	}
}

// next waits for what is to be sent next. A size goes first: a program that does not read must not keep it back.
func (o *outbox) next() (r wire.PTYRequest, ok bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		switch {
		case !o.open:
			return r, false
		case o.size != windowSize{}:
			r.Height, r.Width = o.size.Rows, o.size.Cols
			o.size = windowSize{}
			return r, true
		case len(o.text) > 0:
			n := min(len(o.text), inputSize)
			for cut := n; n < len(o.text) && cut > n-utf8.UTFMax; cut-- { // JSON carries characters
				if utf8.RuneStart(o.text[cut]) {
					n = cut
					break
				}
			}
			r.Data = string(o.text[:n])
			o.text = o.text[n:]
			o.probing = false
			o.changed.Broadcast()
			return r, true
		case o.leaving:
			return r, false
		case o.probing:
			o.probing = false
			return r, true
		}
		o.changed.Wait()
	}
}
