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

// state is what the spool must remember beside its records.
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
	// Taken tells how many bytes of each stream that has not ended have been taken. Records behind Offset may know more.
	Taken []taken `json:"taken,omitempty"`
}

type taken struct {
	Stream uuid.UUID `json:"stream"`
	Offset uint64    `json:"offset"`
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
	// maxTaken is how many streams are taken over from an earlier process: a stream that it did not see end stays there.
	maxTaken = 1024
)

func decodeState(b []byte) (state, error) {
	var st state
	if err := decodeNote(b, &st); err != nil {
		return state{}, err
	}
	if st.Offset < 0 {
		return state{}, errors.New("its offset is negative")
	}
	return st, nil
}

func readState(dir string) (state, error) {
	b, err := readNote(filepath.Join(dir, stateName), maxState)
	if err != nil {
		return state{}, err
	}
	return decodeState(b)
}

// writeState replaces the state file. It is not fsynced: an older one after a crash makes lines be
// sent again, which the server notices.
func writeState(dir string, st state) error {
	return writeNote(filepath.Join(dir, stateName), st)
}

// A note is a small file that is replaced as a whole: one line with a checksum and one of JSON.

func encodeNote(v any) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "%08x\n%s\n", crc32.Checksum(body, castagnoli), body), nil
}

func decodeNote(b []byte, v any) error {
	sum, body, ok := strings.Cut(string(b), "\n")
	body = strings.TrimSuffix(body, "\n")
	if !ok || sum != fmt.Sprintf("%08x", crc32.Checksum([]byte(body), castagnoli)) {
		return errors.New("its checksum does not match")
	}
	return json.Unmarshal([]byte(body), v)
}

// readNote reads at most limit bytes; a longer file fails its checksum.
func readNote(path string, limit int64) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(io.LimitReader(file, limit))
}

// writeNote replaces the file in one step, without an fsync.
func writeNote(path string, v any) error {
	b, err := encodeNote(v)
	if err != nil {
		return err
	}
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
