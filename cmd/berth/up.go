//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/berthd/berth/control"
	"github.com/berthd/berth/internal/testnet"
	"github.com/berthd/berth/wire"
)

const (
	// localAgent is the agent that `up` declares, localApp the app that can tell its status there.
	localAgent = "demo"
	localApp   = "demo"

	// stopGrace is how long the agent may take to stop: its stop scripts and the last flush.
	stopGrace = 15 * time.Second
	// sweepGrace is how long what the agent left running may take to end before it is killed.
	sweepGrace = 2 * time.Second
	// tailSize is how much of the agent's log is shown when it fails.
	tailSize = 4 << 10
	// maxEvent bounds one line of the agent's report; it takes a few hundred bytes.
	maxEvent = 64 << 10
)

func (p *program) upCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Run everything on this machine, to try it",
		Long: `Run everything on this machine, on loopback: a control server, a metadata service that
behaves as a cloud's with keys made now, and an agent "demo" that is given nothing but the server's
URL and proves by its instance identity who it is. Other berth commands then work in another
terminal. Ctrl-C stops all of it and leaves nothing behind.`,
		Example: `  berth up
  berth up --check   # walk the whole road once and say of each stage whether it holds
  berth up --check --cloud azure`,
		Args:              wantArgs(0, 0),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	check := cmd.Flags().Bool("check", false, "walk the main job once, print one line a stage, and exit 0 if all held")
	var place place
	cmd.Flags().StringVar(&place.cloud, "cloud", wire.ProviderAWS, "the cloud whose machine this seems to be: aws, azure or google")
	cmd.RegisterFlagCompletionFunc("cloud", cobra.FixedCompletions(localClouds, cobra.ShellCompDirectiveNoFileComp))
	cmd.Flags().StringVar(&place.metadata, "metadata", "127.0.0.1:0",
		"where the metadata service listens; at "+realMetadata+" the agent is not told, for that is where it looks")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx, stop := untilInterrupt(cmd.Context())
		defer stop()
		if !slices.Contains(localClouds, place.cloud) {
			return usageError(cmd, fmt.Errorf("cannot be in cloud %q: it must be %s", place.cloud, strings.Join(localClouds, ", ")))
		}
		if *check {
			return p.check(ctx, place)
		}
		return p.up(ctx, place)
	}
	return cmd
}

// place is where the agent's machine seems to be.
type place struct {
	cloud    string // aws, azure or google
	metadata string // address of its metadata service
}

