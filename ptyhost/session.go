package ptyhost

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	neverAttached = 30 * time.Second // life of a session whose creator left before it was told of it

	// exitGrace is how long output is awaited after the program's own end while something it started keeps the terminal open.
	exitGrace = 100 * time.Millisecond
	// exitBytes is how much of such output is kept: more than the kernel buffers, so all that came before the end is among it.
	exitBytes = 256 << 10

	readSize = 4 << 10 // Linux gives no more per read of a terminal

	// After this many pieces without a pause, far more than an answer to a key, a program floods. The thread that reads it was most likely
	// the one that waited for all descriptors, and Go puts no other in its place by itself: every other session's keys would wait for 10 ms,
	// until the runtime's monitor looks. Gosched has another thread take over, once for each flood.
	floodPieces = 4

	// maxViewers bounds the viewers of one session. One that never reads holds a snapshot, at most 4 MiB and a little.
	maxViewers = 64

	hangupGrace = 3 * time.Second // between hanging a session up and killing it

	// After a resize the next waits this long, and at least resizeShare times as long as that one took: viewers that resize all the time, and
	// programs that redraw for each, leave most of the time to everybody else. Nobody sees more than 50 sizes a second.
	resizePause = 20 * time.Millisecond
	resizeShare = 4
)

// session is one program on one terminal. It outlives its viewers.
type session struct {
	id   string
	req  CreateRequest
	tty  *terminal
	log  *slog.Logger
	done chan struct{} // closed when the program ended and its output was read
	kept *time.Timer   // forgets the session some time after its end; the host's lock guards it

	created time.Time
	room    chan struct{} // has room for one: a raw viewer that was full is not any more
	typing  chan struct{} // has room for one: there is input to write

	mu         sync.Mutex // guards what follows, and with it orders snapshots and output
	screen     *picture
	size       Size
	viewers    map[*viewer]struct{}
	left       map[string]*progress // of viewers that left, by name
	leaves     uint64               // how many did
	active     *viewer              // whose size the terminal has, or gets when it may
	resizable  time.Time
	refit      *time.Timer // set while a resize waits
	events     uint64
	inputs     []input
	lastActive time.Time
	shown      time.Time // when there was output last
	attached   bool      // some viewer was told that it is attached
	told       int       // viewers that were told, or are being told, how the program ended
	reaped     bool      // the program's process id may belong to someone else
	reason     string
	kill       *time.Timer
	exit       *ExitStatus
	idle       *time.Timer
	endsAt     time.Time // when idle fires
	leftAt     time.Time // when the last viewer left, zero while there are some
}

// input is what one viewer typed, waiting for the program to read it.
type input struct {
	from *viewer
	data []byte
}

func newSession(id string, req CreateRequest, size Size, log *slog.Logger) (*session, error) {
	size = size.clamped()
	tty, err := start(&req, size)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	s := &session{
		id: id, req: req, tty: tty, log: log.With("session", id),
		done: make(chan struct{}), room: make(chan struct{}, 1), typing: make(chan struct{}, 1),
		created: now, lastActive: now,
		size:    size,
		viewers: make(map[*viewer]struct{}),
	}
	s.screen = newPicture(size, max(req.Scrollback, 0), s.log)
	s.log.Info("started", "pid", tty.cmd.Process.Pid, "program", req.Argv[0])
	return s, nil
}

// abandon ends a session that nobody was attached to and that is not run.
func (s *session) abandon() {
	s.tty.cmd.Process.Kill()
	s.tty.cmd.Wait()
	s.tty.master.Close()
}

// run carries the session from its start to the end of its program.
func (s *session) run() {
	var wg sync.WaitGroup
	status := make(chan ExitStatus, 1)
	wg.Go(func() { status <- s.wait() })
	stopped := make(chan struct{})
	wg.Go(func() { s.write(stopped) })
	s.read()
	// The end of output is not the end of the program: it may have closed its terminal and gone on.
	exit := <-status
	close(stopped)
	s.tty.master.Close()
	wg.Wait()

	s.mu.Lock()
	exit.Reason = s.reason
	s.exit = &exit
	s.endsAt = time.Time{}
	for _, timer := range []*time.Timer{s.idle, s.kill, s.refit} {
		if timer != nil {
			timer.Stop()
		}
	}
	for v := range s.viewers {
		v.wake()
	}
	s.mu.Unlock()
	s.log.Info("ended", "code", exit.Code, "signal", exit.Signal, "reason", exit.Reason)
	close(s.done)
}

