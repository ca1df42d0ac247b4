package sshd

import (
	"context"
	"fmt"
	"path"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/berthd/berth/ptyhost"
	"github.com/berthd/berth/shell"
)

// Exit statuses that are this server's and not a command's.
const (
	exitSignal   = 255 // a signal ended the command, or nobody waited for its end
	exitInternal = 229 // the command could not be started, or not be followed
	exitBlocked  = 65  // a blocked file transfer
)

// session is one session channel. Its request loop is handle; what it was asked to run runs on a goroutine of its own.
type session struct {
	conn *connection
	ssh  *ssh.ServerConn
	ch   ssh.Channel
	ctx  context.Context // done when the channel or the connection is

	env       clientEnv
	terminal  *ptyRequest // nil without
	agentSock string
	display   *display // nil without
	noX11     error    // why there is none, if the client asked for one
	started   bool
	job       *job // what exec started

	sizes   chan ptyhost.Size // the latest size that was not applied yet
	signals chan string
}

// session serves a session channel until the client closes it.
func (c *connection) session(conn *ssh.ServerConn, nc ssh.NewChannel) {
	ch, reqs, err := nc.Accept()
	if err != nil {
		return
	}
	ctx, cancel := context.WithCancel(c.ctx)
	s := &session{
		conn: c, ssh: conn, ch: ch, ctx: ctx,
		env:   clientEnv{kind: SessionSSH},
		sizes: make(chan ptyhost.Size, 1),
		// A client that sends more signals than a command takes in is not owed each of them.
		signals: make(chan string, 16),
	}
	defer s.endX11()
	defer cancel()
	for req := range reqs {
		start, ok := s.handle(req)
		// The answer goes first, so that no output overtakes it.
		if req.WantReply {
			req.Reply(ok, nil)
		}
		if start != nil && !c.run("session", func() { s.run(start) }) {
			ch.Close()
		}
	}
}

// handle answers one request of the channel. start, if not nil, is what the session is to run.
func (s *session) handle(req *ssh.Request) (start func() (int, error), ok bool) {
	switch req.Type {
	case "pty-req":
		p, err := parsePTY(req.Payload)
		if err != nil || s.started || s.terminal != nil {
			return nil, false
		}
		s.terminal = p
	case "env":
		var p struct{ Name, Value string }
		if ssh.Unmarshal(req.Payload, &p) != nil || s.started {
			return nil, false
		}
		return nil, s.env.set(p.Name, p.Value)
	case "x11-req":
		if s.started || s.display != nil {
			return nil, false
		}
		if s.noX11 = s.forwardX11(req.Payload); s.noX11 != nil {
			s.conn.srv.cfg.Log.Info("an SSH client gets no X11", "remote", s.conn.remote, "err", s.noX11)
			return nil, false
		}
	case "auth-agent-req@openssh.com":
		if s.started { // its environment is made already
			return nil, true
		}
		sock, err := s.conn.agent.open(s.conn, s.ssh)
		if err != nil {
			s.conn.srv.cfg.Log.Warn("cannot forward an SSH agent", "remote", s.conn.remote, "err", err)
			return nil, false
		}
		s.agentSock = sock
	case "shell":
		return s.start(func() (int, error) { return s.command("") })
	case "exec":
		var p struct{ Line string }
		if ssh.Unmarshal(req.Payload, &p) != nil || strings.ContainsRune(p.Line, 0) {
			return nil, false
		}
		return s.start(func() (int, error) { return s.command(p.Line) })
	case "subsystem":
		var p struct{ Name string }
		if ssh.Unmarshal(req.Payload, &p) != nil || p.Name != "sftp" {
			return nil, false
		}
		return s.start(s.sftp)
	case "window-change":
		size, err := parseWindowChange(req.Payload)
		if err != nil || s.terminal == nil {
			return nil, false
		}
		s.resize(size)
	case "signal":
		var p struct{ Name string }
		if ssh.Unmarshal(req.Payload, &p) != nil {
			return nil, false
		}
		select {
		case s.signals <- p.Name:
		default:
			return nil, false
		}
	case "keepalive@openssh.com":
	default: // break among them
		return nil, false
	}
	return nil, true
}

