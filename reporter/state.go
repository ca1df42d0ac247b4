package reporter

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/uuid"
)

// state is what the spool must remember beside its records. It lies in a file as one line with a
// checksum and one of JSON.
type state struct {
	// Boot is the machine's boot in which it was written: after another, the newest records may
	// have been lost with the power, and their numbers must not be used again.
	Boot string `json:"boot"`
	// Agent is whose lines they are; nil if nobody has said.
	Agent uuid.UUID `json:"agent"`
	// Spool is the id under which new lines are numbered.
	Spool uuid.UUID `json:"spool"`
	// Segment and Offset are where the first unacknowledged record is.
	Segment uint64 `json:"segment"`
	Offset  int64  `json:"offset"`
	// Acknowledged is the last number that the server has, per spool and source.
	Acknowledged []acknowledged `json:"acknowledged"`
}

type acknowledged struct {
	Spool    uuid.UUID `json:"spool"`
	Source   uuid.UUID `json:"source"`
	Sequence uint64    `json:"sequence"`
}

const (
	stateName = "state"
	// maxState bounds the state file: some 10,000 sources.
	maxState = 2 << 20
)

func (st state) encode() ([]byte, error) {
	body, err := json.Marshal(st)
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "%08x\n%s\n", crc32.Checksum(body, castagnoli), body), nil
}

func decodeState(b []byte) (state, error) {
	sum, body, ok := strings.Cut(string(b), "\n")
	body = strings.TrimSuffix(body, "\n")
	if !ok || sum != fmt.Sprintf("%08x", crc32.Checksum([]byte(body), castagnoli)) {
		return state{}, errors.New("its checksum does not match")
	}
	var st state
	if err := json.Unmarshal([]byte(body), &st); err != nil {
		return state{}, err
	}
	if st.Offset < 0 {
		return state{}, errors.New("its offset is negative")
	}
	return st, nil
}

func readState(dir string) (state, error) {
	file, err := os.Open(filepath.Join(dir, stateName))
	if err != nil {
		return state{}, err
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, maxState))
	if err != nil {
		return state{}, err
	}
	return decodeState(b)
}

// writeState replaces the state file. It is not fsynced: an older one after a crash makes lines be
// sent again, which the server notices.
func writeState(dir string, st state) error {
	b, err := st.encode()
	if err != nil {
		return err
	}
	path := filepath.Join(dir, stateName)
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// bootID names this boot of the machine; empty where it cannot be told.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
