package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/wire"
)

func (p *program) portsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ports NAME",
		Short: "List the ports that programs listen on in a workspace",
		Long: `List the ports that programs listen on in a workspace: TCP and UDP, on every address, those in
containers included where they can be read. "berth forward NAME PORT" makes one reachable here.

With --watch the list is shown as it changes until Ctrl-C: in place on a terminal, else a line for each
change ("+" listens now, "~" is another, "-" is gone), as JSON with --output json.`,
		Example: `  berth ports demo
  berth ports demo --watch
  berth ports demo --udp --all
  berth ports demo --output json | jq '.[].port'`,
		Args:              wantArgs(1, 1),
		ValidArgsFunction: p.agentNames,
	}
	output := outputFlag(cmd)
	live := watchFlag(cmd)
	var shown portFilter
	cmd.Flags().BoolVar(&shown.tcp, "tcp", false, "only TCP")
	cmd.Flags().BoolVar(&shown.udp, "udp", false, "only UDP")
	cmd.Flags().BoolVarP(&shown.hidden, "all", "a", false, "also those of berthd itself and of editors' helpers")
	wait := waitFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if shown.tcp && shown.udp {
			return usageError(cmd, errors.New("cannot show only TCP and only UDP: leave both out to see all"))
		}
		if *live {
			return p.watchPorts(cmd.Context(), args[0], shown, *output, *wait)
		}
		s, agent, err := p.find(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		found, err := s.ListeningPorts(cmd.Context(), agent.ID, shown.hidden)
		if err != nil {
			return s.problem("list the ports of "+agent.Name, err)
		}
		for _, note := range portNotes(found) {
			fmt.Fprintln(p.errOut, "berth: note:", clean(note))
		}
		ports := shown.of(found.Ports)
		if *output == formatJSON {
			return printJSON(p.out, ports)
		}
		return p.printTable(portTable(ports, time.Now()), "nothing listens in "+clean(agent.Name))
	}
	return cmd
}

// watchFlag adds --watch to a command.
func watchFlag(cmd *cobra.Command) *bool {
	return cmd.Flags().BoolP("watch", "w", false, "show the list as it changes, until Ctrl-C")
}

// portFilter says which ports are shown.
type portFilter struct{ tcp, udp, hidden bool }

// of returns the ports that pass, in the order in which people look for them. It is never nil.
func (f portFilter) of(ports []wire.ListeningPort) []wire.ListeningPort {
	shown := []wire.ListeningPort{}
	for _, p := range ports {
		if f.tcp && p.Network != networkTCP || f.udp && p.Network != networkUDP {
			continue
		}
		shown = append(shown, p)
	}
	slices.SortStableFunc(shown, func(a, b wire.ListeningPort) int {
		return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Network, b.Network), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Container, b.Container))
	})
	return shown
}

// netlink is the source of ports that tells the most, as agents name it (docs/ports.md).
const netlink = "netlink"

// portNotes says where the ports are from if that is not what tells the most. Stock agents do not say.
func portNotes(found wire.ListeningPorts) []string {
	if found.Source == "" || found.Source == netlink {
		return nil
	}
	return []string{"the agent has its ports from " + found.Source}
}

// portKey tells a port from others. Those of containers may have the same number, and on another
// address it may be an editor's helper that has it.
func portKey(p wire.ListeningPort) string {
	return fmt.Sprintf("%d/%s %d %q %s", p.Port, p.Network, p.Namespace, p.Container, p.Hidden)
}

func portTable(ports []wire.ListeningPort, now time.Time) *table {
	t := &table{head: []string{"PORT", "ADDRESS", "PROCESS", "PID", "USER", "CONTAINER", "STARTED", "HIDDEN", "COMMAND"}}
	for _, p := range ports {
		pid, started := "", ""
		if p.PID != 0 {
			pid = strconv.Itoa(p.PID)
		}
		if p.StartedAt != nil {
			started = ago(now, *p.StartedAt)
		}
		where := p.Container
		if where == "" && p.Namespace != 0 {
			where = fmt.Sprintf("(namespace %d)", p.Namespace)
		}
		add := t.add
		if p.Hidden != "" {
			add = t.addFaint
		}
		add(fmt.Sprintf("%d/%s", p.Port, p.Network), strings.Join(p.Addresses, ","), p.ProcessName, pid, p.User, where, started, p.Hidden, p.Command)
	}
	return t
}

// watchPorts shows the ports of an agent as they change.
func (p *program) watchPorts(ctx context.Context, name string, shown portFilter, output format, wait time.Duration) error {
	l := &listing[wire.ListeningPort]{program: p, what: "ports", key: portKey, table: portTable}
	watch := func(ctx context.Context, api *client.AgentAPI) iter.Seq2[wire.ListeningPorts, error] {
		return api.WatchPorts(ctx, shown.hidden)
	}
	return watchAgent(ctx, l, name, wait, output, watch, func(found wire.ListeningPorts) snapshot[wire.ListeningPort] {
		return snapshot[wire.ListeningPort]{items: shown.of(found.Ports), warnings: portNotes(found)}
	})
}
