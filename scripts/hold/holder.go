package hold

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

const (
	// gather is how long output may gather in a pipe when it came in small pieces: a command that prints line by
	// line, faster than others see, would wake us for each. The pipe has room for much more meanwhile.
	gather = 2 * time.Millisecond
	// smallRead is what counts as a small piece.
	smallRead = 32 << 10
	// groupPoll is how often the processes of a hung-up command are looked at.
	groupPoll = 100 * time.Millisecond
)

// holder is one at work.
type holder struct {
	job          Job
	log          *os.File // nil: none
	hangUp, kill order

	mu       sync.Mutex
	changed  *sync.Cond
	streams  [streams]*stream
	ending   Exit // what is known so far
	exit     *Exit
	reported bool
	conn     net.Conn // who is attached; nil: nobody
	exitTold bool     // to it
	released bool     // nobody is to attach any more
	deaf     bool     // nothing is kept any more
	alone    *time.Timer
	conns    sync.WaitGroup
}

// order is given once, however often.
type order struct {
	once  sync.Once
	given chan struct{}
}

func (o *order) give() { o.once.Do(func() { close(o.given) }) }

// Run starts a job's command and holds it until it is released, or nobody cares any more. conn is the first that is
// attached. All output goes to log too, which may be nil; Run closes it. credential may be nil.
func Run(job Job, credential *syscall.Credential, conn net.Conn, log *os.File) {
	h := &holder{job: job, log: log, hangUp: order{given: make(chan struct{})}, kill: order{given: make(chan struct{})}}
	h.changed = sync.NewCond(&h.mu)
	h.ending.Start = time.Now()
	if log != nil {
		defer log.Close()
	}
	var writes [streams]*os.File
	for i := range h.streams {
		var err error
		if h.streams[i], writes[i], err = openStream(); err != nil {
			h.refuse(conn, err)
			return
		}
	}
	var reading, listening sync.WaitGroup
	for _, s := range h.streams {
		reading.Go(func() { h.read(s) })
	}
	l := h.listen()
	if l != nil {
		listening.Go(func() { h.accept(l) })
	}
	h.attach(conn)
	h.execute(credential, writes)
	h.awaitRelease()
	if l != nil {
		l.Close() // and its file is gone before anybody is told
	}
	h.sendAway()
	for _, s := range h.streams {
		s.read.Close()
	}
	listening.Wait()
	reading.Wait()
	h.conns.Wait()
}

// awaitRelease waits until the holder is not wanted any more.
func (h *holder) awaitRelease() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for !h.released && !(h.deaf && h.streams[Stdout].ended && h.streams[Stderr].ended) {
		h.changed.Wait()
	}
	h.released, h.deaf = true, true
}

// sendAway ends what is left of a holder that is not wanted any more.
func (h *holder) sendAway() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.conn != nil {
		h.conn.Close()
	}
	if h.alone != nil {
		h.alone.Stop()
	}
	h.changed.Broadcast()
}

// refuse tells that there was not even a pipe.
func (h *holder) refuse(conn net.Conn, err error) {
	defer conn.Close()
	now := time.Now()
	_ = errors.Join( // nobody hears, if this fails
		writeJSON(conn, kindState, State{Tag: h.job.Tag, Pid: os.Getpid()}),
		writeFrame(conn, frame{kind: kindEnd, stream: Stdout}),
		writeFrame(conn, frame{kind: kindEnd, stream: Stderr}),
		writeJSON(conn, kindExit, Exit{Start: now, End: now, Code: -1, Failure: err.Error()}),
	)
}

// hint says how to mend a command that could not be started.
func hint(program string, err error) string {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return fmt.Sprintf("; install %s as a program that can be run, or correct the script's first line", program)
	}
	return ""
}

