package agent

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/account"
	"github.com/berthd/berth/oom"
	"github.com/berthd/berth/shell"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// The states of a dev container that are known here.
const (
	devcontainerRunning  = "running"
	devcontainerStopped  = "stopped"
	devcontainerStarting = "starting"
	devcontainerError    = "error"
)

// Labels that the devcontainer command puts on the containers it makes.
const (
	labelFolder  = "devcontainer.local_folder"
	labelConfig  = "devcontainer.config_file"
	labelTestRun = "devcontainer.is_test_run"
)

// devcontainerSpace is the namespace of the ids of dev containers that the manifest does not declare:
// an id follows from the folder and the configuration, and is the same after a restart.
var devcontainerSpace = uuid.MustParse("b6f9e0b7-1a35-5d0c-9f0e-6d0d5f7c7a11")

var (
	// errTransitioning refuses what cannot be done while a dev container is being made.
	errTransitioning = errors.New("the dev container is being made already")
	errNoCommand     = errors.New("the devcontainer command is not in PATH: install it in the workspace (npm install -g @devcontainers/cli)")
)

// recreateLimit bounds one run of the devcontainer command. Building a large image takes half an hour.
const recreateLimit = 2 * time.Hour

// containerView shows the containers beside the agent, and which of them are the workspace's dev
// containers.
type containerView struct {
	// refusal says why nothing is shown; "" shows all.
	refusal  string
	list     func(context.Context) (wire.Containers, error)
	watch    func() (changed <-chan struct{}, stop func())
	manifest func() *agentpb.Manifest
	expand   func(path, base string) string
	home     func() string
	user     *account.User // who must be able to see a configuration for it to count
	command  func(line string, clientEnv []string) (shell.Spec, error)
	logs     func(source uuid.UUID, level agentpb.Log_Level) io.WriteCloser
	log      *slog.Logger

	mu      sync.Mutex
	ctx     context.Context // bounds what recreate has started; nil before run
	runs    map[uuid.UUID]recreation
	changed chan struct{} // closed at the next change that is not an engine's
	work    sync.WaitGroup
}

// recreation is the last that is known of making a dev container anew.
type recreation struct {
	active bool
	failed string // why it failed
}

// run lets recreate start commands until ctx is done, and then waits for their end.
func (v *containerView) run(ctx context.Context) error {
	v.mu.Lock()
	v.ctx = ctx
	v.mu.Unlock()
	<-ctx.Done()
	v.work.Wait()
	return nil
}

// get lists the containers and the dev containers.
func (v *containerView) get(ctx context.Context) (wire.Containers, error) {
	list, err := v.list(ctx)
	if err != nil {
		return wire.Containers{}, err
	}
	list.Devcontainers = v.devcontainers(list.Containers)
	return list, nil
}

// devcontainers returns those that the manifest declares, and those whose container was made from a
// configuration that lies on this machine: a label alone anybody can write.
func (v *containerView) devcontainers(containers []wire.Container) []wire.Devcontainer {
	found := []wire.Devcontainer{}
	for _, d := range v.manifest().GetDevcontainers() {
		folder := v.expand(d.GetWorkspaceFolder(), v.home())
		found = append(found, wire.Devcontainer{
			ID: optionalID(d.GetId()), Name: cmp.Or(d.GetName(), devcontainerName(folder)),
			WorkspaceFolder: folder, ConfigPath: v.expand(d.GetConfigPath(), folder),
		})
	}
	for _, c := range containers {
		folder, config := c.Labels[labelFolder], c.Labels[labelConfig]
		if folder == "" || config == "" || c.Labels[labelTestRun] == "true" {
			continue
		}
		at := -1
		for i, d := range found {
			if d.WorkspaceFolder == folder && (d.ConfigPath == "" || d.ConfigPath == config) {
				at = i
			}
		}
		if at < 0 {
			if info, err := v.stat(config); err != nil || !info.Mode().IsRegular() {
				continue
			}
			at = len(found)
			found = append(found, wire.Devcontainer{
				ID:   uuid.NewSHA1(devcontainerSpace, []byte(folder+"\x00"+config)),
				Name: devcontainerName(folder), WorkspaceFolder: folder, ConfigPath: config,
			})
		}
		if d := &found[at]; d.Container == nil || better(c, *d.Container) {
			d.Container, d.ConfigPath = &c, config
		}
	}
	for i := range found {
		v.describe(&found[i])
	}
	return found
}

// stat looks at a file that a label names.
func (v *containerView) stat(path string) (info os.FileInfo, err error) {
	err = v.user.Do(func() error {
		info, err = os.Stat(path)
		return err
	})
	return info, err
}

// better tells which of two containers of one dev container is meant: one that runs, then the newer.
func better(x, y wire.Container) bool {
	if x.Running != y.Running {
		return x.Running
	}
	return x.CreatedAt.After(y.CreatedAt)
}

// describe fills in the state.
func (v *containerView) describe(d *wire.Devcontainer) {
	d.Status = devcontainerStopped
	if d.Container != nil {
		if d.Container.Running {
			d.Status = devcontainerRunning
		}
		info, err := v.stat(d.ConfigPath)
		d.Dirty = err == nil && info.ModTime().After(d.Container.CreatedAt)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	switch r := v.runs[d.ID]; {
	case r.active:
		d.Status = devcontainerStarting
	case r.failed != "":
		d.Status, d.Error = devcontainerError, r.failed
	}
}

// devcontainerName makes a name of a folder's: at most 64 lower case letters and digits, with dashes
// for all else.
func devcontainerName(folder string) string {
	name := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, strings.ToLower(filepath.Base(folder)))
	name = strings.Trim(name[:min(len(name), 64)], "-")
	return cmp.Or(name, "devcontainer")
}

