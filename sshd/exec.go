package sshd

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/oom"
	"github.com/berthd/berth/shell"
)

// job is a command without a terminal. It leads a process group, and may outlive its session.
type job struct {
	cmd      *exec.Cmd
	exited   chan struct{} // closed when the command has been waited for
	finished chan struct{} // closed when its session has nothing more to say
}

// startJob starts cmd, which shell made the leader of a session, and waits for it in the background, as long as that takes.
func (s *Server) startJob(cmd *exec.Cmd) (*job, error) {
	if err := oom.Start(cmd); err != nil {
		return nil, err
	}
	j := &job{cmd: cmd, exited: make(chan struct{}), finished: make(chan struct{})}
	s.mu.Lock()
	s.jobs[j] = struct{}{}
	s.mu.Unlock()
	go func() {
		shell.Wait(cmd) // ProcessState holds what there is to know
		s.mu.Lock()
		delete(s.jobs, j)
		s.mu.Unlock()
		close(j.exited)
	}()
	return j, nil
}

// signal signals the command's group, as sshd does: a shell's children are meant too.
func (j *job) signal(sig syscall.Signal) {
	select {
	case <-j.exited: // its process id may be somebody else's by now
	default:
		shell.Signal(j.cmd.Process, sig)
	}
}

// status is the exit status of a job that exited, as SSH says it.
func (j *job) status() int {
	if code := j.cmd.ProcessState.ExitCode(); code >= 0 {
		return code
	}
	return exitSignal
}

// hangUp sends SIGHUP to every running command, and gives those that end for it, and whose session still lives, the time to say so.
func (s *Server) hangUp() {
	s.mu.Lock()
	var jobs []*job
	for j := range s.jobs {
		jobs = append(jobs, j)
	}
	s.mu.Unlock()
	for _, j := range jobs {
		j.signal(syscall.SIGHUP)
	}
	budget := time.After(s.limits.shutdown)
	for _, j := range jobs {
		select {
		case <-j.finished:
		case <-budget:
			return
		}
	}
}

// exec runs spec on pipes. It returns when both output streams have been sent whole and the command has ended, or when the session has, which
// does not end the command.
func (s *session) exec(spec shell.Spec) (int, error) {
	cmd := spec.Cmd(context.WithoutCancel(s.ctx))
	pipes, err := connect(cmd)
	if err != nil {
		return exitInternal, err
	}
	job, err := s.conn.srv.startJob(cmd)
	pipes.closeChildEnds()
	if err != nil {
		pipes.close()
		return exitInternal, fmt.Errorf("cannot start the command: %w", err)
	}
	s.job = job
	// When the client closes the session, what it sent before still goes to the command. A command that still writes gets SIGPIPE, as it would from
	// sshd.
	stop := context.AfterFunc(s.ctx, func() {
		pipes.stdout.Close()
		pipes.stderr.Close()
	})
	defer stop()
	s.conn.run("stdin", func() {
		stop := context.AfterFunc(s.conn.ctx, func() { pipes.stdin.Close() })
		defer stop()
		receive(pipes.stdin, s.ch)
		pipes.stdin.Close()
	})
	var drain sync.WaitGroup
	drain.Go(func() {
		send(s.ch, pipes.stdout)
		pipes.stdout.Close()
	})
	drain.Go(func() {
		send(s.ch.Stderr(), pipes.stderr)
		pipes.stderr.Close()
	})
	drained := make(chan struct{})
	go func() { drain.Wait(); close(drained) }()

	exited, flushed := job.exited, drained
	for exited != nil || flushed != nil {
		select {
		case <-exited:
			exited = nil
		case <-flushed:
			flushed = nil
		case name := <-s.signals:
			job.signal(signalNamed(name))
		case <-s.ctx.Done():
			<-drained
			return exitSignal, nil
		}
	}
	pipes.stdin.Close() // a child of the command may hold the other end, and never read
	return job.status(), nil
}

// signalNamed is the signal an SSH client calls name; KILL for one that nobody knows.
func signalNamed(name string) syscall.Signal {
	if sig := unix.SignalNum("SIG" + name); sig != 0 {
		return sig
	}
	return syscall.SIGKILL
}

// pipes are this process's ends of a command's standard streams.
type pipes struct {
	stdin, stdout, stderr *os.File
	child                 []*os.File
}

// connect gives cmd a pipe for each standard stream.
func connect(cmd *exec.Cmd) (_ *pipes, err error) {
	p := new(pipes)
	defer func() {
		if err != nil {
			p.closeChildEnds()
			p.close()
		}
	}()
	pipe := func() (r, w *os.File) {
		if err != nil {
			return nil, nil
		}
		if r, w, err = os.Pipe(); err != nil {
			err = fmt.Errorf("cannot connect the command: %w", err)
		}
		return r, w
	}
	in, stdin := pipe()
	stdout, out := pipe()
	stderr, errs := pipe()
	p.stdin, p.stdout, p.stderr = stdin, stdout, stderr
	p.child = []*os.File{in, out, errs}
	if err != nil {
		return nil, err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, errs
	return p, nil
}

func (p *pipes) closeChildEnds() {
	for _, f := range p.child {
		f.Close() // a nil *os.File refuses politely
	}
}

func (p *pipes) close() {
	p.stdin.Close()
	p.stdout.Close()
	p.stderr.Close()
}