// wait reaps the program and then lets reading end even if something else keeps the terminal open.
func (s *session) wait() ExitStatus {
	err := s.tty.cmd.Wait()
	s.mu.Lock()
	s.reaped = true
	s.mu.Unlock()
	s.tty.master.SetReadDeadline(time.Now().Add(exitGrace))
	var failed interface{ ExitCode() int }
	if err != nil && !errors.As(err, &failed) {
		s.log.Warn("cannot learn how the program ended", "error", err)
		return ExitStatus{Code: 255}
	}
	ws := s.tty.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ws.Signaled() {
		return ExitStatus{Code: 128 + int(ws.Signal()), Signal: strings.TrimPrefix(unix.SignalName(ws.Signal()), "SIG")}
	}
	return ExitStatus{Code: ws.ExitStatus()}
}

// read takes in output until the last process let go of the terminal (EIO), or until shortly after the program's end. It shows each piece before
// it reads the next: meanwhile the kernel takes in 64 KiB from the program, and a handover to another thread would cost more than it gives.
func (s *session) read() {
	buf := make([]byte, readSize)
	left := exitBytes
	atOnce := 0 // pieces read since there was nothing to read
	wait := func() {
		atOnce = 0
		s.flush()
	}
	for {
		n, err := s.tty.read(buf, wait)
		s.output(buf[:n])
		if atOnce++; atOnce == floodPieces {
			runtime.Gosched()
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			if err != nil {
				return
			}
			continue
		}
		// The program is gone. What it wrote before is still to be read, but there may be someone else who writes for ever.
		for left > 0 && s.tty.readable() {
			s.tty.master.SetReadDeadline(time.Time{})
			n, err := s.tty.read(buf, s.flush)
			s.output(buf[:n])
			left -= n
			if err != nil {
				return
			}
		}
		return
	}
}

// output shows p to the screen and to every viewer, and then waits for raw viewers that are full. Viewers are sent what is shown once there is
// much of it, or nothing more to read: see flush.
func (s *session) output(p []byte) {
	if len(p) == 0 {
		return
	}
	s.mu.Lock()
	lines := s.screen.lines()
	s.screen.write(p)
	now := time.Now()
	s.lastActive, s.shown = now, now
	var slow []*viewer
	for v := range s.viewers {
		v.offer(p, lines, now)
		if v.full() {
			slow = append(slow, v)
		}
	}
	s.mu.Unlock()
	if len(slow) > 0 {
		s.flush() // the others need not wait
	}
	for _, v := range slow {
		s.await(v)
	}
}

// flush lets viewers be sent what was shown. It is called when no more output waits to be read: waking a viewer for each piece of a flood would
// cost more than showing it.
func (s *session) flush() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for v := range s.viewers {
		if len(v.out) > 0 {
			v.wake()
		}
	}
}

// await returns when v takes output again or has left.
func (s *session) await(v *viewer) {
	for {
		s.mu.Lock()
		full := v.full()
		s.mu.Unlock()
		if !full {
			return
		}
		select {
		case <-s.room:
		case <-v.gone:
			return
		}
	}
}

func (s *session) makeRoom() {
	select {
	case s.room <- struct{}{}:
	default:
	}
}

// write passes input on to the program, at the pace at which it reads.
func (s *session) write(stopped <-chan struct{}) {
	for {
		select {
		case <-s.typing:
		case <-stopped:
			return
		}
		for {
			s.mu.Lock()
			if len(s.inputs) == 0 {
				s.mu.Unlock()
				break
			}
			in := s.inputs[0]
			s.inputs = s.inputs[1:]
			s.mu.Unlock()
			if _, err := s.tty.master.Write(in.data); err != nil {
				return
			}
			s.mu.Lock()
			in.from.queued -= len(in.data)
			in.from.acks += len(in.data)
			in.from.wake()
			s.mu.Unlock()
		}
	}
}

