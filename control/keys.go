package control

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
)

// A person's key is "<10 characters>-<22 characters>": the first part finds its record, the second,
// 130 random bits, is what must be known.
const (
	keyIDLength     = 10
	keySecretLength = 22
	keyAlphabet     = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)

var keyPattern = regexp.MustCompile(`^([0-9A-Za-z]{10})-[0-9A-Za-z]{22}$`)

// adminKeyFile, in the data directory, holds the first admin key, readable by its owner only.
const adminKeyFile = "admin-key"

// identify reads, or makes at the first start, what this deployment is known by: its id, the key it
// signs resume tokens with, and the first admin key.
func (s *Server) identify(ctx context.Context) error {
	id, err := s.store.Once(ctx, "id", func() ([]byte, error) {
		id, err := uuid.NewRandom()
		return id[:], err
	})
	if err != nil {
		return err
	}
	if s.id, err = uuid.FromBytes(id); err != nil {
		return fmt.Errorf("cannot decode the id of this deployment: %w", err)
	}
	s.resumeKey, err = s.store.Once(ctx, "resume-key", func() ([]byte, error) {
		key := make([]byte, sha256.Size)
		_, err := rand.Read(key)
		return key, err
	})
	if err != nil {
		return err
	}
	return s.firstKey(ctx)
}

func (s *Server) firstKey(ctx context.Context) error {
	path := ""
	if s.config.DataDir != "" {
		path = filepath.Join(s.config.DataDir, adminKeyFile)
	}
	has, err := s.store.HasKeys(ctx)
	if err != nil {
		return err
	}
	if has {
		return s.readAdminKey(ctx, path)
	}
	key, err := randomKey()
	if err != nil {
		return err
	}
	// The file comes first: a key that is known to the server and to nobody else would lock people out.
	if path != "" {
		if err := os.MkdirAll(s.config.DataDir, 0o700); err != nil {
			return fmt.Errorf("cannot keep the admin key: %w", err)
		}
		if err := writeFile(path, []byte(key.Reveal()+"\n")); err != nil {
			return fmt.Errorf("cannot keep the admin key: %w", err)
		}
	}
	err = s.store.CreateKey(ctx, key.Reveal()[:keyIDLength], store.Key{
		Name: "admin", CreatedAt: time.Now().UTC(), Hash: hashKey(key),
	})
	if err != nil {
		return err
	}
	s.adminKey = key
	if path == "" {
		s.log.Info("made the first admin key; it lives in memory only")
	} else {
		s.log.Info("made the first admin key", "file", path)
	}
	return nil
}

// readAdminKey takes the key from its file if it is there and still good.
func (s *Server) readAdminKey(ctx context.Context, path string) error {
	if path == "" {
		return nil
	}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot read the admin key: %w", err)
	}
	key := wire.Secret(bytes.TrimSpace(text))
	if _, err := s.user(ctx, key); err == nil {
		s.adminKey = key
	}
	return nil
}

// writeFile replaces a file at once, for its owner only, and has it on disk when it returns.
func writeFile(path string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

func randomKey() (wire.Secret, error) {
	text := make([]byte, 0, keyIDLength+1+keySecretLength)
	for len(text) < cap(text) {
		if len(text) == keyIDLength {
			text = append(text, '-')
			continue
		}
		var b [1]byte
		if _, err := rand.Read(b[:]); err != nil {
			return "", fmt.Errorf("cannot make a key: %w", err)
		}
		if c := b[0] & 63; int(c) < len(keyAlphabet) { // no modulo: every character is as likely
			text = append(text, keyAlphabet[c])
		}
	}
	return wire.Secret(text), nil
}

func hashKey(key wire.Secret) string {
	sum := sha256.Sum256([]byte(key.Reveal()))
	return hex.EncodeToString(sum[:])
}

// errSignedOut is why a person's key is not good; its text may be shown.
type errSignedOut string

func (e errSignedOut) Error() string { return string(e) }

// user returns the key record of a person, or errSignedOut.
func (s *Server) user(ctx context.Context, key wire.Secret) (store.Key, error) {
	if key == "" {
		return store.Key{}, errSignedOut(fmt.Sprintf("Cookie %q or query parameter must be provided.", wire.CookieSessionToken))
	}
	match := keyPattern.FindStringSubmatch(key.Reveal())
	if match == nil {
		return store.Key{}, errSignedOut("Invalid API key format: expected <id>-<secret>.")
	}
	record, err := s.store.Key(ctx, match[1])
	if errors.Is(err, store.ErrNotFound) {
		return store.Key{}, errSignedOut("API key is invalid.")
	}
	if err != nil {
		return store.Key{}, err
	}
	if subtle.ConstantTimeCompare([]byte(record.Hash), []byte(hashKey(key))) != 1 {
		return store.Key{}, errSignedOut("API key is invalid.")
	}
	return record, nil
}
