package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/berthd/berth/shell"
	"github.com/berthd/berth/sshd"
	"github.com/berthd/berth/wire"
)

// containerShells starts commands in containers: by berthd's own verb, which is a program of this machine like any other.
type containerShells struct {
	refusal string // why none is entered; "" enters all
	program string // berthd
	find    func(ctx context.Context, name string) (c wire.Container, host string, err error)
	command func(line string, clientEnv []string) (shell.Spec, error)
}

// Of the workspace's own environment a container gets what says where one is, and no more: it has a PATH and a HOME of its own, and whoever made
// it need not know the agent's token.
var containerVariables = []string{
	"TERM", "COLORTERM", "LC_CTYPE",
	"CODER", "CODER_WORKSPACE_NAME", "CODER_WORKSPACE_AGENT_NAME", "CODER_WORKSPACE_OWNER_NAME", "CODER_WORKSPACE_ID",
	"BERTH", "BERTH_WORKSPACE_NAME", "BERTH_WORKSPACE_AGENT_NAME", "BERTH_WORKSPACE_OWNER_NAME", "BERTH_WORKSPACE_ID",
}

// machineVariables are about this machine, whoever sets them.
var machineVariables = []string{"PATH", "HOME", "USER", "LOGNAME", "SHELL", "PWD", "SSH_AUTH_SOCK", "TMPDIR"}

// spec says how to run line in a container, as its user's login shell or by it.
func (s *containerShells) spec(ctx context.Context, in sshd.Container, line string, clientEnv []string) (shell.Spec, error) {
	switch {
	case s.refusal != "":
		return shell.Spec{}, fmt.Errorf("cannot run in container %q: containers are switched off here (--devcontainers=false)", in.Name)
	case s.program == "":
		return shell.Spec{}, errors.New("cannot run in a container: berthd does not know its own program")
	}
	spec, err := s.command("", clientEnv)
	if err != nil {
		return shell.Spec{}, err
	}
	c, host, err := s.find(ctx, in.Name)
	if err != nil {
		return shell.Spec{}, err
	}
	if !c.Running {
		return shell.Spec{}, fmt.Errorf("cannot run in container %q: it does not run, its state is %q", c.Engine+"/"+c.Name, c.Status)
	}
	spec.Argv = []string{s.program, "container-exec", "--engine", host, "--container", c.ID}
	if in.User != "" {
		spec.Argv = append(spec.Argv, "--user", in.User)
	}
	spec.Argv = append(spec.Argv, "--env", strings.Join(passedOn(spec.Env, clientEnv), ","))
	if line != "" {
		spec.Argv = append(spec.Argv, "--", line)
	}
	return spec, nil
}

// passedOn names the variables of env that a container gets: those of its own, and what the client has set and may.
func passedOn(env, clientEnv []string) []string {
	names := slices.Clone(containerVariables)
	for _, pair := range clientEnv {
		name, _, _ := strings.Cut(pair, "=")
		// A client that names the agent's token is not to learn its value: what counts is what the client itself said.
		if slices.Contains(env, pair) && !strings.Contains(name, ",") && !slices.Contains(machineVariables, name) && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}
