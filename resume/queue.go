package resume

import "sync"

// chunkSize is the unit in which queues take memory: large enough that a bulk transfer is few of them, and small
// beside what a session costs anyway.
const chunkSize = 32 << 10

var chunks = sync.Pool{New: func() any { return new([chunkSize]byte) }}

// batchSize bounds what is sent at once: what a connection of the mesh takes in one piece, and several frames.
const batchSize = 4 * chunkSize

var batches = sync.Pool{New: func() any { return new([batchSize]byte) }}

// queue holds the bytes of a stream from start to end, by their numbers, in chunks that begin at multiples of
// chunkSize. It takes memory for what it holds only. The zero value is an empty queue at the stream's beginning.
type queue struct {
	start, end uint64
	chunks     []*[chunkSize]byte
}

func (q *queue) len() int { return int(q.end - q.start) }

// append copies p behind the end.
func (q *queue) append(p []byte) {
	for len(p) > 0 {
		if q.end%chunkSize == 0 || len(q.chunks) == 0 {
			q.chunks = append(q.chunks, chunks.Get().(*[chunkSize]byte))
		}
		n := copy(q.chunks[len(q.chunks)-1][q.end%chunkSize:], p)
		q.end += uint64(n)
		p = p[n:]
	}
}

// copy copies bytes from the number at on into p, as many as there are or fit. at is not before start.
func (q *queue) copy(p []byte, at uint64) int {
	copied := 0
	for at < q.end && copied < len(p) {
		from := q.chunks[at/chunkSize-q.start/chunkSize][at%chunkSize:]
		n := copy(p[copied:], from[:min(uint64(len(from)), q.end-at)])
		copied += n
		at += uint64(n)
	}
	return copied
}

// discard forgets what is before the number to, which is not beyond end.
func (q *queue) discard(to uint64) {
	drop := int(to/chunkSize - q.start/chunkSize)
	if to == q.end {
		drop = len(q.chunks)
	}
	for i := range drop {
		chunks.Put(q.chunks[i])
		q.chunks[i] = nil
	}
	q.chunks = q.chunks[drop:]
	if len(q.chunks) == 0 {
		q.chunks = nil
	}
	q.start = to
}
