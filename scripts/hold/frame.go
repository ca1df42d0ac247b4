package hold

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
)

// A connection carries frames: a byte for the kind, one for the stream, the length of the body in four bytes, little-endian, and the body. The holder begins
// with its state; the other side answers with the bytes that it wants next of each stream.
const headerSize = 1 + 1 + 4

type kind byte

// What a holder says.
const (
	kindState kind = 1 + iota // a State
	kindData                  // bytes of a stream
	kindEnd                   // of a stream: nobody has it open any more
	kindExit                  // an Exit
)

// What is said to it.
const (
	kindFrom     kind = 64 + iota // two offsets
	kindTaken                     // an offset: what is before it in a stream need not be kept
	kindHangUp                    // end the command with SIGHUP, and SIGKILL after its grace
	kindKill                      // end it at once, and the holder
	kindReported                  // how it ended is dealt with
	kindRelease                   // the holder is not wanted any more
)

const (
	// maxData is how much of a stream a frame has.
	maxData = 128 << 10
	// maxBody bounds any frame. A state has a tag, in which whoever made it may have put some kilobytes.
	maxBody = 4 << 20
	// maxCommand bounds what is said to a holder.
	maxCommand = 64
)

type frame struct {
	kind   kind
	stream int
	body   []byte
}

// appendFrame appends the encoding of f.
func appendFrame(b []byte, f frame) []byte {
	b = append(b, byte(f.kind), byte(f.stream))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(f.body)))
	return append(b, f.body...)
}

// writeFrame writes one frame at once.
func writeFrame(w io.Writer, f frame) error {
	_, err := w.Write(appendFrame(nil, f))
	return err
}

// writeJSON writes a frame of v.
func writeJSON(w io.Writer, k kind, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return writeFrame(w, frame{kind: k, body: body})
}

// readFrame reads a frame with at most limit bytes. Its body is in buf, or in what buf grew to.
func readFrame(r *bufio.Reader, buf []byte, limit int) (frame, []byte, error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return frame{}, buf, err
	}
	f := frame{kind: kind(header[0]), stream: int(header[1])}
	length := binary.LittleEndian.Uint32(header[2:])
	if f.stream >= streams || uint64(length) > uint64(limit) {
		return frame{}, buf, fmt.Errorf("a frame of kind %d, stream %d and %d bytes", f.kind, f.stream, length)
	}
	if uint64(length) > uint64(cap(buf)) {
		buf = make([]byte, length)
	}
	f.body = buf[:length]
	if _, err := io.ReadFull(r, f.body); err != nil {
		return frame{}, buf, io.ErrUnexpectedEOF
	}
	return f, buf, nil
}

// offsets reads the offsets that a body has, n of them.
func offsets(body []byte, n int) ([]uint64, bool) {
	if len(body) != 8*n {
		return nil, false
	}
	all := make([]uint64, n)
	for i := range all {
		all[i] = binary.LittleEndian.Uint64(body[8*i:])
	}
	return all, true
}
