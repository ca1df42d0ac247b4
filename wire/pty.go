package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/google/uuid"
)

// A terminal stream on [PortPTY] begins with one frame from the client, a [PTYInit]: its length as
// two bytes little-endian, then that many bytes of JSON. After it the client sends JSON objects
// ([PTYRequest]) without separators, and the agent sends the terminal's bytes as they are.

// PTYInit opens a terminal or attaches to one. The JSON keys are Go-cased on the wire.
type PTYInit struct {
	ID            uuid.UUID
	Height, Width uint16
	// Command is run by the user's shell; empty means a login shell.
	Command string
	// Container and ContainerUser name where to run instead of the machine itself.
	Container     string `json:",omitempty"`
	ContainerUser string `json:",omitempty"`
	// BackendType is "", "screen" or "buffered"; berth keeps its own screen and reads no difference.
	BackendType string `json:",omitempty"`

	// What follows is berth's addition; stock agents read past it.

	// Name is what people call the terminal, shown in lists; it is given when the terminal is new.
	Name string `json:",omitempty"`
	// ReadOnly watches: what is typed and the window's size are left aside.
	ReadOnly bool `json:",omitempty"`
	// Existing asks for a terminal that is there already: if it is not, the agent says so and starts none.
	Existing bool `json:",omitempty"`
	// Ending asks for a [PTYEnding] as the last bytes of the stream.
	Ending bool `json:",omitempty"`
	// View names this stream, at most 64 bytes. After is the View of one that broke off after Got bytes of it
	// arrived: what follows begins with the lines that scrolled since, not with the whole scrollback.
	View  string `json:",omitempty"`
	After string `json:",omitempty"`
	Got   uint64 `json:",omitempty"`
}

// PTYEnding says why a terminal's stream ends. It follows the terminal's last byte as an application
// program command (APC), which terminals show nothing of. A stream that ends without one was cut off.
type PTYEnding struct {
	Code   int    `json:"code"`             // the exit code; 128+n if a signal ended the program
	Signal string `json:"signal,omitempty"` // the signal that ended the program, as in "KILL"
	Reason string `json:"reason,omitempty"` // why the agent ended the terminal or has none, in words; empty if the program ended by itself
}

const (
	ptyEndingStart = "\x1b_berth-ending;"
	ptyEndingEnd   = "\x1b\\"
	// MaxPTYEnding bounds an encoded ending in bytes: a reader that keeps this
	// much of the stream's end has all of it (docs/terminals.md#the-stream-on-the-mesh).
	MaxPTYEnding = 1 << 10
)

// AppendPTYEnding appends the bytes that end a stream. A reason over 400 bytes is cut, one of which JSON makes more than fits
// still shorter.
func AppendPTYEnding(b []byte, e PTYEnding) []byte {
	// With the same words before it as text, an ending of this length is still in one packet of the mesh.
	for room := 400; ; room /= 2 {
		e.Reason = strings.ToValidUTF8(e.Reason[:min(len(e.Reason), room)], "")
		body, err := json.Marshal(e)
		if err != nil {
			body = []byte("{}") // it holds a number and two strings, so there is no such error
		}
		if room == 0 || len(ptyEndingStart)+len(body)+len(ptyEndingEnd) <= MaxPTYEnding {
			return append(append(append(b, ptyEndingStart...), body...), ptyEndingEnd...)
		}
	}
}

// CutPTYEnding takes the ending off the last bytes of a stream, if there is one.
func CutPTYEnding(tail []byte) (rest []byte, e PTYEnding, ok bool) {
	i := bytes.LastIndex(tail, []byte(ptyEndingStart))
	if i < 0 || !bytes.HasSuffix(tail, []byte(ptyEndingEnd)) {
		return tail, PTYEnding{}, false
	}
	body := tail[i+len(ptyEndingStart) : len(tail)-len(ptyEndingEnd)]
	if err := json.Unmarshal(body, &e); err != nil {
		return tail, PTYEnding{}, false
	}
	return tail[:i], e, true
}

