package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/berthd/berth/wire"
)

// inContainer says in which container a session is to run, and as whom. Its zero value is the agent's
// own machine.
type inContainer struct{ name, user string }

// ask has a session run there, by the variables that agents take for themselves.
func (in inContainer) ask(session *ssh.Session) error {
	for _, v := range []struct{ name, value string }{{"CODER_CONTAINER", in.name}, {"CODER_CONTAINER_USER", in.user}} {
		if v.value == "" {
			continue
		}
		if err := session.Setenv(v.name, v.value); err != nil {
			return fmt.Errorf("the agent does not take %s (%w)", v.name, err)
		}
	}
	return nil
}

// lookTimeout is how long a look at the list of containers may hold up a session.
const lookTimeout = 3 * time.Second

// checkContainer returns why a container cannot be gone into, if the agent's list tells; an agent
// without a list decides by itself.
func (m *mesh) checkContainer(ctx context.Context, name string) error {
	if name == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	api := m.api()
	defer api.Close()
	found, err := api.Containers(ctx)
	var answer *wire.Error
	switch {
	case errors.As(err, &answer) && answer.StatusCode == http.StatusForbidden:
		return fmt.Errorf("cannot go into container %s: agent %s answers: %w", name, m.agent.Name, err)
	case err != nil:
		m.log.Debug("cannot list containers", "error", err)
		return nil
	}
	return findContainer(found, name, m.agent.Name)
}

// findContainer returns nil if a container that runs is meant by a name or the beginning of an id.
func findContainer(found wire.Containers, name, agent string) error {
	var there []string
	stopped := ""
	for _, c := range found.Containers {
		named := c.Name == name || strings.HasPrefix(c.ID, name)
		switch {
		case named && c.Running:
			return nil
		case named:
			stopped = c.Status
		case c.Running:
			there = append(there, c.Name)
		}
	}
	slices.Sort(there)
	const most = 10 // as many as fit on a line or two
	if len(there) > most {
		there = append(there[:most], "…")
	}
	switch {
	case stopped != "":
		return fmt.Errorf("cannot go into container %s: it does not run (%s); start it in the workspace first", name, stopped)
	case len(there) > 0:
		return fmt.Errorf("cannot find container %q beside %s; those that run are: %s", name, agent, strings.Join(there, ", "))
	case len(found.Warnings) > 0:
		return fmt.Errorf("cannot find container %q beside %s: none runs that it can see (%s)", name, agent, strings.Join(found.Warnings, "; "))
	}
	return fmt.Errorf("cannot find container %q beside %s: none runs there; \"berth containers %s\" lists them", name, agent, agent)
}

// containerNames completes the name of a container beside the agent that was named before.
func (p *program) containerNames(cmd *cobra.Command, args []string, toComplete string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
	defer cancel()
	s, agent, err := p.find(ctx, args[0])
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	found, err := s.Containers(ctx, agent.ID)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []cobra.Completion
	for _, c := range found.Containers {
		if c.Running && strings.HasPrefix(c.Name, toComplete) && plain.MatchString(c.Name) {
			names = append(names, cobra.CompletionWithDesc(c.Name, clean(c.Image)))
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
