package sshd

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"
)

// sftpGrace is how long files that are in use are waited for when the client has left.
const sftpGrace = time.Second

// sftp serves SFTP in this process, starting where a shell would start.
func (s *session) sftp() (int, error) {
	if s.conn.srv.cfg.Block.FileTransfer {
		return exitBlocked, nil
	}
	if in := s.env.container; in.Name != "" {
		return 1, fmt.Errorf("cannot serve SFTP in container %q: copy its files by a command there, such as tar", in.Name)
	}
	spec, err := s.spec("")
	if err != nil {
		return exitInternal, err
	}
	stream := &sftpStream{Channel: s.ch}
	server, err := sftp.NewServer(stream, sftp.WithServerWorkingDirectory(spec.Dir), sftp.WithAllocator())
	if err != nil {
		return exitInternal, fmt.Errorf("cannot start SFTP: %w", err)
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
