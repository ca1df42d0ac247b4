package berthd

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os/exec"
	"time"

	"github.com/berthd/berth/agent"
	"github.com/berthd/berth/client"
)

const (
	// headerCommandTimeout bounds the command that prints headers, which may ask a metadata service.
	headerCommandTimeout = 30 * time.Second
	// maxHeaders bounds what it may print: servers refuse longer headers.
	maxHeaders = 64 << 10
)

// reach returns the control server and the way to it.
func (s *settings) reach(ctx context.Context) (agent.Server, error) {
	server, err := s.server.parse()
	if err != nil {
		return agent.Server{}, err
	}
	reach, err := client.NewHTTP(s.server.reach)
	if err != nil {
		return agent.Server{}, usageError{err}
	}
	header, err := s.server.headers(ctx, server)
	if err != nil {
		return agent.Server{}, err
	}
	to := agent.Server{URL: server, HTTP: reach, Header: header}
	// What the client trusts, the relay is held to as well.
	if t, ok := reach.Transport.(*http.Transport); ok {
		to.TLS = t.TLSClientConfig.Clone()
	}
	return to, nil
}

// headers returns those that were given and those that the command prints.
func (s *serverSettings) headers(ctx context.Context, server *url.URL) (http.Header, error) {
	if s.headerCommand == "" {
		return s.header.Header, nil
	}
	ctx, cancel := context.WithTimeout(ctx, headerCommandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", s.headerCommand)
	cmd.Env = append(cmd.Environ(), "CODER_URL="+server.String())
	cmd.WaitDelay = time.Second
	var out bounded
	cmd.Stdout = &out
	err := cmd.Run()
	if len(out) > maxHeaders {
		return nil, fmt.Errorf("cannot get headers: the command of --header-command printed more than %d KiB", maxHeaders>>10)
	}
	if err != nil {
		// What it printed may be a credential, and is not repeated.
		return nil, fmt.Errorf("cannot get headers: the command of --header-command failed: %w", err)
	}
	all := headerList{Header: s.header.Header.Clone()}
	for line := range bytes.Lines(out) {
		if line = bytes.TrimSpace(line); len(line) > 0 {
			all.add(string(line))
		}
	}
	if all.bad != nil {
		return nil, usagef("cannot use what the command of --header-command printed: %w", all.bad)
	}
	return all.Header, nil
}

// bounded keeps what a command prints, and cuts it off when that is more than maxHeaders.
type bounded []byte

// Write implements io.Writer.
func (b *bounded) Write(p []byte) (int, error) {
	*b = append(*b, p[:min(len(p), maxHeaders+1-len(*b))]...)
	if len(*b) > maxHeaders {
		return 0, io.ErrShortWrite
	}
	return len(p), nil
}
