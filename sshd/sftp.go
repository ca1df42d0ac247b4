package sshd

import (
	"errors"
	"fmt"
	"io"

	"github.com/pkg/sftp"
)

// sftp serves SFTP in this process, starting where a shell would start.
func (s *session) sftp() (int, error) {
	if s.conn.srv.cfg.Block.FileTransfer {
		return exitBlocked, nil
	}
	spec, err := s.spec("")
	if err != nil {
		return exitInternal, err
	}
	server, err := sftp.NewServer(s.ch, sftp.WithServerWorkingDirectory(spec.Dir), sftp.WithAllocator())
	if err != nil {
		return exitInternal, fmt.Errorf("cannot start SFTP: %w", err)
	}
	if err := server.Serve(); err != nil && !errors.Is(err, io.EOF) && s.ctx.Err() == nil {
		s.conn.srv.cfg.Log.Debug("an SFTP session ended badly", "remote", s.conn.remote, "err", err)
		return 1, nil
	}
	return 0, nil
}
