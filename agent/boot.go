package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	"github.com/berthd/berth/scripts"
	"github.com/berthd/berth/wire/agentpb"
)

// bootID names this boot of the workspace: the kernel's boot, and the start of process 1, which is
// what starts anew with a container. It returns "" where the system does not tell.
func bootID() string {
	kernel, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	stat, err := os.ReadFile("/proc/1/stat")
	if err != nil {
		return ""
	}
	// The command in parentheses may hold spaces; the start time is field 22, the 20th after it.
	_, rest, ok := bytes.Cut(stat, []byte(") "))
	fields := bytes.Fields(rest)
	if !ok || len(fields) < 20 {
		return ""
	}
	return fmt.Sprintf("%s-%s", bytes.TrimSpace(kernel), fields[19])
}

// startup is what is remembered about the start scripts, so that a berthd that was restarted within
// one boot does not run them a second time.
type startup struct {
	Boot    string    `json:"boot"`
	AgentID uuid.UUID `json:"agent_id"`
	// Outcome is the lifecycle state they ended in, as in "READY"; "" while they run.
	Outcome string `json:"outcome,omitempty"`
	// Progress is how far they are while they run; an older berthd did not note it.
	Progress *scripts.Progress `json:"progress,omitempty"`
}

const startupFile = "startup.json"

// loadStartup returns what the last berthd left for this boot and agent, and false if it left nothing.
func loadStartup(s *State, boot string, id uuid.UUID) (startup, bool) {
	var last startup
	data, err := os.ReadFile(s.Path(startupFile))
	if err != nil || boot == "" || json.Unmarshal(data, &last) != nil {
		return startup{}, false
	}
	return last, last.Boot == boot && last.AgentID == id
}

// save replaces the note.
func (u startup) save(s *State) error {
	data, err := json.Marshal(u)
	if err != nil {
		return fmt.Errorf("cannot note that start scripts ran: %w", err)
	}
	if err := s.replace(startupFile, data); err != nil {
		return fmt.Errorf("cannot note that start scripts ran: %w", err)
	}
	return nil
}

// manifestFile holds the manifest in force, for a berthd that is told to stop before it has met its server again.
const manifestFile = "manifest"

// saveManifest notes a manifest, without its secrets: they are not to lie on the disk.
func saveManifest(s *State, m *agentpb.Manifest) error {
	m = proto.CloneOf(m)
	m.Secrets = nil
	data, err := proto.Marshal(m)
	if err != nil {
		return fmt.Errorf("cannot note the manifest: %w", err)
	}
	if err := s.replace(manifestFile, data); err != nil {
		return fmt.Errorf("cannot note the manifest: %w", err)
	}
	return nil
}

// loadManifest returns the manifest that was noted; false if there is none that can be read.
func loadManifest(s *State) (*agentpb.Manifest, bool) {
	data, err := os.ReadFile(s.Path(manifestFile))
	m := &agentpb.Manifest{}
	return m, err == nil && proto.Unmarshal(data, m) == nil
}

// forgetStartup drops the note: the workspace was stopped, and starts anew next time.
func forgetStartup(s *State) error {
	if err := os.Remove(s.Path(startupFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot forget that start scripts ran: %w", err)
	}
	return nil
}

// state returns the lifecycle state that the note stands for. Scripts that were cut off by a crash
// of berthd count as failed: nobody knows how they ended.
func (u startup) state() agentpb.Lifecycle_State {
	if v, ok := agentpb.Lifecycle_State_value[u.Outcome]; ok && v != 0 {
		return agentpb.Lifecycle_State(v)
	}
	return agentpb.Lifecycle_START_ERROR
}