// up runs the local stack until ctx is done or a part of it fails.
func (p *program) up(ctx context.Context, place place) (err error) {
	start := time.Now()
	tell := func(format string, args ...any) {
		fmt.Fprintf(p.out, "%6.2f s  %s\n", time.Since(start).Seconds(), clean(fmt.Sprintf(format, args...)))
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s, err := startStack(ctx, p.log(), place, personsHome)
	if err != nil {
		return err
	}
	defer func() {
		if errors.Is(err, errAgentEnded) {
			p.showLog(s)
		}
		err = errors.Join(err, s.stop())
	}()
	go func() {
		<-s.failed
		cancel(s.failure())
	}()
	tell("control server at %s", s.url)

	path, err := contextPath(contextUp)
	if err != nil {
		return err
	}
	saved := savedContext{URL: s.url.String(), TokenFile: s.keyFile(), PID: os.Getpid()}
	if err := saved.write(path); err != nil {
		return err
	}
	defer saved.remove(path)

	if err := p.tellSteps(ctx, s, tell); err != nil {
		return stopped(ctx, err)
	}
	p.tellNext()
	<-ctx.Done()
	fmt.Fprintln(p.errOut, "stopping…")
	return stopped(ctx, nil)
}

// stopped returns what ended ctx, nil if a person did.
func stopped(ctx context.Context, err error) error {
	cause := context.Cause(ctx)
	if cause == nil || ctx.Err() == nil {
		return err
	}
	if errors.Is(cause, errAgentEnded) {
		return cause
	}
	return nil
}

// tellSteps tells each step until the agent is ready and can be reached, whichever comes first.
func (p *program) tellSteps(ctx context.Context, s *stack, tell func(string, ...any)) error {
	for joined, ready := false, false; !joined || !ready; {
		e, err := s.next(ctx)
		if err != nil {
			return err
		}
		switch e.Step {
		case stepIdentity:
			tell("identity fetched%s", inWords(e))
		case stepExchange:
			tell("token exchanged%s", inWords(e))
		case stepTrouble:
			tell("trouble: %s; %s", e.Cause, e.Fix)
		case stepTailnet:
			m, way, err := s.join(ctx)
			if err != nil {
				return err
			}
			m.Close()
			tell("tailnet joined (%s)", way)
			joined = true
		case stepReady:
			tell("ready")
			ready = true
		}
	}
	return nil
}

// inWords is what a step says of itself, in brackets.
func inWords(e event) string {
	detail := e.Detail
	if e.Took > 0 {
		detail = strings.TrimPrefix(fmt.Sprintf("%s, took %d ms", detail, e.Took), ", ")
	}
	if detail == "" {
		return ""
	}
	return " (" + detail + ")"
}

// tellNext prints commands that work as they stand in another terminal.
func (p *program) tellNext() {
	berth := commandName()
	fmt.Fprintf(p.out, "\nIn another terminal:\n")
	for _, c := range []string{"ssh demo", "shell demo", "status demo", "logs demo -f", "ping demo", "speedtest demo"} {
		fmt.Fprintf(p.out, "  %s %s\n", berth, c)
	}
	fmt.Fprintf(p.out, "\nCtrl-C stops everything and leaves nothing behind.\n")
}

// commandName is how this program is called from where the person is.
func commandName() string {
	binary, err := os.Executable()
	if err != nil {
		return "berth"
	}
	if runByGo(binary) {
		return "go run ./cmd/berth"
	}
	if found, err := exec.LookPath("berth"); err == nil && sameFile(found, binary) {
		return "berth"
	}
	return shellQuote(binary)
}

func sameFile(a, b string) bool {
	x, errX := os.Stat(a)
	y, errY := os.Stat(b)
	return errX == nil && errY == nil && os.SameFile(x, y)
}

// Steps of the agent's report, as its --status-json names them.
const (
	stepIdentity = "identity"
	stepExchange = "exchange"
	stepTailnet  = "tailnet"
	stepReady    = "ready"
	stepTrouble  = "trouble"
)

// event is one line of the agent's report.
type event struct {
	Step    string `json:"step"`
	Elapsed int64  `json:"elapsed_ms"`
	Took    int64  `json:"took_ms"`
	Detail  string `json:"detail"`
	Cause   string `json:"cause"`
	Fix     string `json:"fix"`
}

// stack is the whole of berth on one machine: a control server and a metadata service in this
// process, and an agent in another. All its files are below one temporary directory.
type stack struct {
	dir    string
	url    *url.URL
	server *server // as a person who uses it
	agent  wire.AgentSummary

	child  *exec.Cmd
	events chan event
	failed chan struct{} // closed when the agent has ended, wanted or not
	ended  error         // why, once failed is closed

	cancel context.CancelFunc
	serves *errgroup.Group
}

// errAgentEnded says that the agent process ended though nobody stopped it.
var errAgentEnded = errors.New("the agent ended by itself")

// home says which home directory the agent's shells have.
type home bool

const (
	personsHome home = false
	ownHome     home = true // below the stack's directory, so that not even a shell's history is left
)

// startStack starts everything. An error leaves nothing running.
func startStack(ctx context.Context, log *slog.Logger, place place, home home) (_ *stack, err error) {
	cloud, err := newLocalCloud(place.cloud)
	if err != nil {
		return nil, err
	}
	// Kept short: below it lie Unix sockets, whose paths may have 107 bytes.
	dir, err := os.MkdirTemp("", "berth-up-")
	if err != nil {
		return nil, fmt.Errorf("cannot make a temporary directory: %w", err)
	}
	// What the parts do ends with stop, not with the person's Ctrl-C: the order matters.
	running, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s := &stack{dir: dir, cancel: cancel, serves: new(errgroup.Group), events: make(chan event, 64), failed: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.stop())
		}
	}()
	metadata, err := s.serve(running, place.metadata, cloud.metadata)
	if err != nil {
		return nil, err
	}
	if err := s.startServer(running, cloud, log); err != nil {
		return nil, err
	}
	if err := s.findAgent(ctx); err != nil {
		return nil, err
	}
	var env []string
	if place.metadata != realMetadata {
		env = append(env, cloud.variable(metadata))
	}
	return s, s.startAgent(cloud.provider, env, home)
}