// attach adds a viewer. What it sees begins with a snapshot taken under the same lock under which all later output reaches it.
func (s *session) attach(conn net.Conn, req AttachRequest) (*viewer, error) {
	v := &viewer{
		session: s, conn: conn, name: req.View[:min(len(req.View), maxView)], raw: req.Raw, readOnly: req.ReadOnly, size: req.Size.clamped(),
		ready: make(chan struct{}, 1), gone: make(chan struct{}),
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.viewers) >= maxViewers && req.After == "" { // one that is continued is about to leave
		return nil, fmt.Errorf("%d viewers are attached to this terminal, the most there may be; close one", maxViewers)
	}
	if s.idle != nil {
		s.idle.Stop()
		s.idle, s.endsAt = nil, time.Time{}
	}
	missed := s.continues(v, req)
	s.viewers[v] = struct{}{}
	s.leftAt = time.Time{}
	if s.active == nil && !v.readOnly {
		s.activate(v)
	}
	v.cut = v.size != s.size
	if snapshot := s.screen.snapshot(v.view(missed)); len(snapshot) > 0 {
		v.put(snapshot)
	}
	v.wake()
	return v, nil
}

// confirm notes that a viewer knows it is attached.
func (s *session) confirm() {
	s.mu.Lock()
	s.attached = true
	s.mu.Unlock()
}

// detach removes a viewer. told says whether the status it was being told arrived.
func (s *session) detach(v *viewer, told bool) {
	s.mu.Lock()
	delete(s.viewers, v)
	s.remember(v)
	if v.telling && !told {
		s.told--
	}
	if s.active == v {
		s.active = nil
		for other := range s.viewers {
			if !other.readOnly && (s.active == nil || other.typed > s.active.typed) {
				s.active = other
			}
		}
		if s.active != nil {
			s.activate(s.active)
		}
	}
	last := len(s.viewers) == 0
	if last {
		s.leftAt = time.Now()
	}
	if last && s.exit == nil {
		s.startIdle()
	}
	s.mu.Unlock()
	if last && s.req.KillOnDetach {
		s.end("its connection was closed")
	}
}

