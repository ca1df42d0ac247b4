package ptyhost

import "sync"

// queue lets reading the terminal go on while the screen takes in what was read before: Linux gives 4 KiB per read, and a flood is taken in
// larger pieces the further it is ahead.
type queue struct {
	mu      sync.Mutex
	changed sync.Cond
	buf     []byte
	closed  bool
}

// maxQueue is how far reading may be ahead.
const maxQueue = 64 << 10

func newQueue() *queue {
	q := &queue{}
	q.changed.L = &q.mu
	return q
}

// put appends p, after waiting for room.
func (q *queue) put(p []byte) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.buf) >= maxQueue {
		q.changed.Wait()
	}
	q.buf = append(q.buf, p...)
	q.changed.Signal()
}

// close makes take return false once all was taken.
func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.changed.Signal()
}

// take returns all that is queued, after waiting for something, and keeps spare to queue more in.
func (q *queue) take(spare []byte) ([]byte, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.buf) == 0 && !q.closed {
		q.changed.Wait()
	}
	p := q.buf
	q.buf = spare[:0]
	q.changed.Signal()
	return p, len(p) > 0
}