// serve runs a part of a cloud and returns its address.
func (s *stack) serve(ctx context.Context, addr string, part http.Handler) (string, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return "", fmt.Errorf("cannot listen: %w", err)
	}
	s.serves.Go(func() error { return testnet.Serve(ctx, l, part) })
	return l.Addr().String(), nil
}

// keyFile is where the control server keeps the admin key.
func (s *stack) keyFile() string { return filepath.Join(s.dir, "server", "admin-key") }

// startServer starts the control server with one agent, which it knows by its instance id alone.
func (s *stack) startServer(ctx context.Context, cloud *localCloud, log *slog.Logger) error {
	file := filepath.Join(s.dir, "agents.yaml")
	if err := os.WriteFile(file, []byte(agentsFile(cloud.provider, cloud.instance)), 0o600); err != nil {
		return fmt.Errorf("cannot write the configuration: %w", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("cannot listen on loopback: %w", err)
	}
	s.url = &url.URL{Scheme: "http", Host: l.Addr().String()}
	config := control.Config{
		DataDir: filepath.Dir(s.keyFile()), AccessURL: s.url, ConfigFile: file, STUNAddr: "127.0.0.1:0",
		Version: version(), Log: log,
	}
	var keys *url.URL
	if cloud.keys != nil {
		addr, err := s.serve(ctx, "127.0.0.1:0", cloud.keys)
		if err != nil {
			l.Close()
			return err
		}
		keys = &url.URL{Scheme: "http", Host: addr}
	}
	cloud.trust(&config, keys)
	server, err := control.New(ctx, config)
	if err != nil {
		l.Close()
		return err
	}
	s.serves.Go(func() error { return server.Serve(ctx, l) })
	return nil
}

// findAgent asks the server, as a person would, for the agent that was declared.
func (s *stack) findAgent(ctx context.Context) error {
	person := &program{errOut: os.Stderr, url: s.url.String(), tokenFile: s.keyFile()}
	var err error
	if s.server, err = person.server(); err != nil {
		return err
	}
	s.agent, err = s.server.agent(ctx, localAgent)
	return err
}

// startAgent starts the agent process. It gets the server's URL and env, which tells where the metadata
// service is; nothing secret.
func (s *stack) startAgent(provider string, env []string, home home) error {
	binary, err := os.Executable()
	if err != nil {
		return fmt.Errorf("cannot find this program's path: %w", err)
	}
	state, tmp, homeDir := filepath.Join(s.dir, "state"), filepath.Join(s.dir, "tmp"), filepath.Join(s.dir, "home")
	for _, dir := range []string{state, tmp, homeDir} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return fmt.Errorf("cannot prepare the agent: %w", err)
		}
	}
	logFile, err := os.OpenFile(s.logFile(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("cannot prepare the agent: %w", err)
	}
	defer logFile.Close()
	report, reports, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("cannot start the agent: %w", err)
	}
	defer reports.Close()
	const reportFD = "3" // the first of ExtraFiles
	child := exec.Command(binary, childVerb, "run", "--url", s.url.String(), "--auth", provider+"-instance-identity", "--state-dir", state, "--status-json", reportFD)
	child.ExtraFiles = []*os.File{reports}
	if home == personsHome {
		homeDir = ""
	}
	child.Env = append(append(childEnv(os.Environ(), homeDir), env...), "TMPDIR="+tmp)
	child.Dir = s.dir
	child.Stdout, child.Stderr = logFile, logFile
	child.SysProcAttr = childAttributes()
	if err := startTied(child); err != nil {
		report.Close()
		return fmt.Errorf("cannot start the agent: %w", err)
	}
	s.child = child
	go s.follow(report)
	return nil
}

func (s *stack) logFile() string { return filepath.Join(s.dir, "berthd.log") }

// childEnv is the environment of a machine that knows nothing of this one's access to berth or clouds.
func childEnv(env []string, home string) []string {
	var kept []string
	for _, v := range env {
		name, _, _ := strings.Cut(v, "=")
		switch {
		case strings.HasPrefix(name, "BERTH_"), strings.HasPrefix(name, "CODER"), strings.HasPrefix(name, "AWS_"), strings.HasPrefix(name, "GCE_"), name == "TMPDIR":
		case name == "HOME" && home != "":
		default:
			kept = append(kept, v)
		}
	}
	if home != "" {
		kept = append(kept, "HOME="+home)
	}
	return kept
}

