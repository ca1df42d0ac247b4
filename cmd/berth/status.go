package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/berthd/berth/wire"
)

const (
	// statusEvery is how often a watch asks the server: what it shows changes within a second.
	statusEvery = time.Second
	// endedSessions is how many sessions are shown that have ended.
	endedSessions = 5
	// nearlyFull is the share of memory or of a disk, in percent, that is worth a word.
	nearlyFull = 90
)

func (p *program) statusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status NAME",
		Short: "Show how an agent and what runs in its workspace are doing",
		Long: `Show how an agent and what runs in its workspace are doing: what apps say of themselves and whether they
are well, how scripts ended, metadata, memory and disks, and who is there.

With --watch it is shown as it changes until Ctrl-C: in place on a terminal, else a line for each change
("+" is new, "~" is another, "-" is gone), as JSON with --output json.`,
		Example: `  berth status demo
  berth status demo --watch
  berth status demo --app assistant   # what it said before, too
  berth status demo --output json`,
		Args:              wantArgs(1, 1),
		ValidArgsFunction: p.agentNames,
	}
	output := outputFlag(cmd)
	live := watchFlag(cmd)
	app := cmd.Flags().String("app", "", "show all that this app said of itself, newest first")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *live && *app != "" {
			return usageError(cmd, errors.New("cannot watch what an app said before: leave out --app or --watch"))
		}
		if *live {
			return p.watchStatus(cmd.Context(), args[0], *output)
		}
		s, agent, err := p.find(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if *app != "" {
			return p.showHistory(cmd.Context(), s, agent, *app, *output)
		}
		report, err := s.Status(cmd.Context(), agent.ID)
		if err != nil {
			return s.problem("show agent "+agent.Name, err)
		}
		if *output == formatJSON {
			return printJSON(p.out, report)
		}
		return p.printStatus(report, time.Now())
	}
	return cmd
}

// showHistory shows what an app said of itself.
func (p *program) showHistory(ctx context.Context, s *server, agent wire.AgentSummary, app string, output format) error {
	statuses, err := s.AppStatuses(ctx, agent.ID, app)
	if err != nil {
		return s.problem("show app "+app+" of "+agent.Name, err)
	}
	if output == formatJSON {
		return printJSON(p.out, statuses)
	}
	t := &table{head: []string{"TIME", "STATE", "MESSAGE"}}
	for _, status := range statuses {
		t.add(status.CreatedAt.Local().Format(time.DateTime), status.State, withLink(status))
	}
	return p.printTable(t, "app "+clean(app)+" has said nothing yet")
}

// withLink is what an app says, in one text.
func withLink(status wire.AppStatus) string {
	return strings.TrimSpace(status.Message + " " + status.URI)
}

func (p *program) printStatus(r wire.StatusReport, now time.Time) error {
	lines := statusLines(r.Agent, now)
	for _, trouble := range troubles(r) {
		lines = append(lines, [2]string{"trouble", trouble})
	}
	for _, line := range lines {
		if _, err := fmt.Fprintf(p.out, "%-11s %s\n", line[0], clean(line[1])); err != nil {
			return err
		}
	}
	rows := statusRows(r)[1:] // the agent itself is above
	if len(rows) == 0 {
		return nil
	}
	fmt.Fprintln(p.out)
	return statusTable(rows, now).print(p.out, p.width())
}

// statusLines are the facts that are known, each with its name.
func statusLines(a wire.Agent, now time.Time) [][2]string {
	status := string(a.Status)
	switch {
	case a.Status == wire.AgentDisconnected && a.DisconnectedAt != nil:
		status += " since " + ago(now, *a.DisconnectedAt)
	case a.Status == wire.AgentConnected && a.LastConnectedAt != nil:
		status += ", last seen " + ago(now, *a.LastConnectedAt)
	}
	state := a.LifecycleState
	if a.ReadyAt != nil && state == "ready" {
		state += " since " + ago(now, *a.ReadyAt)
	}
	lines := [][2]string{
		{"name", a.Name}, {"id", a.ID.String()}, {"status", status}, {"state", state},
		{"address", wire.AgentAddr(a.ID).String()}, {"instance", a.InstanceID}, {"system", strings.Trim(a.OperatingSystem+"/"+a.Architecture, "/")},
		{"version", a.Version}, {"directory", a.ExpandedDirectory},
	}
	for region, l := range a.Latency {
		relay := fmt.Sprintf("%s, %.1f ms", region, l.Milliseconds)
		if l.Preferred {
			relay += ", home"
		}
		lines = append(lines, [2]string{"relay", relay})
	}
	return slices.DeleteFunc(lines, func(l [2]string) bool { return l[1] == "" })
}