func (s *session) start(f func() (int, error)) (func() (int, error), bool) {
	if s.started {
		return nil, false
	}
	s.started = true
	return f, true
}

// resize leaves size for the terminal to take, in place of one it did not take yet.
func (s *session) resize(size ptyhost.Size) {
	select {
	case <-s.sizes:
	default:
	}
	s.sizes <- size // handle is the only sender
}

// run runs what the session was asked to, and ends the channel: exit status, EOF, close.
func (s *session) run(f func() (int, error)) {
	code, reason := exitInternal, "internal error"
	done := func(int, string) {}
	// An editor's many sessions are not what people mean by a JetBrains connection; its forwarded ports are.
	if s.env.kind != SessionJetBrains {
		done = s.conn.srv.begin(Connection{Type: s.env.kind, Remote: s.conn.remote, Terminal: s.terminal != nil})
	}
	defer func() {
		s.ch.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{uint32(code)}))
		s.ch.CloseWrite()
		s.ch.Close()
		if s.job != nil {
			close(s.job.finished)
		}
		done(code, reason)
	}()
	var err error
	code, err = f()
	switch {
	case err != nil:
		reason = err.Error()
		s.conn.srv.cfg.Log.Warn("an SSH session failed", "remote", s.conn.remote, "err", err)
		s.complain(err)
	case s.ctx.Err() != nil:
		reason = "the client closed the session"
	case code != 0:
		reason = fmt.Sprintf("process exited with error status: %d", code)
	default:
		reason = "graceful"
	}
}

// complain tells the user why the session could not do what it was asked to.
func (s *session) complain(err error) {
	end := "\n"
	if s.terminal != nil { // the client's terminal is in raw mode
		end = "\r\n"
	}
	fmt.Fprintf(s.ch.Stderr(), "berth: %v%s", err, end)
}

// command runs a command line, or a login shell if it is empty, with or without a terminal. The error is why it could not.
func (s *session) command(line string) (int, error) {
	if s.conn.srv.cfg.Block.FileTransfer && transfersFiles(line) {
		// The 2 is scp's mark of a fatal error, so that scp shows the words.
		s.ch.Write([]byte("\x02File transfer has been disabled.\n"))
		return exitBlocked, nil
	}
	spec, err := s.spec(line)
	if err != nil {
		return exitInternal, err
	}
	if s.display != nil && s.env.container.Name == "" { // a container has a loopback of its own
		value, err := s.grant()
		if err == nil {
			spec.Env = setVar(spec.Env, "DISPLAY", value)
		} else {
			s.conn.srv.cfg.Log.Warn("an SSH client gets no X11", "remote", s.conn.remote, "err", err)
			s.noX11 = err
		}
	}
	if s.terminal != nil {
		if s.noX11 != nil && line == "" { // somebody reads it; the client's own words give no reason
			s.complain(s.noX11)
		}
		return s.attach(spec, line == "")
	}
	return s.exec(spec)
}

// spec is how line is started, in this session's environment.
func (s *session) spec(line string) (shell.Spec, error) {
	command := s.conn.srv.cfg.Command
	if in := s.env.container; in.Name != "" {
		if s.conn.srv.cfg.ContainerCommand == nil {
			return shell.Spec{}, fmt.Errorf("cannot run in container %q: this agent runs commands on its own machine only", in.Name)
		}
		command = func(line string, clientEnv []string) (shell.Spec, error) {
			return s.conn.srv.cfg.ContainerCommand(s.ctx, in, line, clientEnv)
		}
	}
	spec, err := command(line, s.env.vars)
	if err != nil {
		return shell.Spec{}, err
	}
	if s.agentSock != "" {
		spec.Env = setVar(spec.Env, "SSH_AUTH_SOCK", s.agentSock)
	}
	if s.terminal != nil {
		spec.Env = setVar(spec.Env, "TERM", s.terminal.term)
	}
	return spec, nil
}

// transfersFiles reports whether line starts one of the programs that move files over SSH.
func transfersFiles(line string) bool {
	words := strings.Fields(line)
	if len(words) == 0 {
		return false
	}
	switch path.Base(words[0]) {
	case "nc", "rsync", "scp", "sftp":
		return true
	}
	return false
}
