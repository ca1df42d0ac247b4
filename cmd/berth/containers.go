package main

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/wire"
)

func (p *program) containersCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "containers NAME",
		Short: "List the containers beside an agent",
		Long: `List the containers beside an agent, of every engine that it finds: those that run, then those
that were stopped. "berth ssh NAME --container CONTAINER" opens a shell in one.

With --watch the list is shown as it changes until Ctrl-C: in place on a terminal, else a line for each
change ("+" is new, "~" is another, "-" is gone), as JSON with --output json.`,
		Example: `  berth containers demo
  berth containers demo --running --watch
  berth containers demo --label com.docker.compose.project=shop
  berth containers demo --output json`,
		Args:              wantArgs(1, 1),
		ValidArgsFunction: p.agentNames,
	}
	output := outputFlag(cmd)
	live := watchFlag(cmd)
	var shown containerFilter
	cmd.Flags().BoolVar(&shown.running, "running", false, "leave out those that were stopped")
	cmd.Flags().StringArrayVarP(&shown.labels, "label", "l", nil, "only those with the label KEY, or KEY=VALUE; repeatable, all must hold")
	wait := waitFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		for _, label := range shown.labels {
			if label == "" || strings.HasPrefix(label, "=") {
				return usageError(cmd, fmt.Errorf("cannot look for the label %q: the form is KEY or KEY=VALUE", label))
			}
		}
		if *live {
			return p.watchContainers(cmd.Context(), args[0], shown, *output, *wait)
		}
		s, agent, err := p.find(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		found, err := s.Containers(cmd.Context(), agent.ID)
		if err != nil {
			return s.problem("list the containers of "+agent.Name, err)
		}
		all := len(found.Containers)
		found.Containers = shown.of(found.Containers)
		if *output == formatJSON {
			return printJSON(p.out, found)
		}
		for _, w := range found.Warnings {
			fmt.Fprintln(p.errOut, "berth: note:", clean(w))
		}
		empty := "there is no container beside " + clean(agent.Name)
		switch {
		case all > 0:
			empty = fmt.Sprintf("none of the %d containers beside %s is meant", all, clean(agent.Name))
		case len(found.Engines) == 0:
			empty = clean(agent.Name) + " tells of no container engine"
		}
		return p.printTable(containerTable(found.Containers, time.Now()), empty)
	}
	return cmd
}

// containerFilter says which containers are shown.
type containerFilter struct {
	running bool
	labels  []string // KEY or KEY=VALUE
}

// of returns the containers that pass: those that run first, each part by name. It is never nil.
func (f containerFilter) of(all []wire.Container) []wire.Container {
	shown := []wire.Container{}
	for _, c := range all {
		if (c.Running || !f.running) && f.labelled(c) {
			shown = append(shown, c)
		}
	}
	slices.SortStableFunc(shown, func(a, b wire.Container) int {
		if a.Running != b.Running {
			if a.Running {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID))
	})
	return shown
}

func (f containerFilter) labelled(c wire.Container) bool {
	for _, label := range f.labels {
		key, value, exact := strings.Cut(label, "=")
		if got, ok := c.Labels[key]; !ok || exact && got != value {
			return false
		}
	}
	return true
}

// containerKey tells a container from others: two engines may have made the same id, in theory.
func containerKey(c wire.Container) string { return c.Engine + " " + c.ID }

// shortContainerID is how much of an id container engines show.
const shortContainerID = 12

func containerTable(all []wire.Container, now time.Time) *table {
	t := &table{head: []string{"NAME", "ID", "STATUS", "PROJECT", "ENGINE", "CREATED", "PORTS", "IMAGE"}}
	for _, c := range all {
		add := t.add
		if !c.Running {
			add = t.addFaint
		}
		created := ""
		if !c.CreatedAt.IsZero() {
			created = ago(now, c.CreatedAt)
		}
		add(c.Name, c.ID[:min(shortContainerID, len(c.ID))], containerStatus(c), composePart(c), c.Engine, created, containerPorts(c.Ports), c.Image)
	}
	return t
}

// containerStatus is what a container does, and how it does if that is checked.
func containerStatus(c wire.Container) string {
	if c.Health == "" {
		return c.Status
	}
	return fmt.Sprintf("%s (%s)", c.Status, c.Health)
}

// composePart is which service of which Compose project a container is.
func composePart(c wire.Container) string {
	if c.ComposeService == "" {
		return c.ComposeProject
	}
	return c.ComposeProject + "/" + c.ComposeService
}

func containerPorts(ports []wire.ContainerPort) string {
	var all []string
	for _, port := range ports {
		s := fmt.Sprintf("%d/%s", port.Port, port.Network)
		if port.HostPort != 0 {
			s = fmt.Sprintf("%d->%s", port.HostPort, s)
		}
		// Engines tell of a published port once for IPv4 and once for IPv6.
		if !slices.Contains(all, s) {
			all = append(all, s)
		}
	}
	return strings.Join(all, ",")
}

// watchContainers shows the containers beside an agent as they change.
func (p *program) watchContainers(ctx context.Context, name string, shown containerFilter, output format, wait time.Duration) error {
	l := &listing[wire.Container]{program: p, what: "containers", key: containerKey, table: containerTable}
	watch := func(ctx context.Context, api *client.AgentAPI) iter.Seq2[wire.Containers, error] {
		return api.WatchContainers(ctx)
	}
	return watchAgent(ctx, l, name, wait, output, watch, func(found wire.Containers) snapshot[wire.Container] {
		return snapshot[wire.Container]{items: shown.of(found.Containers), warnings: found.Warnings}
	})
}
