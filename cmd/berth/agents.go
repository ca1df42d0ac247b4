package main

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/berthd/berth/wire"
)

func (p *program) agentCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "agent",
		Short:   "Make and list agents, and their tokens",
		Example: "  berth agent create build-1\n  berth agent list\n  berth agent revoke build-1",
		Args:    knownVerb,
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(p.agentCreateCommand(), p.agentListCommand(), p.agentTokenCommand(), p.agentRevokeCommand(), p.agentForgetCommand())
	return cmd
}

func (p *program) agentCreateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Make an agent and print its token, this once",
		Long: `Make an agent and print its token. The server keeps only a hash of it, so it cannot be
shown again. Put it into a file on the machine that berthd runs on, readable by berthd alone.`,
		Example: `  berth agent create build-1 > build-1.token
  berthd run --url https://berth.example.com --token-file build-1.token`,
		Args:              wantArgs(1, 1),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		s, err := p.server()
		if err != nil {
			return err
		}
		created, err := s.CreateAgent(cmd.Context(), args[0])
		var answer *wire.Error
		if errors.As(err, &answer) && answer.StatusCode == http.StatusConflict {
			return fmt.Errorf("cannot create agent %s: there is one of that name; for a new token run: berth agent token %s", args[0], args[0])
		}
		if err != nil {
			return s.problem("create agent "+args[0], err)
		}
		return p.printToken(s, created, *output)
	}
	return cmd
}

// printToken shows a token the one time it can be: the token alone on stdout, what to do with it beside.
func (p *program) printToken(s *server, created wire.CreatedAgent, output format) error {
	if output == formatJSON {
		return printJSON(p.out, created)
	}
	fmt.Fprintf(p.errOut, "the token of agent %s, shown this once:\n", clean(created.Name))
	if _, err := fmt.Fprintln(p.out, clean(created.Token)); err != nil {
		return err
	}
	fmt.Fprintf(p.errOut, "on its machine, put the token into a file and run:\n  berthd run --url %s --token-file FILE\n", s.access.url)
	return nil
}

func (p *program) agentTokenCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "token NAME",
		Short: "Print a new token of an agent, this once",
		Long: `Print a new token of an agent that there is, such as one that the server's configuration
declares. Its other tokens stay good; "berth agent revoke" ends them.`,
		Example:           "  berth agent token build-1 > build-1.token",
		Args:              wantArgs(1, 1),
		ValidArgsFunction: p.agentNames,
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		s, agent, err := p.find(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		created, err := s.AgentToken(cmd.Context(), agent.ID)
		if err != nil {
			return s.problem("make a token of "+agent.Name, err)
		}
		return p.printToken(s, created, *output)
	}
	return cmd
}

func (p *program) agentRevokeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "revoke NAME",
		Short: "End every token of an agent, and its link with them",
		Long: `End every token of an agent, and its link with them. An agent that proves itself by its
machine's identity gets a new one and is back at once; any other needs "berth agent token".`,
		Example:           "  berth agent revoke build-1",
		Args:              wantArgs(1, 1),
		ValidArgsFunction: p.agentNames,
		RunE: func(cmd *cobra.Command, args []string) error {
			s, agent, err := p.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if err := s.RevokeAgent(cmd.Context(), agent.ID); err != nil {
				return s.problem("revoke the tokens of "+agent.Name, err)
			}
			fmt.Fprintf(p.errOut, "every token of agent %s has ended\n", clean(agent.Name))
			return nil
		},
	}
}

func (p *program) agentForgetCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "forget NAME",
		Short: "Let another installation on its machine become an agent",
		Long: `Let another installation on its machine become an agent. The first one that proves itself by
the machine's identity is known by its key from then on, and others are turned away (409). Forget it
when it is gone, such as with a disk that was replaced. Every token of the agent ends.`,
		Example:           "  berth agent forget build-1",
		Args:              wantArgs(1, 1),
		ValidArgsFunction: p.agentNames,
		RunE: func(cmd *cobra.Command, args []string) error {
			s, agent, err := p.find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if err := s.ForgetAgent(cmd.Context(), agent.ID); err != nil {
				return s.problem("forget the machine of "+agent.Name, err)
			}
			fmt.Fprintf(p.errOut, "the next installation that proves itself becomes agent %s\n", clean(agent.Name))
			return nil
		},
	}
}

func (p *program) agentListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "list",
		Aliases:           []string{"ls"},
		Short:             "List the agents of the server",
		Example:           "  berth agent list\n  berth agent list --output json",
		Args:              wantArgs(0, 0),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		s, err := p.server()
		if err != nil {
			return err
		}
		agents, err := s.Agents(cmd.Context())
		if err != nil {
			return s.problem("list agents", err)
		}
		slices.SortFunc(agents, func(a, b wire.AgentSummary) int { return strings.Compare(a.Name, b.Name) })
		if *output == formatJSON {
			return printJSON(p.out, append([]wire.AgentSummary{}, agents...))
		}
		t := table{head: []string{"NAME", "STATUS", "STATE", "LAST SEEN", "VERSION", "INSTANCE", "ID"}}
		for _, a := range agents {
			seen := ""
			if a.LastSeenAt != nil {
				seen = ago(time.Now(), *a.LastSeenAt)
			}
			t.add(a.Name, string(a.Status), a.LifecycleState, seen, a.Version, a.InstanceID, a.ID.String())
		}
		return p.printTable(&t, "the server has no agents; make one with: berth agent create NAME")
	}
	return cmd
}
