package scripts

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/scripts/hold"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// patience is how long a script is held for a berthd that does not come back. The workspace is somebody's who waits for it, or is
// forgotten by then.
const patience = 24 * time.Hour

// HoldName is a name of the longest kind that there is in [Config.HoldDir].
const HoldName = holdPrefix + "01234567" + holdSuffix

const holdPrefix, holdSuffix = "script-", ".sock"

// tag is what a later process has to know of a script that is held: it may not have a manifest yet, or another.
type tag struct {
	Run     uuid.UUID
	Script  []byte // its id
	Source  uuid.UUID
	Name    string
	Stage   agentpb.Timing_Stage
	Timeout time.Duration
	Windows bool     // it has the line ends of Windows
	Secrets [][]byte // that are to be hidden in what it prints
}

func (r *Runner) tag(run *run) tag {
	s := run.script
	source, err := uuid.FromBytes(s.GetLogSourceId())
	if err != nil {
		source = uuid.Nil // its lines go to the server's source for what has none
	}
	t := tag{
		Run: run.id, Script: s.GetId(), Source: source, Name: name(s), Stage: run.stage,
		Timeout: max(s.GetTimeout().AsDuration(), 0), Windows: strings.Contains(s.GetScript(), "\r\n"),
	}
	for _, secret := range r.cfg.Mask.Secrets() {
		t.Secrets = append(t.Secrets, []byte(secret.Reveal()))
	}
	return t
}

// stream is the id by which one of the run's streams is found again.
func (t tag) stream(i int) uuid.UUID {
	id := t.Run
	id[len(id)-1] ^= byte(i)
	return id
}

// hold starts a script with a holder.
func (r *Runner) hold(s *agentpb.WorkspaceAgentScript, t tag) (*hold.Held, error) {
	spec, file, err := r.command(s, t.Source)
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(t)
	if err != nil {
		return nil, fmt.Errorf("cannot describe a script to its holder: %w", err)
	}
	cmd := spec.Cmd(context.Background())
	job := hold.Job{
		Path: cmd.Path, Args: cmd.Args, Dir: cmd.Dir, Env: cmd.Env,
		Timeout: t.Timeout, Grace: r.hangupGrace, Remove: file, Tag: text,
	}
	log := r.openLog(s, t.Source)
	credential := cmd.SysProcAttr.Credential
	if r.cfg.Holder == nil {
		ours, theirs := net.Pipe()
		r.following.Go(func() { hold.Run(job, credential, theirs, log) })
		return hold.Attach(ours)
	}
	if log != nil {
		defer log.Close()
	}
	job.Patience = patience
	job.Socket = filepath.Join(r.cfg.HoldDir, holdPrefix+t.Run.String()[:8]+holdSuffix)
	var failures []error
	for _, holder := range r.cfg.Holder() {
		held, err := hold.Start(holder, credential, job, log)
		if err == nil {
			return held, nil
		}
		failures = append(failures, err)
	}
	return nil, errors.Join(failures...)
}

// takenUp is a script that an earlier process has started.
type takenUp struct {
	tag
	ended   chan struct{} // closed when there is an outcome
	outcome outcome
}

// TakeUp follows the scripts that an earlier process has left, and returns when all are found. It is to be called once, before
// Resume, Adopt and Stop.
func (r *Runner) TakeUp() {
	var sockets []string
	err := r.cfg.Shell.Do(func() error {
		entries, err := os.ReadDir(r.cfg.HoldDir)
		for _, entry := range entries {
			if name := entry.Name(); strings.HasPrefix(name, holdPrefix) && strings.HasSuffix(name, holdSuffix) {
				sockets = append(sockets, filepath.Join(r.cfg.HoldDir, name))
			}
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.cfg.Log.Warn("cannot look for scripts that are held", "err", err)
	}
	for _, socket := range sockets {
		if err := r.takeUp(socket); err != nil {
			r.cfg.Log.Warn("cannot take up a script that is held", "socket", socket, "err", err)
		}
	}
}

func (r *Runner) takeUp(socket string) error {
	var conn net.Conn
	err := r.cfg.Shell.Do(func() (err error) {
		conn, err = net.Dial("unix", socket)
		if errors.Is(err, syscall.ECONNREFUSED) { // it was killed, or the machine was
			return os.Remove(socket)
		}
		return err
	})
	if err != nil || conn == nil {
		return err
	}
	held, err := hold.Attach(conn)
	if err != nil {
		return err
	}
	taken := &takenUp{ended: make(chan struct{})}
	if err := json.Unmarshal(held.State.Tag, &taken.tag); err != nil {
		held.Close()
		return fmt.Errorf("cannot read what script it is: %w", err)
	}
	if r.cfg.Mask != nil {
		for _, secret := range taken.Secrets {
			r.cfg.Mask.Add(wire.Secret(secret))
		}
	}
	r.cfg.Log.Info("a script goes on that an earlier berthd has started", "script", taken.Name)
	r.mu.Lock()
	r.taken = append(r.taken, taken)
	r.mu.Unlock()
	r.beside(func() {
		defer close(taken.ended)
		taken.outcome = r.follow(r.running, held, taken.tag, func() {})
	})
	return nil
}

// heldAs returns the script that was taken up and is meant; nil if there is none.
func (r *Runner) heldAs(meant func(tag) bool) *takenUp {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.taken {
		if meant(t.tag) {
			return t
		}
	}
	return nil
}

// heldCron returns the run of a cron script that was taken up.
func (r *Runner) heldCron(s *agentpb.WorkspaceAgentScript) *takenUp {
	return r.heldAs(func(t tag) bool { return t.Stage == agentpb.Timing_CRON && bytes.Equal(t.Script, s.GetId()) })
}
