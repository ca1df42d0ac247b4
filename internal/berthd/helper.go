package berthd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"time"

	"github.com/berthd/berth/account"
	"github.com/berthd/berth/agent"
	"github.com/berthd/berth/client"
	"github.com/berthd/berth/wire"
)

// askTimeout bounds one question to the control server: whoever waits for git is not to wait longer
// for a server that is away.
const askTimeout = 20 * time.Second

// agentVariables are what sessions have of the agent's, and which setting each stands for. They win
// over that setting's own variables: with those a person may talk to another server, by berth.
var agentVariables = map[string][2]string{
	"BERTH_URL": {"BERTH_AGENT_URL", "CODER_AGENT_URL"},
	envToken:    {"BERTH_AGENT_TOKEN", envTokenFallback},
}

// agentSettings returns how to reach the workspace's control server: as sessions are told of it, else
// by the settings that run has too.
func (p process) agentSettings() (*settings, error) {
	env := maps.Clone(p.env)
	for ours, theirs := range agentVariables {
		if _, value := env.first(theirs[0], theirs[1]); value != "" {
			env[ours] = value
		}
	}
	return parseServer(env)
}

// server returns a client of the workspace's control server that acts as the agent.
func (p process) server(ctx context.Context) (*client.Client, error) {
	s, err := p.agentSettings()
	if err != nil {
		return nil, err
	}
	server, err := s.reach(ctx)
	if err != nil {
		return nil, err
	}
	exchange := exchanger(server)
	if s.identity.token != "" {
		s.identity.auth = "token" // however the agent came by it
		// A session that has lived for long may have one that is over.
		if now, err := agent.SessionToken(ctx, p.env[agent.EnvSocket], s.server.url); err == nil {
			s.identity.token = now
		}
	} else if dir, err := stateDir(p.env); err == nil {
		exchange.ProofKey = filepath.Join(dir, proofKeyFile)
	}
	source, err := s.identity.source(exchange, slog.New(slog.DiscardHandler), func(agent.Event) {})
	if err != nil {
		return nil, err
	}
	token, err := source.Token(ctx)
	if err != nil {
		return nil, client.Explain(err)
	}
	return client.New(client.Config{URL: server.URL, HTTP: server.HTTP, Header: server.Header, Token: func() wire.Secret { return token }})
}

// hide has berthd hide a login before it is shown to whoever asked: what programs make of it may come into a log. Where no berthd listens, nobody
// ships one.
func (p process) hide(ctx context.Context, values ...string) {
	secrets := make([]wire.Secret, len(values))
	for i, value := range values {
		secrets[i] = wire.Secret(value)
	}
	_ = agent.Hide(ctx, p.env[agent.EnvSocket], secrets...)
}

// helpers makes the commands that sessions get, in the state directory: a path that stays the same
// over upgrades, and that holds nothing else. berthd is called coder there only where that is asked
// for, or where it was started by that name, as the start scripts of stock deployments do.
func (s *settings) helpers(state *agent.State, user *account.User) (agent.Helpers, error) {
	self, err := os.Executable()
	if err != nil {
		return agent.Helpers{}, fmt.Errorf("cannot find berthd's own program: %w", err)
	}
	dir := state.OwnPath("bin")
	program := filepath.Join(dir, "berthd")
	err = user.Do(func() error { return s.linkHelpers(self, dir, program) })
	if err != nil {
		return agent.Helpers{}, err
	}
	h := agent.Helpers{Program: program, Dir: dir}
	h.Env = s.server.variables()
	return h, nil
}

// variables is how the server is reached, for another berthd.
func (s *serverSettings) variables() (env []string) {
	for name, value := range map[string]string{
		"BERTH_CA_FILE":        s.reach.CAFile,
		"BERTH_CLIENT_CERT":    s.reach.CertFile,
		"BERTH_CLIENT_KEY":     s.reach.KeyFile,
		"BERTH_HEADER":         s.header.pairs(),
		"BERTH_HEADER_COMMAND": s.headerCommand,
	} {
		if value != "" {
			env = append(env, name+"="+value)
		}
	}
	return env
}

func (s *settings) linkHelpers(self, dir, program string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("cannot make a directory for commands: %w", err)
	}
	if err := link(self, program); err != nil {
		return err
	}
	coder := filepath.Join(dir, "coder")
	if s.services.coderCommand || filepath.Base(self) == "coder" {
		return link(self, coder)
	}
	return unlink(coder)
}

// link makes path a symbolic link to target, in one step.
func link(target, path string) error {
	if now, err := os.Readlink(path); err == nil && now == target {
		return nil
	}
	next := path + ".new"
	if err := unlink(next); err != nil {
		return err
	}
	if err := os.Symlink(target, next); err != nil {
		return fmt.Errorf("cannot make a command: %w", err)
	}
	if err := os.Rename(next, path); err != nil {
		return fmt.Errorf("cannot make a command: %w", err)
	}
	return nil
}

func unlink(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot take away a command: %w", err)
	}
	return nil
}
