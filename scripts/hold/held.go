package hold

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

const (
	// attachTimeout is how long a holder has for its first word: one that was just started has to load its program.
	attachTimeout = 30 * time.Second
	// ackStep is how much is taken before the holder is told so, as long as more comes at once.
	ackStep = 64 << 10
)

// ErrGone is what [Held.Follow] returns when the holder has ended before all was said.
var ErrGone = errors.New("the process that held it was killed")

// Held is one who is attached to a holder. Its methods may be called at the same time.
type Held struct {
	State State

	conn  net.Conn
	r     *bufio.Reader
	ended <-chan struct{} // closed when the holder is gone; nil if it is no child of ours

	mu sync.Mutex // held while something is said
}

// Taker takes what a command prints on one stream. It is never asked to take again what is settled.
type Taker interface {
	io.WriteCloser
	// Settled is how many bytes of the stream, from its beginning, need not be kept any more. At first it is where
	// the taker wants to go on. It is never more than 64 KiB behind what was written.
	Settled() uint64
}

// Attach attaches to the holder at the other end of conn, which is the Held's from then on.
func Attach(conn net.Conn) (*Held, error) {
	h := &Held{conn: conn, r: bufio.NewReaderSize(conn, maxData)}
	conn.SetReadDeadline(time.Now().Add(attachTimeout))
	f, _, err := readFrame(h.r, nil, maxBody)
	if err == nil {
		if f.kind != kindState {
			err = fmt.Errorf("its first frame is of kind %d", f.kind)
		} else {
			err = json.Unmarshal(f.body, &h.State)
		}
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("cannot attach to what holds a script: %w", err)
	}
	conn.SetReadDeadline(time.Time{})
	return h, nil
}

// Follow passes on what the command prints until its streams have ended, and closes each taker then. exited is called with how the
// command ended, before Follow returns nil. An error of a taker changes nothing: it must deal with that itself. Follow
// returns an error wrapping [ErrGone] or [net.ErrClosed] if it was cut off.
func (h *Held) Follow(to [streams]Taker, exited func(Exit)) error {
	from := frame{kind: kindFrom}
	var told [streams]uint64
	for i, t := range to {
		told[i] = t.Settled()
		from.body = binary.LittleEndian.AppendUint64(from.body, told[i])
	}
	if err := h.say(from); err != nil {
		return err
	}
	var buf []byte
	for left := streams + 1; left > 0; {
		var f frame
		var err error
		if f, buf, err = readFrame(h.r, buf, maxBody); err != nil {
			return gone(err)
		}
		switch f.kind {
		case kindData:
			to[f.stream].Write(f.body)
			settled := to[f.stream].Settled()
			if settled-told[f.stream] >= ackStep || settled > told[f.stream] && h.r.Buffered() == 0 {
				told[f.stream] = settled
				if err := h.say(frame{kindTaken, f.stream, binary.LittleEndian.AppendUint64(nil, settled)}); err != nil {
					return err
				}
			}
		case kindEnd:
			left--
			to[f.stream].Close()
		case kindExit:
			left--
			var exit Exit
			if err := json.Unmarshal(f.body, &exit); err != nil {
				return fmt.Errorf("cannot read how a script ended: %w", err)
			}
			exited(exit)
		default:
			return fmt.Errorf("cannot follow a script: its holder sent a frame of kind %d", f.kind)
		}
	}
	return nil
}

// gone is what a failed read or write means.
func gone(err error) error {
	if errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrClosedPipe) {
		return net.ErrClosed
	}
	return fmt.Errorf("%w (%v)", ErrGone, err)
}

func (h *Held) say(f frame) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := writeFrame(h.conn, f); err != nil {
		return gone(err)
	}
	return nil
}

// HangUp ends the command and all that came of it: SIGHUP, and SIGKILL after its grace.
func (h *Held) HangUp() error { return h.say(frame{kind: kindHangUp}) }

// Kill ends the command and all that came of it at once, and the holder with it.
func (h *Held) Kill() error { return h.say(frame{kind: kindKill}) }

// Reported says that how the command ended is dealt with: whoever attaches later is told.
func (h *Held) Reported() error { return h.say(frame{kind: kindReported}) }

// Release lets the holder end as soon as nothing of its command is left to end.
func (h *Held) Release() error { return h.say(frame{kind: kindRelease}) }

// Wait waits until the holder has ended, or limit has passed, and closes the Held. Nobody may follow meanwhile.
func (h *Held) Wait(limit time.Duration) {
	h.conn.SetReadDeadline(time.Now().Add(limit))
	_, err := io.Copy(io.Discard, h.conn)
	h.conn.Close()
	if err == nil && h.ended != nil {
		<-h.ended
	}
}

// Close leaves the command to the next who attaches.
func (h *Held) Close() error { return h.conn.Close() }
