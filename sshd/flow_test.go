package sshd

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh"
)

// gate takes a write when it is let through, and notes how long each was.
type gate struct {
	through chan struct{}
	writes  chan int
	err     error
}

func (g *gate) Write(p []byte) (int, error) {
	g.writes <- len(p)
	<-g.through
	return len(p), g.err
}

func filePipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// TestSendGathers: what is written while the other side takes the last piece becomes one piece.
func TestSendGathers(t *testing.T) {
	r, w := filePipe(t)
	g := &gate{through: make(chan struct{}), writes: make(chan int)}
	done := make(chan error)
	go func() { done <- send(g, r) }()
	w.Write([]byte("a"))
	if n := <-g.writes; n != 1 {
		t.Fatalf("the first piece has %d bytes, want 1", n)
	}
	// As much as the pipe and the flow hold together: the last write ends once the flow is full.
	const more = 64<<10 + flowSize
	for range more / (4 << 10) {
		w.Write(make([]byte, 4<<10))
	}
	w.Close()
	g.through <- struct{}{}
	if n := <-g.writes; n != flowSize {
		t.Errorf("the second piece has %d bytes, want %d", n, flowSize)
	}
	g.through <- struct{}{}
	for rest := more - flowSize; rest > 0; g.through <- struct{}{} {
		rest -= <-g.writes
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestSendEnds: send tells a side that failed from an end, and leaves the source to its owner.
func TestSendEnds(t *testing.T) {
	broken := errors.New("broken")
	t.Run("writer", func(t *testing.T) {
		r, w := filePipe(t)
		g := &gate{through: make(chan struct{}), writes: make(chan int, 1), err: broken}
		close(g.through)
		w.Write([]byte("x"))
		if err := send(g, r); !errors.Is(err, broken) {
			t.Errorf("got %v, want that the writer is broken", err)
		}
	})
	t.Run("source", func(t *testing.T) {
		r, w := filePipe(t)
		var out strings.Builder
		done := make(chan error)
		go func() { done <- send(&out, r) }()
		w.Write([]byte("x"))
		r.Close()
		if err := <-done; err == nil {
			t.Error("a source that was closed looks like one that ended")
		}
	})
	t.Run("socket", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		want := bytes.Repeat([]byte("0123456789"), 100_000)
		go func() {
			c, err := l.Accept()
			if err == nil {
				c.Write(want)
				c.Close()
			}
		}()
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		var got bytes.Buffer
		if err := send(&got, c.(socket)); err != nil || !bytes.Equal(got.Bytes(), want) {
			t.Errorf("got %d bytes of %d, %v", got.Len(), len(want), err)
		}
	})
}

// pieces is a reader of pieces, and a writer that notes them.
type pieces [][]byte

func (p *pieces) Read(b []byte) (int, error) {
	if len(*p) == 0 {
		return 0, io.EOF
	}
	n := copy(b, (*p)[0])
	if (*p)[0] = (*p)[0][n:]; len((*p)[0]) == 0 {
		*p = (*p)[1:]
	}
	return n, nil
}

func (p *pieces) Write(b []byte) (int, error) {
	*p = append(*p, bytes.Clone(b))
	return len(b), nil
}

func (p pieces) sizes() (n []int) {
	for _, one := range p {
		n = append(n, len(one))
	}
	return n
}

func TestReceive(t *testing.T) {
	bulk := make([]byte, 100_000)
	in, out := pieces{[]byte("ls\n"), bulk, []byte("x")}, pieces{}
	if err := receive(&out, &in); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]int{3, 512, 64 << 10, 100_000 - 512 - 64<<10, 1}, out.sizes()); diff != "" {
		t.Error(diff)
	}
}

// written is a connection that notes what is written to it.
type written struct {
	net.Conn
	mu     sync.Mutex
	pieces pieces
}

func (w *written) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pieces.Write(p)
}

func (w *written) sizes() []int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pieces.sizes()
}

// TestTransportWholePackets: what the library writes piece by piece leaves in one, and nothing stays behind.
func TestTransportWholePackets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := new(written)
		tr := newTransport(conn)
		for _, size := range []int{10, 4096, 28 << 10, 4096, 4096, 4096, 70 << 10, 4096} {
			if n, err := tr.Write(make([]byte, size)); n != size || err != nil {
				t.Fatal(n, err)
			}
		}
		want := []int{10, 4096 + 28<<10, 8192, 4096, 70 << 10}
		if diff := cmp.Diff(want, conn.sizes()); diff != "" {
			t.Error(diff)
		}
		time.Sleep(heldFor)
		synctest.Wait()
		if diff := cmp.Diff(append(want, 4096), conn.sizes()); diff != "" {
			t.Errorf("after %v: %s", heldFor, diff)
		}
	})
}

func TestCiphersOffered(t *testing.T) {
	for _, aes := range []bool{true, false} {
		got := offered(aes)
		for _, name := range []string{ssh.CipherAES128GCM, ssh.CipherAES256GCM, ssh.CipherAES128CTR} {
			if !slices.Contains(got, name) {
				t.Errorf("with AES instructions %v, %s is not offered", aes, name)
			}
		}
		if got := slices.Contains(got, ssh.CipherChaCha20Poly1305); got == aes {
			t.Errorf("with AES instructions %v, ChaCha20 is offered: %v", aes, got)
		}
	}
}