// execute runs the command, and returns when nothing is left of one that was hung up.
func (h *holder) execute(credential *syscall.Credential, writes [streams]*os.File) {
	cmd := &exec.Cmd{
		Path: h.job.Path, Args: h.job.Args, Dir: h.job.Dir, Env: append([]string{}, h.job.Env...), Stdout: writes[Stdout], Stderr: writes[Stderr],
		SysProcAttr: &syscall.SysProcAttr{Setsid: true, Credential: credential},
	}
	err := cmd.Start()
	for _, w := range writes {
		w.Close()
	}
	ended := make(chan struct{})
	if err != nil {
		h.ended(-1, fmt.Sprintf("cannot start the script: %v%s", err, hint(h.job.Args[0], err)))
		return
	}
	go func() {
		defer close(ended)
		cmd.Wait() // its state says all
		h.ended(cmd.ProcessState.ExitCode(), "")
	}()
	h.end(cmd.Process.Pid, ended)
	<-ended
}

// end waits until the command has ended, or is to be ended, and sees to that.
func (h *holder) end(pid int, ended <-chan struct{}) {
	var timeout <-chan time.Time
	if h.job.Timeout > 0 {
		timer := time.NewTimer(h.job.Timeout)
		defer timer.Stop()
		timeout = timer.C
	}
	timedOut := false
	select {
	case <-ended:
		return
	case <-timeout:
		timedOut = true
	case <-h.hangUp.given:
	case <-h.kill.given:
	}
	h.mu.Lock()
	h.ending.HungUp, h.ending.TimedOut = true, timedOut
	h.mu.Unlock()
	tree := NewTree(pid)
	tree.Signal(syscall.SIGHUP)
	defer tree.Kill()
	deadline := time.NewTimer(h.job.Grace)
	defer deadline.Stop()
	tick := time.NewTicker(groupPoll)
	defer tick.Stop()
	for tree.Signal(0) {
		select {
		case <-tick.C:
		case <-deadline.C:
			return
		case <-h.kill.given:
			return
		}
	}
}

// ended notes how the command ended.
func (h *holder) ended(code int, failure string) {
	if h.job.Remove != "" {
		os.Remove(h.job.Remove) // what stays is a file among the script's own
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	exit := h.ending
	exit.End, exit.Code, exit.Failure = time.Now(), code, failure
	h.exit = &exit
	h.changed.Broadcast()
}

// read keeps what comes on a stream, until its end.
func (h *holder) read(s *stream) {
	defer s.read.Close()
	var deaf []byte // where it is read to when nothing is kept
	for {
		h.mu.Lock()
		room := s.room()
		for room == nil && !h.deaf {
			h.changed.Wait()
			room = s.room()
		}
		if h.deaf {
			if deaf == nil {
				deaf = make([]byte, smallRead)
			}
			room = deaf
		}
		h.mu.Unlock()
		n, err := s.read.Read(room)
		var logErr error
		if n > 0 && h.log != nil {
			_, logErr = h.log.Write(room[:n]) // a full disk must neither stop the script nor its way to the server
		}
		h.mu.Lock()
		if deaf == nil {
			s.end += n
		}
		if logErr != nil && h.ending.LogFailure == "" {
			h.ending.LogFailure = logErr.Error()
		}
		s.ended = err != nil
		h.changed.Broadcast()
		h.mu.Unlock()
		if err != nil {
			return
		}
		if n < smallRead {
			time.Sleep(gather)
		}
	}
}

// listen makes the socket. Without one the command is held all the same, for who has started it.
func (h *holder) listen() net.Listener {
	if h.job.Socket == "" {
		return nil
	}
	l, err := net.Listen("unix", h.job.Socket)
	if err != nil {
		return nil
	}
	// Its directory is private already; this holds should somebody open that up.
	if err := os.Chmod(h.job.Socket, 0o600); err != nil {
		l.Close()
		return nil
	}
	return l
}

func (h *holder) accept(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		h.hearOut()
		h.attach(conn)
	}
}

// lastWords is how long one who was attached is listened to when another comes. The first has ended, most likely, and what it said last was said at once.
const lastWords = time.Second

