package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/berthd/berth/oom"
	"github.com/berthd/berth/scripts/hold"
	"github.com/berthd/berth/shell"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

const (
	// metadataTick is how often it is looked at what is due. Intervals are whole ticks.
	metadataTick = time.Second
	// defaultMetadataTimeout bounds a script that has neither a timeout nor an interval.
	defaultMetadataTimeout = 3 * time.Second
	// maxMetadataOutput is how much of what a script prints is kept; the protocol's figure.
	maxMetadataOutput = 10240
	// metadataGrace is what a script gets to end once it is hung up, and what its output may stay open
	// once it has ended, before whatever is left of it is killed.
	metadataGrace = time.Second
)

// metadataCollector runs the metadata scripts of a manifest when they are due, and hands over what
// they print.
type metadataCollector struct {
	descriptions []*agentpb.WorkspaceAgentMetadata_Description
	command      func(line string, env []string) (shell.Spec, error)
	report       func(key string, result *agentpb.WorkspaceAgentMetadata_Result)
	log          *slog.Logger
}

// metadataItem is one description as it is followed.
type metadataItem struct {
	*agentpb.WorkspaceAgentMetadata_Description
	every, due int64 // in ticks
	busy       atomic.Bool
}

// run collects until ctx is done and no script runs any more.
func (m metadataCollector) run(ctx context.Context) error {
	var items []*metadataItem
	for _, d := range m.descriptions {
		if len(d.GetKey()) > wire.MaxMetadataKeys {
			m.log.Warn("a piece of metadata is not collected: its key is too long", "key", d.GetKey()[:64]+"…", "limit", wire.MaxMetadataKeys)
			continue
		}
		every := metadataSeconds(d.GetInterval())
		if every == 0 {
			every = math.MaxInt64 / 2 // once
		}
		items = append(items, &metadataItem{WorkspaceAgentMetadata_Description: d, every: every})
	}
	if len(items) == 0 {
		return ended(ctx)
	}
	var running sync.WaitGroup
	defer running.Wait()
	ticker := time.NewTicker(metadataTick)
	defer ticker.Stop()
	for now := int64(0); ; now++ {
		for _, item := range items {
			if now < item.due || !item.busy.CompareAndSwap(false, true) {
				continue
			}
			item.due = now + item.every
			running.Go(func() {
				defer item.busy.Store(false)
				m.collect(ctx, item.WorkspaceAgentMetadata_Description)
			})
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}

// metadataSeconds reads an interval or timeout of a description: the protocol carries seconds in the
// place of nanoseconds. Anything below none is none.
func metadataSeconds(d *durationpb.Duration) int64 {
	// A century is as good as for ever, and leaves room to count with.
	return min(max(int64(d.AsDuration()), 0), 100*365*24*3600)
}

// metadataTimeout is how long one run may take.
func metadataTimeout(d *agentpb.WorkspaceAgentMetadata_Description) time.Duration {
	for _, limit := range []*durationpb.Duration{d.GetTimeout(), d.GetInterval()} {
		if s := metadataSeconds(limit); s > 0 {
			return time.Duration(s) * time.Second
		}
	}
	return defaultMetadataTimeout
}

// collect runs one script and reports what it printed, and what went wrong.
func (m metadataCollector) collect(ctx context.Context, d *agentpb.WorkspaceAgentMetadata_Description) {
	limited, cancel := context.WithTimeout(ctx, metadataTimeout(d))
	defer cancel()
	began := time.Now()
	value, err := m.output(limited, d.GetScript())
	if ctx.Err() != nil {
		return // cut off, which says nothing about the script
	}
	result := &agentpb.WorkspaceAgentMetadata_Result{CollectedAt: timestamppb.New(began), Value: wire.Text(strings.TrimSpace(value))}
	if err != nil {
		result.Error = wire.Text(err.Error())
	}
	m.report(d.GetKey(), result)
}

// output runs a script as an SSH command would be, with nothing to read, and returns what it printed.
// Nothing of it is left when output returns. Its errors are worded as stock agents word them.
func (m metadataCollector) output(ctx context.Context, script string) (string, error) {
	spec, err := m.command(script, nil)
	if err != nil {
		return "", fmt.Errorf("create cmd: %w", err)
	}
	var out headBuffer
	cmd := spec.Cmd(ctx)
	var tree *hold.Tree // all that came of it, also what has left its session; known while it runs
	cmd.Cancel = func() error {
		tree = hold.NewTree(cmd.Process.Pid)
		tree.Signal(syscall.SIGHUP)
		return nil
	}
	cmd.WaitDelay = metadataGrace
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := oom.Start(cmd); err != nil {
		return "", fmt.Errorf("start cmd: %w", err)
	}
	err = shell.Wait(cmd)
	if tree != nil {
		tree.Kill()
	} else {
		_ = shell.Signal(cmd.Process, syscall.SIGKILL) // what it left in the background
	}
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	if late := ctx.Err(); late != nil && !errors.Is(err, late) {
		err = errors.Join(err, late)
	}
	if err != nil {
		err = fmt.Errorf("run cmd: %w", err)
	}
	if out.size > maxMetadataOutput {
		err = errors.Join(err, fmt.Errorf("output truncated from %d to %d bytes", out.size, maxMetadataOutput))
	}
	return string(out.head), err
}

// headBuffer keeps the first maxMetadataOutput bytes and counts all.
type headBuffer struct {
	head []byte
	size int64
}

func (b *headBuffer) Write(p []byte) (int, error) {
	b.size += int64(len(p))
	b.head = append(b.head, p[:min(len(p), maxMetadataOutput-len(b.head))]...)
	return len(p), nil
}
