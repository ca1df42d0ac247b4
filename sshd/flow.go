package sshd

import (
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// flowSize is how much is taken up at a time: what a pipe of Linux holds, and two SSH packets.
const flowSize = 64 << 10

var flowBuffers = sync.Pool{New: func() any { return new([flowSize]byte) }}

// A source is a pipe or a socket.
type source interface {
	syscall.Conn
	SetReadDeadline(time.Time) error
}

// send copies src to dst until src ends, which is not an error, or one of them fails; after that nothing is read from src any more. While dst
// takes what there was, src is read on: so programs that write little at a time fill packets nevertheless once they write much. Unlike [io.Copy]
// it holds memory only while there is something to send.
func send(dst io.Writer, src source) error {
	raw, err := src.SyscallConn()
	if err != nil {
		return err
	}
	f := newFlow()
	var filling sync.WaitGroup
	filling.Go(func() { f.fill(raw) })
	defer filling.Wait()
	for {
		b, n, err := f.take()
		if err == nil {
			_, err = dst.Write(b[:n])
			flowBuffers.Put(b)
		}
		if err != nil {
			f.end(err)
			src.SetReadDeadline(time.Unix(1, 0))
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}

// flow is what was read and has not been written.
type flow struct {
	mu      sync.Mutex
	changed sync.Cond
	buffer  *[flowSize]byte // nil while there is nothing
	n       int
	err     error // why no more comes
}

func newFlow() *flow {
	f := new(flow)
	f.changed.L = &f.mu
	return f
}

// fill reads until the flow has ended.
func (f *flow) fill(src syscall.RawConn) {
	for f.room() {
		if err := src.Read(f.read); err != nil {
			f.end(err)
		}
	}
}

// room waits until something can be read into the flow, and reports whether it goes on.
func (f *flow) room() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.n == flowSize && f.err == nil {
		f.changed.Wait()
	}
	return f.err == nil
}

// read reads what there is, and reports false if that was nothing. The source does not block.
func (f *flow) read(fd uintptr) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.buffer == nil {
		f.buffer = flowBuffers.Get().(*[flowSize]byte)
	}
	n, err := unix.Read(int(fd), f.buffer[f.n:])
	for errors.Is(err, unix.EINTR) {
		n, err = unix.Read(int(fd), f.buffer[f.n:])
	}
	f.n += max(n, 0)
	switch {
	case err == nil && n == 0:
		f.err = io.EOF
	case errors.Is(err, unix.EAGAIN):
	case err != nil && f.err == nil:
		f.err = os.NewSyscallError("read", err)
	}
	if f.n == 0 {
		flowBuffers.Put(f.buffer)
		f.buffer = nil
	}
	f.changed.Broadcast()
	return !errors.Is(err, unix.EAGAIN)
}

// take waits for something to write, or for the end.
func (f *flow) take() (b *[flowSize]byte, n int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.n == 0 && f.err == nil {
		f.changed.Wait()
	}
	if f.n == 0 {
		return nil, 0, f.err
	}
	b, n = f.buffer, f.n
	f.buffer, f.n = nil, 0
	f.changed.Broadcast()
	return b, n, nil
}

// end has no more taken up. Only the first reason counts.
func (f *flow) end(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.err = err
	}
	f.changed.Broadcast()
}

// receive copies an SSH channel to dst until the channel ends or dst fails. It holds much memory only while much comes.
func receive(dst io.Writer, ch io.Reader) error {
	var small [512]byte // enough for what a person types
	for {
		n, err := copyOnce(dst, ch, small[:])
		if n == len(small) && err == nil { // more waits, or will come soon
			big := flowBuffers.Get().(*[flowSize]byte)
			for n >= len(small) && err == nil {
				n, err = copyOnce(dst, ch, big[:])
			}
			flowBuffers.Put(big)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// copyOnce reads once and writes what came.
func copyOnce(dst io.Writer, src io.Reader, buf []byte) (int, error) {
	n, err := src.Read(buf)
	if n == 0 {
		return n, err
	}
	if _, failed := dst.Write(buf[:n]); failed != nil {
		return n, failed
	}
	return n, err
}