// changes returns a channel that is closed when a dev container's state changes by our doing.
func (v *containerView) changes() <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.changed == nil {
		v.changed = make(chan struct{})
	}
	return v.changed
}

// set notes how the recreation of a dev container stands.
func (v *containerView) set(id uuid.UUID, r recreation) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.setLocked(id, r)
}

func (v *containerView) setLocked(id uuid.UUID, r recreation) {
	if v.runs == nil {
		v.runs = make(map[uuid.UUID]recreation)
	}
	v.runs[id] = r
	if v.changed != nil {
		close(v.changed)
		v.changed = nil
	}
}

// recreate begins to make a dev container anew with the workspace's devcontainer command.
func (v *containerView) recreate(d wire.Devcontainer) error {
	spec, err := v.command("", nil)
	if err != nil {
		return err
	}
	spec.Argv = []string{"devcontainer", "up", "--log-format", "json", "--workspace-folder", d.WorkspaceFolder}
	if d.ConfigPath != "" {
		spec.Argv = append(spec.Argv, "--config", d.ConfigPath)
	}
	spec.Argv = append(spec.Argv, "--remove-existing-container")

	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case v.ctx == nil || v.ctx.Err() != nil:
		return errStopping
	case v.runs[d.ID].active:
		return errTransitioning
	case !spec.Installed():
		return errNoCommand
	}
	v.setLocked(d.ID, recreation{active: true})
	ctx := v.ctx
	v.work.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, recreateLimit)
		defer cancel()
		v.log.Info("recreating a dev container", "name", d.Name, "folder", d.WorkspaceFolder)
		var done recreation
		if err := v.up(ctx, d, spec); err != nil {
			v.log.Warn("cannot recreate a dev container", "name", d.Name, "error", err)
			done.failed = err.Error()
		}
		v.set(d.ID, done)
	})
	return nil
}

// up runs the devcontainer command. What it says goes to the log source of the dev container, which is
// that of the script with the same id.
func (v *containerView) up(ctx context.Context, d wire.Devcontainer, spec shell.Spec) error {
	cmd := spec.Cmd(ctx)
	cmd.WaitDelay = serviceBudget / 2 // a stop waits for it
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("cannot run devcontainer up: %w", err)
	}
	says := v.logOf(d.ID)
	defer says.Close()
	log := &devcontainerLog{to: says}
	cmd.Stderr = log
	if err := oom.Start(cmd); err != nil {
		return fmt.Errorf("cannot run devcontainer up: %w", err)
	}
	outcome := readOutcome(out)
	err = shell.Wait(cmd)
	switch {
	case outcome.Outcome == "success" && err == nil:
		return nil
	case outcome.problem() != "":
		return fmt.Errorf("devcontainer up failed: %s", outcome.problem())
	case err != nil:
		return fmt.Errorf("devcontainer up failed: %w", err)
	}
	return errors.New("devcontainer up did not say how it ended")
}

func (v *containerView) logOf(id uuid.UUID) io.WriteCloser {
	for _, s := range v.manifest().GetScripts() {
		if optionalID(s.GetId()) == id {
			return v.logs(optionalID(s.GetLogSourceId()), agentpb.Log_INFO)
		}
	}
	return nopCloser{io.Discard}
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// devcontainerOutcome is the last line of the devcontainer command's output.
type devcontainerOutcome struct {
	Outcome     string `json:"outcome"`
	Message     string `json:"message"`
	Description string `json:"description"`
}

func (o devcontainerOutcome) problem() string {
	if o.Outcome == "success" {
		return ""
	}
	return strings.Trim(o.Message+": "+o.Description, ": ")
}

// maxOutputLine bounds a line of the devcontainer command that is looked at.
const maxOutputLine = 1 << 20

// readOutcome reads to the end of a command's output and returns its last JSON line.
func readOutcome(r io.Reader) devcontainerOutcome {
	var last devcontainerOutcome
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxOutputLine)
	for lines.Scan() {
		var o devcontainerOutcome
		if json.Unmarshal(lines.Bytes(), &o) == nil && o.Outcome != "" {
			last = o
		}
	}
	_, _ = io.Copy(io.Discard, r) // a longer line ended the scan; the command must not block on its rest
	return last
}

// devcontainerLog passes on what the devcontainer command has to say to people: of its JSON lines the
// text of those with a level of at least 3, and lines that are no JSON as they are.
type devcontainerLog struct {
	to      io.Writer
	pending []byte
}

// Write implements io.Writer.
func (l *devcontainerLog) Write(p []byte) (int, error) {
	for _, b := range p {
		if b != '\n' {
			if len(l.pending) < maxOutputLine {
				l.pending = append(l.pending, b)
			}
			continue
		}
		l.line(l.pending)
		l.pending = l.pending[:0]
	}
	return len(p), nil
}

func (l *devcontainerLog) line(line []byte) {
	var said struct {
		Level int    `json:"level"`
		Text  string `json:"text"`
	}
	text := string(line)
	if json.Unmarshal(line, &said) == nil {
		if said.Level < 3 || said.Text == "" {
			return
		}
		text = said.Text
	}
	// Logs are kept best as they can be: a full spool says so itself.
	_, _ = io.WriteString(l.to, strings.TrimRight(text, "\r\n")+"\n")
}
