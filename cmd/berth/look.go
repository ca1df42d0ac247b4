package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/internal/build"
	"github.com/berthd/berth/speedtest"
	"github.com/berthd/berth/tailnet"
	"github.com/berthd/berth/wire"
)

// untilInterrupt returns a context that ends at Ctrl-C, a closed window or SIGTERM.
func untilInterrupt(ctx context.Context) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
}

// completionTimeout bounds how long a shell's Tab waits for the server.
const completionTimeout = 2 * time.Second

// agentNames completes the first argument with the names of agents.
func (p *program) agentNames(cmd *cobra.Command, args []string, toComplete string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	s, err := p.server()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
	defer cancel()
	agents, err := s.Agents(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return completions(agents, toComplete), cobra.ShellCompDirectiveNoFileComp
}

// completions returns the names that begin as typed and are safe on a command line.
func completions(agents []wire.AgentSummary, toComplete string) []cobra.Completion {
	var names []cobra.Completion
	for _, a := range agents {
		if strings.HasPrefix(a.Name, toComplete) && plain.MatchString(a.Name) {
			names = append(names, cobra.CompletionWithDesc(a.Name, string(a.Status)))
		}
	}
	return names
}

func (p *program) logsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "logs NAME",
		Short: "Print the logs of an agent and its scripts",
		Example: `  berth logs demo
  berth logs demo -f
  berth logs demo --output json   # one object a line
  berth logs demo --full          # what scripts printed, from the workspace's own files`,
		Args:              wantArgs(1, 1),
		ValidArgsFunction: p.agentNames,
	}
	output := outputFlag(cmd)
	follow := cmd.Flags().BoolP("follow", "f", false, "print new lines as they come, until Ctrl-C")
	full := cmd.Flags().Bool("full", false, "print all that scripts have printed, from the workspace's own files; a server may keep a part only")
	wait := waitFlag(cmd)
	cmd.MarkFlagsMutuallyExclusive("full", "follow")
	cmd.MarkFlagsMutuallyExclusive("full", "output")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ctx, stop := untilInterrupt(cmd.Context())
		defer stop()
		if *full {
			return p.fullLogs(ctx, args[0], *wait)
		}
		s, agent, err := p.find(ctx, args[0])
		if err != nil {
			return err
		}
		l := &logPrinter{program: p, server: s, agent: agent, output: *output, sources: map[uuid.UUID]string{}}
		if !*follow {
			return l.print(ctx, false)
		}
		return l.follow(ctx)
	}
	return cmd
}

// fullLogs prints the log files of an agent's scripts, as tail prints several files.
func (p *program) fullLogs(ctx context.Context, name string, wait time.Duration) error {
	s, summary, err := p.find(ctx, name)
	if err != nil {
		return err
	}
	agent, err := s.Agent(ctx, summary.ID)
	if err != nil {
		return s.problem("show agent "+summary.Name, err)
	}
	m, err := p.reach(ctx, name, wait)
	if err != nil {
		return err
	}
	defer m.Close()
	api := m.api()
	defer api.Close()
	for _, script := range agent.Scripts {
		if err := p.fullLog(ctx, api, script); err != nil {
			return fmt.Errorf("cannot read what %s printed: %w", clean(script.DisplayName), err)
		}
	}
	return nil
}

func (p *program) fullLog(ctx context.Context, api *client.AgentAPI, script wire.Script) error {
	file, err := api.ScriptLog(ctx, script.LogSourceID)
	var answer *wire.Error
	if errors.As(err, &answer) && answer.StatusCode == http.StatusNotFound {
		return nil // it has not run
	}
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err := fmt.Fprintf(p.out, "==> %s <==\n", clean(script.DisplayName)); err != nil {
		return err
	}
	out := bufio.NewWriter(p.out)
	for lines := bufio.NewReaderSize(file, 64<<10); ; {
		line, err := lines.ReadSlice('\n') // a longer line comes in pieces, each a line
		if len(line) > 0 {
			if _, err := out.WriteString(cleanLog(string(line)) + "\n"); err != nil {
				return err
			}
		}
		switch {
		case err == nil || errors.Is(err, bufio.ErrBufferFull):
		case err == io.EOF:
			return out.Flush()
		default:
			return errors.Join(err, out.Flush())
		}
	}
}

// logPrinter prints the log of one agent and remembers how far it is.
type logPrinter struct {
	program *program
	server  *server
	agent   wire.AgentSummary
	output  format
	sources map[uuid.UUID]string // names, asked for when a new source appears
	last    int64                // id of the last line printed
}

