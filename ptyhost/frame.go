package ptyhost

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"syscall"
	"time"
)

// The protocol of the socket, one connection per attachment or call:
//
//	client                       host
//	hello {version}
//	attach | list | kill | …  →
//	                          ←  hello {version}
//	                          ←  error {code, message}                 and the connection ends, or
//	                          ←  attached {info, created}              for attach, then both sides at will:
//	input, resize, signal     →
//	                          ←  output, ack
//	                          ←  exit {code, signal, reason}           last
//	                          ←  sessions [info…] | done               for the calls; after watch the host holds the connection
//
// A frame is a type byte, a big-endian 32-bit length and that many bytes. Frames of unknown type are skipped and unknown JSON fields ignored, so
// both sides may be of any build: a new frame or field may be added, a known one never changes its meaning. The version in hello counts additions:
// who wants an answer to a new frame looks at it first.
//
// The client may have inputWindow bytes of input under way; ack frames (a big-endian 32-bit count) give room back as the program reads. Hence the
// host never stops reading, and notices at once when a viewer resizes or leaves, whatever the program does.
type frameType byte

const (
	frameHello    frameType = 1
	frameError    frameType = 2
	frameDone     frameType = 3
	frameAttach   frameType = 16
	frameAttached frameType = 17
	frameList     frameType = 18
	frameSessions frameType = 19
	frameKill     frameType = 20
	frameShutdown frameType = 21
	frameRename   frameType = 22
	frameWatch    frameType = 23
	frameInput    frameType = 32
	frameOutput   frameType = 33
	frameAck      frameType = 34
	frameResize   frameType = 35
	frameSignal   frameType = 36
	frameExit     frameType = 37
)

const (
	protocolVersion = versionRename

	versionRename = 2 // rename, watch

	headerLen   = 5
	maxFrame    = 4 << 20  // an environment may be as large as Linux lets a program have it (2 MiB), and JSON escapes
	maxOutput   = 64 << 10 // bytes of one output or input frame as we send them
	inputWindow = 64 << 10 // input under way per viewer; a paste fits, a file sent by mistake waits
)

type helloMessage struct {
	Version int `json:"version"`
	PID     int `json:"pid,omitempty"`
}

type attachedMessage struct {
	Info    SessionInfo `json:"info"`
	Created bool        `json:"created"`
}

type killMessage struct {
	ID     string `json:"id"`
	Signal string `json:"signal"`
}

type renameMessage struct {
	ID          string        `json:"id"`
	Name        string        `json:"name"`
	IdleTimeout time.Duration `json:"idle_timeout"`
}

type errorMessage struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// errorCodes maps the errors that callers tell apart to the codes they travel as.
var errorCodes = []struct {
	code string
	err  error
}{{"no-session", ErrNoSession}, {"start", ErrStart}, {"bad-name", ErrBadName}, {"name-taken", ErrNameTaken}}

// remoteError is an error of the host, as it read there.
type remoteError struct {
	message string
	kind    error // one of errorCodes, or nil
}

func (e *remoteError) Error() string { return e.message }
func (e *remoteError) Unwrap() error { return e.kind }

var errFrame = errors.New("malformed frame")

// readHeader reads a frame's type and length. It returns io.EOF only between frames.
func readHeader(r *bufio.Reader) (frameType, int, error) {
	h, err := r.Peek(headerLen)
	if err != nil {
		if errors.Is(err, io.EOF) && len(h) > 0 {
			err = io.ErrUnexpectedEOF
		}
		return 0, 0, err
	}
	n := binary.BigEndian.Uint32(h[1:])
	if n > maxFrame {
		return 0, 0, fmt.Errorf("%w: %d bytes, the limit is %d", errFrame, n, maxFrame)
	}
	t := frameType(h[0])
	_, err = r.Discard(headerLen)
	return t, int(n), err
}

// readFrame reads a whole frame into buf, which it grows as bytes arrive, never on the word of a header alone.
func readFrame(r *bufio.Reader, buf []byte) (frameType, []byte, error) {
	t, n, err := readHeader(r)
	if err != nil {
		return 0, nil, err
	}
	buf = buf[:0]
	for len(buf) < n {
		step := min(n-len(buf), maxOutput)
		at := len(buf)
		buf = append(buf, make([]byte, step)...)
		if _, err := io.ReadFull(r, buf[at:]); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return 0, nil, err
		}
	}
	return t, buf, nil
}

func appendHeader(b []byte, t frameType, n int) []byte {
	return binary.BigEndian.AppendUint32(append(b, byte(t)), uint32(n))
}

func appendFrame(b []byte, t frameType, payload []byte) []byte {
	return append(appendHeader(b, t, len(payload)), payload...)
}

// appendJSON appends a frame that holds v. Every v is one of the plain structs above, which always marshal.
func appendJSON(b []byte, t frameType, v any) []byte {
	payload, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("ptyhost: cannot marshal %T: %v", v, err))
	}
	return appendFrame(b, t, payload)
}

func appendSize(b []byte, s Size) []byte {
	b = binary.BigEndian.AppendUint16(appendHeader(b, frameResize, 4), s.Rows)
	return binary.BigEndian.AppendUint16(b, s.Cols)
}

func appendAck(b []byte, n int) []byte {
	return binary.BigEndian.AppendUint32(appendHeader(b, frameAck, 4), uint32(n))
}

func appendError(b []byte, err error) []byte {
	m := errorMessage{Code: "internal", Message: err.Error()}
	for _, c := range errorCodes {
		if errors.Is(err, c.err) {
			m.Code = c.code
			break
		}
	}
	return appendJSON(b, frameError, m)
}

func parseError(payload []byte) error {
	var m errorMessage
	if err := json.Unmarshal(payload, &m); err != nil {
		return fmt.Errorf("%w: %v", errFrame, err)
	}
	e := &remoteError{message: m.Message}
	for _, c := range errorCodes {
		if c.code == m.Code {
			e.kind = c.err
		}
	}
	return e
}

// clientFrame is a frame of an attached client, decoded. Of its fields one is set.
type clientFrame struct {
	input  []byte // valid until the next frame
	resize Size
	signal string
}

// parseClientFrame decodes what an attached client sends; a frame of unknown type gives a zero clientFrame.
func parseClientFrame(t frameType, payload []byte) (clientFrame, error) {
	switch t {
	case frameInput:
		return clientFrame{input: payload}, nil
	case frameResize:
		if len(payload) < 4 {
			return clientFrame{}, fmt.Errorf("%w: a resize of %d bytes", errFrame, len(payload))
		}
		return clientFrame{resize: Size{Rows: binary.BigEndian.Uint16(payload), Cols: binary.BigEndian.Uint16(payload[2:])}.clamped()}, nil
	case frameSignal:
		if len(payload) == 0 || len(payload) > 16 {
			return clientFrame{}, fmt.Errorf("%w: a signal of %d bytes", errFrame, len(payload))
		}
		return clientFrame{signal: string(payload)}, nil
	}
	return clientFrame{}, nil
}

// gone reports whether err is the other side having hung up.
func gone(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}