// troubles are what a person should look after, in words.
func troubles(r wire.StatusReport) (all []string) {
	say := func(format string, args ...any) { all = append(all, fmt.Sprintf(format, args...)) }
	if !r.Health.Healthy {
		say("%s", r.Health.Reason)
	}
	for _, note := range r.Notes {
		say("%s", note)
	}
	if r.LogsOverflowed {
		say("the server keeps no more logs of this agent: its log is full")
	}
	for _, app := range r.Apps {
		if app.Health == "unhealthy" {
			say("app %s is not well", app.Slug)
		}
		if latest, ok := latestStatus(app); ok && latest.State == "failure" {
			say("app %s has failed", app.Slug)
		}
	}
	for _, script := range r.Scripts {
		if script.Status != "" && script.Status != "ok" {
			say("script %s: %s", script.DisplayName, scriptEnd(script))
		}
	}
	for _, m := range r.Metadata {
		if m.Result.Error != "" {
			say("metadata %s: %s", metadataName(m), m.Result.Error)
		}
	}
	for _, u := range usages(r.Usage) {
		if u.Total > 0 && u.percent() >= nearlyFull {
			say("%s is %d%% full", strings.TrimSpace(u.kind+" "+u.path), u.percent())
		}
	}
	return all
}

// statusRow is one thing that a workspace has, and how it is doing.
type statusRow struct {
	Kind  string     `json:"kind"`
	Name  string     `json:"name"`
	ID    string     `json:"id,omitempty"` // of a session
	State string     `json:"state"`
	At    *time.Time `json:"at,omitempty"` // since when
	Text  string     `json:"text,omitempty"`
}

func statusKey(row statusRow) string { return fmt.Sprintf("%s %q %s", row.Kind, row.Name, row.ID) }

func statusTable(rows []statusRow, now time.Time) *table {
	t := &table{head: []string{"WHAT", "NAME", "STATE", "SINCE", "DETAIL"}}
	for _, row := range rows {
		since := ""
		if row.At != nil {
			since = ago(now, *row.At)
		}
		add := t.add
		if row.State == stateEnded {
			add = t.addFaint
		}
		add(row.Kind, row.Name, row.State, since, row.Text)
	}
	return t
}

// States of sessions and of metadata.
const (
	stateOpen    = "open"
	stateUnknown = "unknown" // the agent is away
	stateEnded   = "ended"
	stateOK      = "ok"
	stateError   = "error"
	stateNone    = "none yet"
)