// follow prints until ctx is done. A lost stream is opened again behind the last line.
func (l *logPrinter) follow(ctx context.Context) error {
	wait := minRedial
	for {
		before := l.last
		err := l.print(ctx, true)
		if ctx.Err() != nil {
			return nil
		}
		if err == nil { // the server says that the agent is no more
			return nil
		}
		var answer *wire.Error
		if errors.As(err, &answer) && answer.StatusCode < 500 {
			return err
		}
		if l.last != before {
			wait = minRedial
		}
		line := l.program.progress()
		line.say("the server is away; waiting for it…")
		select {
		case <-ctx.Done():
			line.done()
			return nil
		case <-time.After(wait):
		}
		line.done()
		wait = min(2*wait, maxRedial)
	}
}

func (l *logPrinter) print(ctx context.Context, follow bool) error {
	for entry, err := range l.server.FollowLogs(ctx, l.agent.ID, l.last, follow) {
		if err != nil {
			return l.server.problem("read the logs of "+l.agent.Name, err)
		}
		if err := l.entry(ctx, entry); err != nil {
			return err
		}
		l.last = entry.ID
	}
	return nil
}

func (l *logPrinter) entry(ctx context.Context, e wire.LogEntry) error {
	if l.output == formatJSON {
		return printJSONLine(l.program.out, e)
	}
	_, err := fmt.Fprintf(l.program.out, "%s %-5s %s: %s\n",
		e.CreatedAt.Local().Format("15:04:05.000"), clean(e.Level), clean(l.source(ctx, e.SourceID)), cleanLog(e.Output))
	return err
}

// source names a log source, by its id if the server knows no name.
func (l *logPrinter) source(ctx context.Context, id uuid.UUID) string {
	if name, ok := l.sources[id]; ok {
		return name
	}
	if a, err := l.server.Agent(ctx, l.agent.ID); err == nil {
		for _, script := range a.Scripts {
			l.sources[script.LogSourceID] = script.DisplayName
		}
		for _, source := range a.LogSources {
			l.sources[source.ID] = source.DisplayName
		}
	}
	if l.sources[id] == "" {
		l.sources[id] = id.String()[:8]
	}
	return l.sources[id]
}

// pong is one line of `berth ping --output json`.
type pong struct {
	Latency float64 `json:"latency_ms"`
	Direct  string  `json:"direct,omitempty"`
	Relay   string  `json:"relay,omitempty"`
	Error   string  `json:"error,omitempty"`
}

func (p *program) pingCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "ping NAME",
		Short:             "Measure the round trip to an agent, and show which way it goes",
		Example:           "  berth ping demo\n  berth ping demo -c 0   # until Ctrl-C",
		Args:              wantArgs(1, 1),
		ValidArgsFunction: p.agentNames,
	}
	output := outputFlag(cmd)
	count := cmd.Flags().IntP("count", "c", 5, "how many to send; 0 for no end")
	interval := cmd.Flags().Duration("interval", time.Second, "time between two")
	wait := waitFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *count < 0 || *interval <= 0 {
			return usageError(cmd, errors.New("cannot ping a negative number of times or without an interval"))
		}
		ctx, stop := untilInterrupt(cmd.Context())
		defer stop()
		m, err := p.reach(ctx, args[0], *wait)
		if err != nil {
			return err
		}
		defer m.Close()
		answered := false
		for i := 0; *count == 0 || i < *count; i++ {
			if i > 0 {
				select {
				case <-ctx.Done():
				case <-time.After(*interval):
				}
			}
			if ctx.Err() != nil {
				break
			}
			ping, err := pingOnce(ctx, m)
			answered = answered || err == nil
			if err := p.printPing(m.agent.Name, ping, err, *output); err != nil {
				return err
			}
		}
		if !answered {
			return fmt.Errorf("cannot reach agent %s: no ping was answered", m.agent.Name)
		}
		return nil
	}
	return cmd
}

// pingTimeout is how long one ping may take: more than any path that is usable.
const pingTimeout = 5 * time.Second

func pingOnce(ctx context.Context, m *mesh) (tailnet.Ping, error) {
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	return m.ping(ctx)
}

func (p *program) printPing(name string, ping tailnet.Ping, err error, output format) error {
	if output == formatJSON {
		line := pong{Latency: float64(ping.Latency) / float64(time.Millisecond), Relay: ping.RegionName}
		if ping.Direct.IsValid() {
			line.Direct, line.Relay = ping.Direct.String(), ""
		}
		if err != nil {
			line = pong{Error: err.Error()}
		}
		return printJSONLine(p.out, line)
	}
	text := fmt.Sprintf("%s answered in %s (%s)", name, duration(ping.Latency), path(ping))
	if err != nil {
		text = fmt.Sprintf("%s did not answer: %v", name, err)
	}
	_, err = fmt.Fprintln(p.out, clean(text))
	return err
}

// waitFlag adds --wait to a command that reaches an agent.
func waitFlag(cmd *cobra.Command) *time.Duration {
	return cmd.Flags().Duration("wait", defaultWait, "how long the agent may take to be reachable")
}

