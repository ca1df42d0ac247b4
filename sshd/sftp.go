package sshd

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"

	"github.com/berthd/berth/shell"
)

// sftpGrace is how long files that are in use are waited for when the client has left.
const sftpGrace = time.Second

// sftp serves SFTP, starting where a shell would start.
func (s *session) sftp() (int, error) {
	if s.conn.srv.cfg.Block.FileTransfer {
		return exitBlocked, nil
	}
	if in := s.env.container; in.Name != "" {
		return 1, fmt.Errorf("cannot serve SFTP in container %q: copy its files by a command there, such as tar", in.Name)
	}
	line := s.conn.srv.cfg.SFTP
	spec, err := s.spec(line)
	if err != nil {
		return exitInternal, err
	}
	if line != "" {
		return s.sftpProcess(spec)
	}
	stream := &sftpStream{Channel: s.ch}
	server, err := newSFTP(stream, spec.Dir)
	if err != nil {
		return exitInternal, err
	}
	served := make(chan error, 1)
	go func() {
		err := errors.New("it ended in a panic")
		s.conn.srv.shield("sftp", func() { err = server.Serve() })
		served <- err
	}()
	select {
	case err = <-served:
	case <-s.ctx.Done():
		// It ends with the channel, unless it is opening a FIFO: that waits for a writer, who may never come.
		select {
		case err = <-served:
		case <-time.After(sftpGrace):
			stream.leave()
			return exitSignal, nil
		}
	}
	if err != nil && !errors.Is(err, io.EOF) && s.ctx.Err() == nil {
		s.conn.srv.cfg.Log.Debug("an SFTP session ended badly", "remote", s.conn.remote, "err", err)
		return 1, nil
	}
	return 0, nil
}

// sftpProcess serves SFTP by a program. Where that still waits for a file when the client has left, it is ended.
func (s *session) sftpProcess(spec shell.Spec) (int, error) {
	code, err := s.exec(spec)
	if s.job != nil {
		time.AfterFunc(sftpGrace, func() { s.job.signal(syscall.SIGKILL) })
	}
	return code, err
}

// ServeSFTP serves SFTP on the standard streams of a process, starting in its directory, until the client leaves.
func ServeSFTP(stdin io.Reader, stdout io.WriteCloser) error {
	dir, err := os.Getwd()
	if err != nil {
		return fmt.Errorf("cannot start SFTP: %w", err)
	}
	server, err := newSFTP(struct {
		io.Reader
		io.WriteCloser
	}{stdin, stdout}, dir)
	if err != nil {
		return err
	}
	if err := server.Serve(); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("an SFTP session ended badly: %w", err)
	}
	return nil
}

// newSFTP returns a server whose relative paths start in dir.
func newSFTP(stream io.ReadWriteCloser, dir string) (*sftp.Server, error) {
	server, err := sftp.NewServer(stream, sftp.WithServerWorkingDirectory(dir), sftp.WithAllocator())
	if err != nil {
		return nil, fmt.Errorf("cannot start SFTP: %w", err)
	}
	return server, nil
}

// sftpStream is a session's channel for as long as the session lasts: whoever is still opening a file then answers into the void.
type sftpStream struct {
	ssh.Channel
	mu   sync.Mutex
	left bool
}

func (s *sftpStream) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.left {
		return 0, io.ErrClosedPipe
	}
	return s.Channel.Write(p)
}

func (s *sftpStream) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.left = true
}