// PTYOutput is the output of a stream whose ending was asked for, as it comes in pieces. The zero value is ready.
type PTYOutput struct {
	held []byte // what may be the ending, MaxPTYEnding bytes at most
}

// Next returns what of the output up to p can be shown. It is valid until p is used again.
func (o *PTYOutput) Next(p []byte) []byte {
	data := p
	if len(o.held) > 0 {
		data = append(o.held, p...)
	}
	from := max(0, len(data)-MaxPTYEnding)
	for {
		i := bytes.IndexByte(data[from:], ptyEndingStart[0])
		if i < 0 {
			o.held = nil
			return data
		}
		from += i
		if rest := data[from:]; bytes.HasPrefix(rest, []byte(ptyEndingStart)) || strings.HasPrefix(ptyEndingStart, string(rest[:min(len(rest), len(ptyEndingStart))])) {
			o.held = bytes.Clone(rest)
			return data[:from]
		}
		from++
	}
}

// End returns what is left to show at the end of the stream, and the ending if there is one.
func (o *PTYOutput) End() (rest []byte, e PTYEnding, ok bool) { return CutPTYEnding(o.held) }

// WritePTYInit writes the frame in one Write: a stock agent reads it with a single read.
func WritePTYInit(w io.Writer, p PTYInit) error {
	body, err := json.Marshal(p)
	if err != nil {
		return fmt.Errorf("cannot encode terminal request: %w", err)
	}
	if len(body) > 0xffff {
		return fmt.Errorf("cannot send a terminal request of %d bytes: at most 65535 fit", len(body))
	}
	frame := binary.LittleEndian.AppendUint16(make([]byte, 0, 2+len(body)), uint16(len(body)))
	_, err = w.Write(append(frame, body...))
	return err
}

// ReadPTYInit reads the frame; it takes no byte beyond it.
func ReadPTYInit(r io.Reader) (PTYInit, error) {
	var p PTYInit
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return p, fmt.Errorf("cannot read the length of a terminal request: %w", err)
	}
	body := make([]byte, binary.LittleEndian.Uint16(head[:]))
	if _, err := io.ReadFull(r, body); err != nil {
		return p, fmt.Errorf("cannot read a terminal request: %w", err)
	}
	if err := json.Unmarshal(body, &p); err != nil {
		return PTYInit{}, fmt.Errorf("cannot decode a terminal request: %w", err)
	}
	if p.ID == uuid.Nil {
		return PTYInit{}, errors.New("cannot open a terminal without a session id")
	}
	return p, nil
}

// PTYRequest is input, a new size, or both. A size counts only when both numbers are set, and takes
// effect after the data.
type PTYRequest struct {
	Data   string `json:"data,omitempty"`
	Height uint16 `json:"height,omitempty"`
	Width  uint16 `json:"width,omitempty"`
}

// MaxPTYRequest bounds one [PTYRequest]: a large paste, with every byte escaped (docs/protocol.md#names).
const MaxPTYRequest = 1 << 20

// PTYRequestReader reads the requests that follow a [PTYInit].
type PTYRequestReader struct {
	limit *io.LimitedReader
	dec   *json.Decoder
}

// NewPTYRequestReader returns a reader on r, which it may read ahead of.
func NewPTYRequestReader(r io.Reader) *PTYRequestReader {
	limit := &io.LimitedReader{R: r}
	return &PTYRequestReader{limit: limit, dec: json.NewDecoder(limit)}
}

// Next returns the next request, [io.EOF] at a clean end. A request over [MaxPTYRequest] or JSON that
// is none ends the stream with an error.
func (p *PTYRequestReader) Next() (PTYRequest, error) {
	p.limit.N = MaxPTYRequest
	var req PTYRequest
	err := p.dec.Decode(&req)
	switch {
	case err == nil:
		return req, nil
	case p.limit.N <= 0:
		return PTYRequest{}, fmt.Errorf("cannot read terminal input: a request exceeds %d bytes", MaxPTYRequest)
	case errors.Is(err, io.EOF):
		return PTYRequest{}, io.EOF
	}
	return PTYRequest{}, fmt.Errorf("cannot read terminal input: %w", err)
}
