package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"
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