// measured is one line of `berth speedtest --output json`.
type measured struct {
	Direction string  `json:"direction"`
	Bytes     int64   `json:"bytes"`
	Seconds   float64 `json:"seconds"`
	MBitPerS  float64 `json:"mbit_per_s"`
	Path      string  `json:"path"`
}

func (p *program) speedtestCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "speedtest NAME",
		Short:             "Measure how fast one stream to an agent is",
		Example:           "  berth speedtest demo\n  berth speedtest demo --direction up --time 10s",
		Args:              wantArgs(1, 1),
		ValidArgsFunction: p.agentNames,
	}
	output := outputFlag(cmd)
	long := cmd.Flags().DurationP("time", "t", speedtest.DefaultDuration, "how long to measure each direction")
	way := cmd.Flags().StringP("direction", "d", "both", "down, up or both")
	cmd.RegisterFlagCompletionFunc("direction", cobra.FixedCompletions([]string{"down", "up", "both"}, cobra.ShellCompDirectiveNoFileComp))
	wait := waitFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		directions, ok := map[string][]speedtest.Direction{
			"down": {speedtest.Download}, "up": {speedtest.Upload}, "both": {speedtest.Download, speedtest.Upload},
		}[*way]
		if !ok {
			return usageError(cmd, fmt.Errorf("cannot measure direction %q: it must be down, up or both", *way))
		}
		ctx, stop := untilInterrupt(cmd.Context())
		defer stop()
		m, err := p.reach(ctx, args[0], *wait)
		if err != nil {
			return err
		}
		defer m.Close()
		for _, d := range directions {
			if err := p.measure(ctx, m, d, *long, *output); err != nil {
				return err
			}
		}
		return nil
	}
	return cmd
}

func (p *program) measure(ctx context.Context, m *mesh, d speedtest.Direction, long time.Duration, output format) error {
	line := p.progress()
	defer line.done()
	line.say("%s for %v…", d, long)
	conn, err := m.dial(ctx, wire.PortSpeedtest)
	if err != nil {
		return err
	}
	result, err := speedtest.Run(ctx, conn, d, long)
	if err != nil {
		return fmt.Errorf("cannot measure the speed to %s: %w", m.agent.Name, err)
	}
	way := "unknown path"
	if ping, err := pingOnce(ctx, m); err == nil {
		way = path(ping)
	}
	line.done()
	mbit := result.BitsPerSecond() / 1e6
	if output == formatJSON {
		return printJSONLine(p.out, measured{d.String(), result.Bytes, result.Elapsed.Seconds(), mbit, way})
	}
	_, err = fmt.Fprintf(p.out, "%-8s %8.1f Mbit/s  (%.1f MB in %.1f s, %s)\n", d, mbit, float64(result.Bytes)/1e6, result.Elapsed.Seconds(), clean(way))
	return err
}

// buildVersion is this program's version: set by the release build, else what the Go tool recorded.
var buildVersion = ""

func version() string {
	if buildVersion != "" {
		return buildVersion
	}
	// Outside of a repository the Go tool records "(devel)", which peers cannot read: they want vX.Y.Z.
	if info, ok := debug.ReadBuildInfo(); ok && strings.HasPrefix(info.Main.Version, "v") {
		return info.Main.Version
	}
	return "v0.1.0-devel"
}

func (p *program) versionCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:               "version",
		Short:             "Print the version of berth, and of the server if there is one",
		Example:           "  berth version",
		Args:              wantArgs(0, 0),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		v := struct {
			Berth  string `json:"berth"`
			Commit string `json:"commit"`
			Date   string `json:"date"`
			API    string `json:"api"`
			Go     string `json:"go"`
			Server string `json:"server,omitempty"`
		}{version(), build.Commit(), build.Date(), wire.CurrentVersion.String(), runtime.Version(), p.serverVersion(cmd.Context())}
		if *output == formatJSON {
			return printJSON(p.out, v)
		}
		fmt.Fprintf(p.out, "berth %s (agent API %s)\ncommit %s of %s, %s, %s/%s\n", v.Berth, v.API, v.Commit, v.Date, v.Go, runtime.GOOS, runtime.GOARCH)
		if v.Server != "" {
			fmt.Fprintf(p.out, "server %s\n", clean(v.Server))
		}
		return nil
	}
	return cmd
}

// serverVersion asks the server, if one is named and answers soon; a version must not need a server.
func (p *program) serverVersion(ctx context.Context) string {
	s, err := p.server()
	if err != nil {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, completionTimeout)
	defer cancel()
	info, err := s.BuildInfo(ctx)
	if err != nil {
		return "unknown: " + client.Explain(err).Error()
	}
	return info.Version
}