// drain waits until the session has ended and its viewers were told.
func (s *session) drain(ctx context.Context) error {
	select {
	case <-s.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	s.mu.Lock()
	viewers := slices.Collect(maps.Keys(s.viewers))
	s.mu.Unlock()
	for _, v := range viewers {
		select {
		case <-v.gone:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// over reports whether nobody can come back to the session: it ended and someone was told how. Viewers may still be reading its last output.
func (s *session) over() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.told > 0
}

// startIdle arms the timer that ends a session nobody comes back to. The session's lock is held.
func (s *session) startIdle() {
	d := s.req.IdleTimeout
	if d <= 0 {
		return
	}
	if !s.attached {
		d = min(d, neverAttached)
	}
	var timer *time.Timer
	timer = time.AfterFunc(d, func() {
		s.mu.Lock()
		due := s.idle == timer && len(s.viewers) == 0 && s.exit == nil
		s.mu.Unlock()
		if due {
			s.end(fmt.Sprintf("nobody was attached for %v", d))
		}
	})
	s.idle, s.endsAt = timer, time.Now().Add(d)
}

// activate makes v the viewer whose size the terminal has. The session's lock is held.
func (s *session) activate(v *viewer) {
	s.active = v
	s.fit()
}

// fit gives the terminal the active viewer's size, now or when the pause since the last resize is over. The session's lock is held, so no output
// comes between the screen's change and the program's.
func (s *session) fit() {
	if s.active == nil || s.active.size == s.size || s.exit != nil || s.refit != nil {
		return
	}
	start := time.Now()
	if wait := s.resizable.Sub(start); wait > 0 {
		s.refit = time.AfterFunc(wait, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.refit = nil
			s.fit()
		})
		return
	}
	s.size = s.active.size
	s.screen.resize(s.size)
	if err := s.tty.resize(s.size); err != nil && !errors.Is(err, os.ErrClosed) {
		s.log.Warn("cannot resize the terminal", "size", s.size.String(), "error", err)
	}
	end := time.Now()
	s.resizable = end.Add(max(resizePause, resizeShare*end.Sub(start)))
	for other := range s.viewers {
		other.redraw()
	}
}

// resize notes a viewer's new size, which the terminal takes if the viewer is the one who typed last.
func (s *session) resize(v *viewer, size Size) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v.size = size
	if s.active == v {
		s.activate(v)
		return
	}
	v.redraw()
}

// typed queues what a viewer typed. It fails if the viewer sends more than it was given room for.
func (s *session) typed(v *viewer, p []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v.queued+len(p) > inputWindow {
		return fmt.Errorf("%w: input beyond the window of %d bytes", errFrame, inputWindow)
	}
	if v.readOnly || s.exit != nil {
		v.acks += len(p)
		v.wake()
		return nil
	}
	v.queued += len(p)
	s.events++
	v.typed = s.events
	s.lastActive = time.Now()
	if s.active != v {
		s.activate(v)
	}
	s.inputs = append(s.inputs, input{v, append([]byte(nil), p...)})
	select {
	case s.typing <- struct{}{}:
	default:
	}
	return nil
}

// signal signals the session's foreground process group, or the program if there is none.
func (s *session) signal(name string) error {
	sig := unix.SignalNum("SIG" + strings.TrimPrefix(strings.ToUpper(name), "SIG"))
	if sig == 0 {
		sig = syscall.SIGKILL // what the protocol says of unknown names
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reaped {
		return nil
	}
	pgrp := s.tty.foreground()
	if pgrp == 0 {
		pgrp = s.tty.cmd.Process.Pid
	}
	if err := syscall.Kill(-pgrp, sig); err != nil {
		return fmt.Errorf("cannot signal session %s: %w", s.id, err)
	}
	return nil
}

// hangup signals the program's own process group and the one in the foreground, as far as they are there.
func (s *session) hangup(signals ...syscall.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reaped {
		return
	}
	pid, pgrp := s.tty.cmd.Process.Pid, s.tty.foreground()
	for _, sig := range signals {
		syscall.Kill(-pid, sig)
		if pgrp != 0 && pgrp != pid {
			syscall.Kill(-pgrp, sig)
		}
	}
}

// end hangs the session up, and kills it if it does not go. It does not wait; done tells.
func (s *session) end(reason string) {
	s.mu.Lock()
	first := s.reason == "" && s.exit == nil
	if first {
		s.reason = reason
		s.kill = time.AfterFunc(hangupGrace, func() { s.hangup(syscall.SIGKILL) })
	}
	s.mu.Unlock()
	if first {
		s.hangup(syscall.SIGHUP, syscall.SIGCONT) // a stopped program must run to die
	}
}

func (s *session) name() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.req.Name
}

// rename changes the name, and how long the session waits for a viewer from now on.
func (s *session) rename(name string, idleTimeout time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.req.Name, s.req.IdleTimeout = name, idleTimeout
	if s.idle != nil {
		s.idle.Stop()
		s.idle, s.endsAt = nil, time.Time{}
	}
	if len(s.viewers) == 0 && s.exit == nil {
		s.startIdle()
	}
}

// describe is info with what has to be asked of the system.
func (s *session) describe() SessionInfo {
	info := s.info()
	if info.Exited != nil {
		return info
	}
	pgrp := s.tty.foreground()
	info.Running = shown(commandLine(pgrp))
	if info.Directory == "" {
		info.Directory = shown(workingDirectory(pgrp))
	}
	return info
}

func (s *session) info() SessionInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	return SessionInfo{
		ID: s.id, Name: s.req.Name, Title: shown(s.screen.title()), Command: shown(strings.Join(s.req.Argv, " ")), Container: s.req.Container, Kind: s.req.Kind, PID: s.tty.cmd.Process.Pid,
		Directory: shown(localDirectory(s.screen.directory())), Created: s.created, LastActive: s.lastActive, LeftAt: s.leftAt, EndsAt: s.endsAt,
		Viewers: len(s.viewers), Bound: s.req.KillOnDetach, Size: s.size, Exited: s.exit,
	}
}
