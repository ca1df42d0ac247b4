package ptyhost

import (
	"bufio"
	"net"

	"github.com/berthd/berth/ptyhost/screen"
)

// maxBacklog is how much output waits for one viewer. A viewer further behind than this is shown the screen as it is by then, unless it is Raw:
// then the program waits. It is a fifth of a second of a slow link, so Ctrl-C is felt soon.
const maxBacklog = 256 << 10

// maxMissed is how many scrolled lines a viewer that fell behind is given back at most, so that catching up can not itself fall behind.
const maxMissed = 1000

// viewer is the host's side of one attachment. Its fields are guarded by the session's lock.
type viewer struct {
	session  *session
	conn     net.Conn
	raw      bool
	readOnly bool
	size     Size
	typed    uint64 // when it last typed, in the session's count of such events; 0 never

	out    []byte // output not yet sent
	acks   int    // input consumed and not yet acknowledged
	stale  bool   // output was left out; a snapshot is due once out is sent
	seen   uint64 // lines scrolled when the viewer became stale
	queued int    // input under way

	telling bool // it is being told how the program ended

	ready chan struct{} // has room for one: there is something to send
	gone  chan struct{} // closed when the viewer left
}

func (v *viewer) wake() {
	select {
	case v.ready <- struct{}{}:
	default:
	}
}

// offer queues output that the screen has already taken in, after lines lines had scrolled off before it.
func (v *viewer) offer(p []byte, lines uint64) {
	switch {
	case v.stale:
		return
	case !v.raw && len(v.out) > 0 && len(v.out)+len(p) > maxBacklog:
		v.stale, v.seen = true, lines
	default:
		v.out = append(v.out, p...)
	}
	v.wake()
}

// full reports whether the program should wait for this viewer.
func (v *viewer) full() bool { return v.raw && len(v.out) >= maxBacklog }

// take moves what is to be sent into batch, and reports whether the session has ended and this was the last of it.
func (v *viewer) take(batch []byte, spare []byte) (frames, output []byte, exit *ExitStatus) {
	s := v.session
	s.mu.Lock()
	defer s.mu.Unlock()
	if v.acks > 0 {
		batch = appendAck(batch, v.acks)
		v.acks = 0
	}
	if len(v.out) == 0 && v.stale {
		missed := int(min(s.screen.lines()-v.seen, maxMissed))
		if missed == 0 {
			missed = -1
		}
		v.out = append(v.out, s.screen.snapshot(v.view(missed))...)
		v.stale = false
	}
	output, v.out = v.out, spare[:0]
	if len(output) > 0 {
		s.makeRoom()
	}
	if s.exit != nil && !v.stale {
		exit = s.exit
		v.telling = true
		s.told++ // before the viewer can act on it
	}
	return batch, output, exit
}

// view describes the viewer's window to the screen model.
func (v *viewer) view(lines int) screen.View {
	return screen.View{Rows: int(v.size.Rows), Cols: int(v.size.Cols), Lines: lines}
}

// send is the viewer's goroutine: it writes what is queued until the session ended and all is sent, or the viewer left.
func (v *viewer) send() error {
	var batch, spare []byte
	for {
		select {
		case <-v.ready:
		case <-v.gone:
			return net.ErrClosed
		}
		for {
			frames, output, exit := v.take(batch[:0], spare)
			for rest := output; len(rest) > 0; {
				n := min(len(rest), maxOutput)
				frames = appendFrame(frames, frameOutput, rest[:n])
				rest = rest[n:]
			}
			if exit != nil {
				frames = appendJSON(frames, frameExit, exit)
			}
			if len(frames) > 0 {
				if _, err := v.conn.Write(frames); err != nil {
					return err
				}
			}
			batch, spare = shrink(frames), shrink(output)
			if exit != nil {
				return nil
			}
			if len(frames) == 0 {
				break
			}
		}
	}
}

// shrink gives back a buffer that one burst made large, so that an idle viewer costs little.
func shrink(b []byte) []byte {
	if cap(b) > maxOutput {
		return nil
	}
	return b
}

// receive takes in what the client sends until it leaves.
func (v *viewer) receive(r *bufio.Reader) error {
	var buf []byte
	for {
		t, payload, err := readFrame(r, buf)
		if err != nil {
			return err
		}
		f, err := parseClientFrame(t, payload)
		if err != nil {
			return err
		}
		switch {
		case len(f.input) > 0:
			err = v.session.typed(v, f.input)
		case f.resize != Size{} && !v.readOnly:
			v.session.resize(v, f.resize)
		case f.signal != "" && !v.readOnly:
			if err := v.session.signal(f.signal); err != nil {
				v.session.log.Info("a viewer's signal did not arrive", "error", err) // what it was for has just ended
			}
		}
		if err != nil {
			return err
		}
		buf = shrink(payload)
	}
}
