// Package mask hides secrets by their values in what leaves a workspace: logs, statuses, metadata.
//
// Tell a [Masker] the secrets with [Masker.Add]; [Masker.Bytes] and [Masker.String] put [Hidden] wherever one of
// them stands. They are found as they are, not as base64, escaped or cut in pieces.
package mask

import (
	"bytes"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/berthd/berth/wire"
)

const (
	// Hidden stands for a secret. It is no longer than what it stands for, so that a text which fits its limit
	// still does.
	Hidden = "[hidden]"
	// MinLength is how many bytes a value must have to be hidden: shorter ones ("true", "admin", a port) stand in
	// innocent text too often.
	MinLength = len(Hidden)
	// maxKept is how many values are remembered, the newest: far more than a workspace has. An old value may still
	// be somebody's password, so it is forgotten only for want of room.
	maxKept = 4096
)

// Masker knows secrets. Its methods may be called at the same time; a nil Masker knows none.
type Masker struct {
	mu    sync.Mutex // held while known is changed
	known []string   // oldest first
	index atomic.Pointer[index]
}

// index has the secrets by their first byte, longest first.
type index [256][]string

// New returns a masker that knows the secrets.
func New(secrets ...wire.Secret) *Masker {
	m := &Masker{}
	m.Add(secrets...)
	return m
}

// Add makes secrets known. Of one with several lines each is hidden by itself, because output is passed on line by
// line; those shorter than [MinLength] are not.
func (m *Masker) Add(secrets ...wire.Secret) {
	m.mu.Lock()
	defer m.mu.Unlock()
	changed := false
	for _, secret := range secrets {
		for line := range strings.FieldsFuncSeq(secret.Reveal(), func(r rune) bool { return r == '\n' || r == '\r' }) {
			if line = strings.TrimSpace(line); len(line) >= MinLength && !slices.Contains(m.known, line) {
				m.known = append(m.known, line)
				changed = true
			}
		}
	}
	if !changed {
		return
	}
	m.known = m.known[max(0, len(m.known)-maxKept):]
	next := &index{}
	for _, secret := range m.known {
		next[secret[0]] = append(next[secret[0]], secret)
	}
	for _, same := range next {
		slices.SortFunc(same, func(a, b string) int { return len(b) - len(a) })
	}
	m.index.Store(next)
}

// Secrets returns what is hidden.
func (m *Masker) Secrets() []wire.Secret {
	if m == nil {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	secrets := make([]wire.Secret, len(m.known))
	for i, known := range m.known {
		secrets[i] = wire.Secret(known)
	}
	return secrets
}

// Bytes returns text with its secrets hidden; text itself, which it does not change, if there are none.
func (m *Masker) Bytes(text []byte) []byte {
	at := m.secrets()
	if at == nil {
		return text
	}
	var shown []byte
	from := 0
	for i := 0; i < len(text); {
		candidates := at[text[i]]
		if candidates == nil {
			i++
			continue
		}
		length := 0
		for _, secret := range candidates {
			if len(text)-i >= len(secret) && text[i+1] == secret[1] && string(text[i:i+len(secret)]) == secret {
				length = len(secret)
				break
			}
		}
		if length == 0 {
			i++
			continue
		}
		shown = append(append(shown, text[from:i]...), Hidden...)
		i += length
		from = i
	}
	if shown == nil {
		return text
	}
	return append(shown, text[from:]...)
}

// String is [Masker.Bytes] for strings.
func (m *Masker) String(text string) string { return string(m.Bytes([]byte(text))) }

// Copy copies src to dst with the secrets hidden, some tens of kilobytes at a time.
func (m *Masker) Copy(dst io.Writer, src io.Reader) error {
	buf := make([]byte, 64<<10)
	var held []byte // may be the beginning of a secret
	for {
		n, err := src.Read(buf)
		text := m.Bytes(append(held, buf[:n]...))
		keep := 0
		if err == nil {
			keep = m.Begun(text)
		}
		if _, err := dst.Write(text[:len(text)-keep]); err != nil {
			return err
		}
		held = bytes.Clone(text[len(text)-keep:])
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// Begun returns how many bytes at the end of text may be the beginning of a secret. Whoever cuts a text is to leave
// them out.
func (m *Masker) Begun(text []byte) int {
	at := m.secrets()
	if at == nil {
		return 0
	}
	longest := 0
	for _, same := range at {
		for _, secret := range same {
			for n := min(len(secret)-1, len(text)); n > longest; n-- {
				if bytes.HasSuffix(text, []byte(secret[:n])) {
					longest = n
				}
			}
		}
	}
	return longest
}

func (m *Masker) secrets() *index {
	if m == nil {
		return nil
	}
	return m.index.Load()
}
