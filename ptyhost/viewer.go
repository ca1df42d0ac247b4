package ptyhost

import (
	"bufio"
	"cmp"
	"math"
	"net"
	"sync"
	"time"

	"github.com/berthd/berth/ptyhost/screen"
)

// maxBacklog is how much output waits for one viewer. A viewer further behind than this is shown the screen as it is by then, unless it is Raw:
// then the program waits. It is a fifth of a second of a slow link, so Ctrl-C is felt soon.
const maxBacklog = 256 << 10

// How many scrolled lines a viewer is given back at most when it is caught up: all that the session keeps if it keeps up itself, and a
// flood was kept from it; few if it fell behind, so that catching up does not fall behind again.
const (
	missedInFlood = math.MaxInt
	missedBehind  = 1000
)

const (
	// batch is how much output of a flood a viewer is woken for: each time costs as much as reading some KiB.
	batch = 64 << 10

	// A viewer may be sent floodBurst bytes at once and floodRate a second: more than anybody reads, and than most terminals keep.
	// What is beyond it would keep the network, and the machines at both ends, from everything else. Such a flood is over
	// when there was room for floodOver bytes again, or no output for calm; until then the screen is drawn every redrawPause.
	floodBurst  = 1 << 20
	floodRate   = 2 << 20
	floodOver   = floodBurst / 4
	calm        = 5 * time.Millisecond
	redrawPause = 50 * time.Millisecond
)