// follow reads the agent's report until its end, and then learns how the agent ended.
func (s *stack) follow(report io.ReadCloser) {
	defer report.Close()
	lines := bufio.NewScanner(report)
	lines.Buffer(nil, maxEvent)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			continue
		}
		select {
		case s.events <- e:
		default: // nobody listens any more; what happens later is in the log
		}
	}
	s.ended = s.child.Wait()
	close(s.failed)
}

// failure says how the agent ended.
func (s *stack) failure() error {
	how := "exit code 0"
	if s.ended != nil {
		how = s.ended.Error()
	}
	return fmt.Errorf("%w (%s); its log, above, says why", errAgentEnded, how)
}

// showLog prints the end of the agent's log.
func (p *program) showLog(s *stack) {
	fmt.Fprintln(p.errOut, "the end of the agent's log:")
	for line := range strings.Lines(s.logTail()) {
		fmt.Fprintf(p.errOut, "  %s\n", cleanLog(line))
	}
}

// logTail returns the end of the agent's log, without a line cut in half.
func (s *stack) logTail() string {
	data, err := os.ReadFile(s.logFile())
	if err != nil {
		return err.Error()
	}
	if len(data) > tailSize {
		data = data[len(data)-tailSize:]
		if i := bytes.IndexByte(data, '\n'); i >= 0 {
			data = data[i+1:]
		}
	}
	return string(data)
}

// next returns the agent's next step.
func (s *stack) next(ctx context.Context) (event, error) {
	select {
	case e := <-s.events:
		return e, nil
	case <-s.failed:
		return event{}, s.failure()
	case <-ctx.Done():
		return event{}, context.Cause(ctx)
	}
}

// join joins the mesh as a person's client and says which way the agent is reached, once the way has
// settled: the first packets go by relay while a direct path is looked for.
func (s *stack) join(ctx context.Context) (*mesh, string, error) {
	const settle = 5 * time.Second // twice what finding a path on one machine has been seen to take
	m, err := joinMesh(ctx, s.server, s.agent, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, "", err
	}
	waiting, cancel := context.WithTimeout(ctx, defaultWait)
	defer cancel()
	if err := m.await(waiting); err != nil {
		m.Close()
		return nil, "", err
	}
	for start := time.Now(); ; {
		ping, err := pingOnce(ctx, m)
		switch {
		case err == nil && (ping.Direct.IsValid() || time.Since(start) > settle):
			return m, path(ping), nil
		case err != nil && (ctx.Err() != nil || time.Since(start) > defaultWait):
			m.Close()
			return nil, "", fmt.Errorf("cannot ping the agent: %w", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond): // a ping also makes the node look for a path
		}
	}
}

// stop ends everything in reverse order and removes the directory. When it returns, nothing is left.
func (s *stack) stop() error {
	if s.child != nil {
		s.child.Process.Signal(syscall.SIGTERM)
		select {
		case <-s.failed:
		case <-time.After(stopGrace):
			s.child.Process.Kill()
			<-s.failed
		}
	}
	sweep(sweepGrace)
	s.cancel()
	err := s.serves.Wait()
	if rmErr := os.RemoveAll(s.dir); rmErr != nil {
		err = errors.Join(err, fmt.Errorf("cannot remove %s: %w", s.dir, rmErr))
	}
	return err
}

// nonce returns text that stands nowhere else.
var nonce = sync.OnceValue(func() string { return strings.ToLower(rand.Text()) })

// startLine is what the start script logs last; `up --check` looks for it.
const startLine = "the start script is done"

// agentsFile declares the agent: the instance it runs on, an app, and a start script.
func agentsFile(provider, instance string) string {
	return fmt.Sprintf(`agents:
  - name: %s
    instance:
      provider: %s
      id: %q
    apps:
      - slug: %s
        display_name: Demo
    scripts:
      - display_name: Start
        run_on_start: true
        script: |
          echo "this line comes from the start script on $(uname -n)"
          echo "it was fetched with the agent's manifest and its output goes to the server"
          echo "%s"
`, localAgent, provider, instance, localApp, startLine)
}