// hearOut waits until nobody is attached any more.
func (h *holder) hearOut() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.conn != nil {
		h.conn.SetReadDeadline(time.Now().Add(lastWords))
	}
	for h.conn != nil {
		h.changed.Wait()
	}
}

// attach makes conn the one that is attached.
func (h *holder) attach(conn net.Conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.deaf {
		conn.Close()
		return
	}
	if h.alone != nil {
		h.alone.Stop()
	}
	h.conn, h.exitTold = conn, false
	state := State{Tag: h.job.Tag, Pid: os.Getpid(), Started: h.ending.Start, Reported: h.reported}
	for i, s := range h.streams {
		s.sent, s.told = s.base, false
		state.Kept[i], state.Pipes[i] = s.base, s.inode
	}
	h.conns.Go(func() { h.serve(conn, state) })
}

// serve speaks with the one that is attached until it leaves or another takes its place.
func (h *holder) serve(conn net.Conn, state State) {
	var sending sync.WaitGroup
	defer sending.Wait()
	defer h.detach(conn)
	if writeJSON(conn, kindState, state) != nil {
		return
	}
	r := bufio.NewReaderSize(conn, 4<<10)
	var buf []byte
	for begun := false; ; {
		var f frame
		var err error
		if f, buf, err = readFrame(r, buf, maxCommand); err != nil {
			return
		}
		switch f.kind {
		case kindFrom:
			from, ok := offsets(f.body, streams)
			if !ok || begun {
				return
			}
			begun = true
			h.update(conn, func() {
				for i, s := range h.streams {
					s.taken(from[i])
					s.sent = max(s.base, from[i])
				}
			})
			sending.Go(func() { h.send(conn) })
		case kindTaken:
			offset, ok := offsets(f.body, 1)
			if !ok {
				return
			}
			h.update(conn, func() { h.streams[f.stream].taken(min(offset[0], h.streams[f.stream].sent)) })
		case kindReported:
			h.update(conn, func() { h.reported = true })
		case kindHangUp:
			h.hangUp.give()
		case kindKill:
			h.kill.give()
			h.update(conn, func() { h.released = true })
		case kindRelease:
			h.update(conn, func() { h.released = true })
		default:
			return
		}
	}
}

// update changes something, unless another has taken conn's place.
func (h *holder) update(conn net.Conn, change func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.conn == conn {
		change()
		h.changed.Broadcast()
	}
}

// detach notes that conn has ended. Then nobody is attached, and the holder's patience begins to end.
func (h *holder) detach(conn net.Conn) {
	conn.Close()
	h.update(conn, func() {
		h.conn = nil
		h.alone = time.AfterFunc(h.job.Patience, func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			if h.conn == nil {
				h.deaf = true
				if h.job.Socket != "" {
					os.Remove(h.job.Socket)
				}
				h.changed.Broadcast()
			}
		})
	})
}

// send sends what comes, until conn ends.
func (h *holder) send(conn net.Conn) {
	var encoded []byte
	for {
		var ok bool
		if encoded, ok = h.next(conn, encoded[:0]); !ok {
			return
		}
		if _, err := conn.Write(encoded); err != nil {
			conn.Close()
			return
		}
	}
}

// next waits for something that conn has not been told, and appends it to b; false if conn is not attached any more.
func (h *holder) next(conn net.Conn, b []byte) ([]byte, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.conn == conn {
		for i, s := range h.streams {
			if s.sent < s.top() {
				data := s.unsent()
				s.sent += uint64(len(data))
				b = appendFrame(b, frame{kindData, i, data})
			} else if s.ended && !s.told {
				s.told = true
				b = appendFrame(b, frame{kind: kindEnd, stream: i})
			}
		}
		if h.exit != nil && !h.exitTold {
			h.exitTold = true
			if body, err := json.Marshal(h.exit); err == nil {
				b = appendFrame(b, frame{kind: kindExit, body: body})
			}
		}
		if len(b) > 0 {
			return b, true
		}
		h.changed.Wait()
	}
	return b, false
}
