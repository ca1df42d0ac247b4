package reporter

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/google/uuid"
)

// maxShelf bounds what is read of a shelf. 1,024 statuses with the longest link take 3 MiB.
const maxShelf = 8 << 20

// shelved is what a shelf holds.
type shelved struct {
	// Agent is whose reports they are; nil if nobody has said.
	Agent   uuid.UUID       `json:"agent"`
	Reports []shelvedReport `json:"reports"`
}

type shelvedReport struct {
	Key  string `json:"key,omitempty"`
	Body []byte `json:"body"` // a protobuf message
}

// shelf is a file that holds the reports of one lane which the server does not have yet. It is replaced with
// each change, in one step, and is not there while nothing waits.
type shelf struct {
	path  string
	name  string // of the reports, for the log
	log   *slog.Logger
	dirty chan struct{} // gets a token when there is something to fsync

	mu      sync.Mutex // held while the file is written
	written uint64     // which change of the lane the file has
	synced  uint64     // which one an fsync has seen
	refused bool       // the disk refused, and that was said
}

func newShelf(dir, file, name string, log *slog.Logger, dirty chan struct{}) *shelf {
	return &shelf{path: filepath.Join(dir, file+".reports"), name: name, log: log, dirty: dirty}
}

// read returns what an earlier process left.
func (s *shelf) read() (content shelved) {
	b, err := readNote(s.path, maxShelf)
	if err == nil {
		err = decodeNote(b, &content)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("reports that berthd left are damaged; they are dropped", "reports", s.name, "file", s.path, "err", err)
		return shelved{}
	}
	return content
}

// write replaces the file by what current returns: the lane's content and which change that is, given
// which one the file has.
func (s *shelf) write(current func(written uint64) (shelved, uint64)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	content, change := current(s.written)
	if change == s.written {
		return
	}
	if err := s.replace(content); err != nil {
		if !s.refused {
			s.log.Warn("reports cannot be kept on disk: those that the server does not have are lost should berthd be killed",
				"reports", s.name, "err", err)
		}
		s.refused = true
		return
	}
	s.written, s.refused = change, false
	notify(s.dirty)
}

// replace leaves no older content where it fails, as far as the disk lets it: an old status must not come
// back as if it were new. What that frees may be what a full disk lacks.
func (s *shelf) replace(content shelved) error {
	if len(content.Reports) > 0 && writeNote(s.path, content) == nil {
		return nil
	}
	if err := os.Remove(s.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if len(content.Reports) == 0 {
		return nil
	}
	return writeNote(s.path, content)
}

// sync makes the file survive a loss of power. Reports come in meanwhile: a slow disk holds up nobody.
func (s *shelf) sync() {
	s.mu.Lock()
	written, synced := s.written, s.synced
	s.mu.Unlock()
	if synced == written {
		return
	}
	file, err := os.Open(s.path)
	if err == nil {
		err = errors.Join(file.Sync(), file.Close())
	} else if errors.Is(err, fs.ErrNotExist) {
		err = nil // all was delivered
	}
	if err = errors.Join(err, syncDir(filepath.Dir(s.path))); err != nil {
		s.log.Warn("cannot fsync reports", "reports", s.name, "err", err)
		return
	}
	s.mu.Lock()
	s.synced = written
	s.mu.Unlock()
}
