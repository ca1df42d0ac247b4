package resume

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"
)

const magic = "berth-r1"

// id names a session, and whoever knows it, and is who made it, may take the session up.
type id [16]byte

// hello is what a client begins a connection with. The zero id asks for a new session.
type hello struct {
	session  id
	received uint64
}

const helloSize = len(magic) + 16 + 8

func (h hello) append(b []byte) []byte {
	b = append(b, magic...)
	b = append(b, h.session[:]...)
	return binary.BigEndian.AppendUint64(b, h.received)
}

func readHello(r io.Reader) (hello, error) {
	var b [helloSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return hello{}, err
	}
	if string(b[:len(magic)]) != magic {
		return hello{}, errNotSpoken
	}
	h := hello{received: binary.BigEndian.Uint64(b[len(magic)+16:])}
	copy(h.session[:], b[len(magic):])
	return h, nil
}

// verdict is what becomes of a hello.
type verdict byte

const (
	goOn verdict = iota
	unknownSession
	noRoom
)

// answer is what the listening side begins a connection with.
type answer struct {
	verdict  verdict
	session  id
	received uint64
	window   int
	patience time.Duration
}

const answerSize = len(magic) + 1 + 16 + 8 + 4 + 4

func (a answer) append(b []byte) []byte {
	b = append(b, magic...)
	b = append(b, byte(a.verdict))
	b = append(b, a.session[:]...)
	b = binary.BigEndian.AppendUint64(b, a.received)
	b = binary.BigEndian.AppendUint32(b, uint32(a.window))
	return binary.BigEndian.AppendUint32(b, uint32((a.patience+time.Second-1)/time.Second))
}

func readAnswer(r io.Reader) (answer, error) {
	var b [answerSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return answer{}, err
	}
	if string(b[:len(magic)]) != magic {
		return answer{}, errNotSpoken
	}
	rest := b[len(magic):]
	a := answer{
		verdict:  verdict(rest[0]),
		received: binary.BigEndian.Uint64(rest[17:]),
		window:   int(binary.BigEndian.Uint32(rest[25:])),
		patience: time.Duration(binary.BigEndian.Uint32(rest[29:])) * time.Second,
	}
	copy(a.session[:], rest[1:])
	switch {
	case a.verdict > noRoom:
		return answer{}, fmt.Errorf("%w: the unknown verdict %d", errViolation, a.verdict)
	case a.verdict == goOn && (a.window < minWindow || a.window > maxWindow):
		return answer{}, fmt.Errorf("%w: a window of %d bytes, which is not between %d and %d", errViolation, a.window, minWindow, maxWindow)
	}
	return a, nil
}

var (
	// errNotSpoken says that the other side speaks something else.
	errNotSpoken = errors.New("it does not speak this protocol")
	// errViolation ends a stream: whatever follows cannot be trusted to be in its place.
	errViolation = errors.New("the other side breaks the protocol")
)

const (
	frameData = 'd'
	frameEnd  = 'e'
	frameAck  = 'a'
	frameAsk  = 'q'
)

// dataHeader is what stands before the bytes of a data frame.
const dataHeader = 5

// maxData bounds the bytes of one frame, so that with its header it fills a chunk.
const maxData = chunkSize - dataHeader

// frame is one frame; data is good until the next is read.
type frame struct {
	kind  byte
	taken uint64 // of an ack or ask
	data  []byte
}

// readFrame reads a frame. Its data is read into what room returns, which holds maxData bytes.
func readFrame(r *bufio.Reader, room func() []byte) (frame, error) {
	kind, err := r.ReadByte()
	if err != nil {
		return frame{}, err
	}
	f := frame{kind: kind}
	var b [8]byte
	switch kind {
	case frameEnd:
	case frameAck, frameAsk:
		if err := readAll(r, b[:]); err != nil {
			return frame{}, err
		}
		f.taken = binary.BigEndian.Uint64(b[:])
	case frameData:
		if err := readAll(r, b[:4]); err != nil {
			return frame{}, err
		}
		n := binary.BigEndian.Uint32(b[:4])
		if n == 0 || n > maxData {
			return frame{}, fmt.Errorf("%w: a frame of %d bytes, which is not between 1 and %d", errViolation, n, maxData)
		}
		f.data = room()[:n]
		if err := readAll(r, f.data); err != nil {
			return frame{}, err
		}
	default:
		return frame{}, fmt.Errorf("%w: a frame of the unknown kind %q", errViolation, kind)
	}
	return f, nil
}

// readAll fills b; a stream that ends within a frame was cut off.
func readAll(r io.Reader, b []byte) error {
	_, err := io.ReadFull(r, b)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

func appendTaken(b []byte, kind byte, taken uint64) []byte {
	return binary.BigEndian.AppendUint64(append(b, kind), taken)
}