// viewer is the host's side of one attachment. Its fields are guarded by the session's lock.
type viewer struct {
	session  *session
	conn     net.Conn
	name     string // by which another attachment may continue this one; may be empty
	raw      bool
	readOnly bool
	size     Size
	typed    uint64 // when it last typed, in the session's count of such events; 0 never

	out      []byte    // output not yet sent
	acks     int       // input consumed and not yet acknowledged
	stale    bool      // what it shows is not what it should; a snapshot is due once out is sent
	cut      bool      // its window has not the terminal's size
	seen     uint64    // lines scrolled when the viewer became stale
	missed   int       // how many of the lines since it is given back
	drawn    time.Time // when it became stale, or was shown the screen since
	budget   int       // what it may be sent of a flood
	refilled time.Time // when the budget was so
	queued   int       // input under way
	progress progress

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

// offer queues output that the screen took in just now, after lines lines had scrolled off before it.
func (v *viewer) offer(p []byte, lines uint64, now time.Time) {
	if v.raw {
		v.queue(p)
		return
	}
	v.refill(now)
	v.budget -= len(p)
	switch {
	case v.stale:
		v.budget = max(v.budget, 0)
	case len(v.out) > 0 && len(v.out)+len(p) > maxBacklog:
		v.miss(missedBehind, lines, now)
	case v.budget < 0:
		v.miss(missedInFlood, lines, now)
	default:
		v.queue(p)
	}
}

// miss leaves output out from here on, and makes the viewer keep time by itself.
func (v *viewer) miss(most int, lines uint64, now time.Time) {
	v.budget = max(v.budget, 0)
	v.stale, v.missed, v.seen, v.drawn = true, most, lines, now
	v.wake()
}

func (v *viewer) queue(p []byte) {
	v.put(p)
	if len(v.out) >= batch {
		v.wake()
	}
}

// refill gives the viewer what it may be sent more by now.
func (v *viewer) refill(now time.Time) {
	v.budget = min(v.budget+int(now.Sub(v.refilled).Seconds()*floodRate), floodBurst)
	v.refilled = now
}

// put appends to what is sent next.
func (v *viewer) put(p []byte) {
	if v.out == nil {
		v.out = buffers.Get().(*buffer).bytes[:0]
	}
	v.out = append(v.out, p...)
}

// redraw is called when the terminal or the window has a new size. A window that shows a part of the terminal now, or did before, is shown it anew.
// One that had the terminal's size and has it again has done to its text what the terminal did. The session's lock is held.
func (v *viewer) redraw() {
	was := v.cut
	v.cut = v.size != v.session.size
	if (was || v.cut) && !v.raw && !v.stale {
		v.stale, v.seen, v.drawn = true, v.session.screen.lines(), time.Now()
		v.wake()
	}
}

// full reports whether the program should wait for this viewer.
func (v *viewer) full() bool { return v.raw && len(v.out) >= maxBacklog }

// take moves what is to be sent out of the viewer: frames, then output, then that the session has ended, if it has and this was the last of it. If
// the viewer is to be caught up but not yet, pause says when to ask again.
func (v *viewer) take(frames []byte) (_, output []byte, exit *ExitStatus, pause time.Duration) {
	s := v.session
	s.mu.Lock()
	defer s.mu.Unlock()
	if v.acks > 0 {
		frames = appendAck(frames, v.acks)
		v.acks = 0
	}
	if len(v.out) == 0 && v.stale {
		pause = v.catchUp(time.Now())
	}
	output, v.out = v.out, nil
	if len(output) > 0 {
		s.makeRoom()
		lines := s.screen.lines()
		if v.stale {
			lines = v.seen
		}
		v.progress.note(len(output), lines)
	}
	if s.exit != nil && !v.stale {
		exit = s.exit
		v.telling = true
		s.told++ // before the viewer can act on it
	}
	return frames, output, exit, pause
}

// catchUp queues what a viewer is shown instead of what was left out: while the flood goes on the screen now and then, at its end the lines
// missed as well. It returns how long to wait for either.
func (v *viewer) catchUp(now time.Time) (pause time.Duration) {
	s := v.session
	v.refill(now)
	over := now.Sub(s.shown) >= calm || v.budget >= floodOver || s.exit != nil
	if !over && now.Sub(v.drawn) < redrawPause {
		return min(redrawPause-now.Sub(v.drawn), calm-now.Sub(s.shown))
	}
	missed := -1
	if over {
		missed = cmp.Or(int(min(s.screen.lines()-v.seen, uint64(v.missed))), missed)
		v.stale = false
	}
	v.put(s.screen.snapshot(v.view(missed)))
	v.drawn = now
	if over {
		return 0
	}
	return min(redrawPause, calm)
}

// view describes the viewer's window to the screen model.
func (v *viewer) view(lines int) screen.View {
	return screen.View{Rows: int(v.size.Rows), Cols: int(v.size.Cols), Lines: lines}
}

// send is the viewer's goroutine: it writes what is queued until the session ended and all is sent, or the viewer left.
func (v *viewer) send() error {
	var frames []byte
	again := time.NewTimer(time.Hour)
	defer again.Stop()
	for {
		select {
		case <-v.ready:
		case <-again.C:
		case <-v.gone:
			return net.ErrClosed
		}
		for {
			var output []byte
			var exit *ExitStatus
			var pause time.Duration
			frames, output, exit, pause = v.take(frames[:0])
			if pause > 0 {
				again.Reset(pause)
			}
			if len(frames) == 0 && len(output) == 0 && exit == nil {
				break
			}
			if err := v.write(frames, output, exit); err != nil {
				return err
			}
			if exit != nil {
				return nil
			}
		}
	}
}

// write sends frames, output and how the program ended. It gives back output's buffer.
func (v *viewer) write(frames, output []byte, exit *ExitStatus) error {
	for rest := output; len(rest) > 0; {
		n := min(len(rest), maxFrame)
		frames = appendHeader(frames, frameOutput, n)
		parts := net.Buffers{frames, rest[:n]}
		if _, err := parts.WriteTo(v.conn); err != nil {
			return err
		}
		frames, rest = frames[:0], rest[n:]
	}
	if output != nil {
		recycle(output)
	}
	if exit != nil {
		frames = appendJSON(frames, frameExit, exit)
	}
	if len(frames) == 0 {
		return nil
	}
	_, err := v.conn.Write(frames)
	return err
}

// A buffer carries output to a viewer; between, no viewer holds one.
type buffer struct{ bytes []byte }

var buffers = sync.Pool{New: func() any { return &buffer{make([]byte, 0, batch+readSize)} }}

// recycle keeps b for other output, unless a snapshot made it huge.
func recycle(b []byte) {
	if cap(b) <= 2*maxBacklog {
		buffers.Put(&buffer{b})
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
		case f.resize != Size{}:
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