// statusRows lists what a workspace has, the agent itself first.
func statusRows(r wire.StatusReport) []statusRow {
	rows := []statusRow{{Kind: "agent", Name: r.Name, State: r.LifecycleState, At: agentSince(r.Agent), Text: string(r.Status)}}
	for _, app := range r.Apps {
		row := statusRow{Kind: "app", Name: app.Slug}
		if latest, ok := latestStatus(app); ok {
			row.State, row.At, row.Text = latest.State, &latest.CreatedAt, withLink(latest)
		}
		if app.Health != "disabled" {
			row.State = strings.TrimPrefix(row.State+", "+app.Health, ", ")
		}
		rows = append(rows, row)
	}
	for _, script := range r.Scripts {
		if script.Status != "" {
			rows = append(rows, statusRow{Kind: "script", Name: script.DisplayName, ID: script.ID.String(), State: script.Status, Text: scriptEnd(script)})
		}
	}
	for _, m := range r.Metadata {
		row := statusRow{Kind: "metadata", Name: metadataName(m), ID: m.Description.Key, State: stateOK, Text: m.Result.Value}
		switch {
		case m.Result.Error != "":
			row.State, row.Text = stateError, strings.TrimSpace(m.Result.Error+" "+m.Result.Value)
		case m.Result.CollectedAt.IsZero():
			row.State = stateNone
		}
		rows = append(rows, row)
	}
	for _, u := range usages(r.Usage) {
		rows = append(rows, statusRow{Kind: u.kind, Name: u.path, State: fmt.Sprintf("%d%%", u.percent()), At: &r.Usage.CollectedAt,
			Text: fmt.Sprintf("%s of %s", gibibytes(u.Used.Used), gibibytes(u.Total))})
	}
	ended := 0
	for _, session := range r.Sessions {
		row := statusRow{Kind: "session", Name: session.Type, ID: session.ID.String(), State: stateOpen, At: session.BeganAt}
		var texts []string
		if session.IP != "" {
			texts = append(texts, "from "+session.IP)
		}
		if session.EndedAt != nil {
			if ended++; ended > endedSessions {
				continue
			}
			row.State, row.At = stateEnded, session.EndedAt
			texts = append(texts, fmt.Sprintf("exit code %d", session.ExitCode))
			if session.Reason != "" {
				texts = append(texts, session.Reason)
			}
		} else if r.Status != wire.AgentConnected {
			row.State = stateUnknown
		}
		row.Text = strings.Join(texts, ", ")
		rows = append(rows, row)
	}
	return rows
}

// agentSince is since when an agent is in the state that it is in, nil if that is not known.
func agentSince(a wire.Agent) *time.Time {
	switch {
	case a.Status == wire.AgentDisconnected:
		return a.DisconnectedAt
	case a.LifecycleState == "starting":
		return a.StartedAt
	}
	return a.ReadyAt
}

func latestStatus(app wire.App) (latest wire.AppStatus, ok bool) {
	if len(app.Statuses) == 0 {
		return latest, false
	}
	return slices.MaxFunc(app.Statuses, func(x, y wire.AppStatus) int { return x.CreatedAt.Compare(y.CreatedAt) }), true
}

func scriptEnd(script wire.Script) string {
	if script.ExitCode == nil {
		return script.Status
	}
	return fmt.Sprintf("%s, exit code %d", script.Status, *script.ExitCode)
}

func metadataName(m wire.AgentMetadata) string {
	if m.Description.DisplayName != "" {
		return m.Description.DisplayName
	}
	return m.Description.Key
}

// used is how full one thing is.
type used struct {
	kind, path string
	wire.Used
}

func usages(u *wire.Usage) (all []used) {
	if u == nil {
		return nil
	}
	if u.Memory != nil {
		all = append(all, used{kind: "memory", Used: *u.Memory})
	}
	for _, v := range u.Volumes {
		all = append(all, used{kind: "disk", path: v.Path, Used: v.Used})
	}
	return all
}

func (u used) percent() int64 {
	if u.Total <= 0 {
		return 0
	}
	return int64(float64(u.Used.Used) / float64(u.Total) * 100)
}

func gibibytes(n int64) string { return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30)) }

// watchStatus shows the status of an agent as it changes.
func (p *program) watchStatus(ctx context.Context, name string, output format) error {
	ctx, stop := untilInterrupt(ctx)
	defer stop()
	s, agent, err := p.find(ctx, name)
	if err != nil {
		return err
	}
	l := &listing[statusRow]{program: p, agent: agent.Name, source: "the server", what: "status", key: statusKey, table: statusTable}
	return l.watch(ctx, func(ctx context.Context) iter.Seq2[snapshot[statusRow], error] {
		return func(yield func(snapshot[statusRow], error) bool) {
			for {
				report, err := s.Status(ctx, agent.ID)
				if !yield(snapshot[statusRow]{items: statusRows(report), warnings: troubles(report)}, err) || err != nil {
					return
				}
				select {
				case <-ctx.Done():
					return
				case <-time.After(statusEvery):
				}
			}
		}
	}, output)
}
