package identity

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// maxProofKey in bytes; a file that we wrote has 119.
const maxProofKey = 4 << 10

// loadProofKey returns the Ed25519 key kept at path, readable by this user only, and makes a random
// one if there is none. Two processes that make one at the same time end up with the same key.
func loadProofKey(path string) (ed25519.PrivateKey, error) {
	key, err := readProofKey(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err = writeProofKey(path); err == nil {
			key, err = readProofKey(path)
		}
	}
	if err != nil {
		return nil, &Failure{
			Cause: fmt.Sprintf("the proof key of this machine cannot be used: %v", err),
			Fix: fmt.Sprintf("make %s a directory with room that user %d may write to. If the key is damaged, remove it: "+
				"another is made, which the server takes once it has been told to forget this machine's", filepath.Dir(path), os.Getuid()),
			err: err,
		}
	}
	return key, nil
}

func readProofKey(path string) (ed25519.PrivateKey, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		if err := f.Chmod(0o600); err != nil {
			return nil, fmt.Errorf("others may read it, and that cannot be changed: %w", err)
		}
	}
	text, err := io.ReadAll(io.LimitReader(f, maxProofKey))
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, fmt.Errorf("%s holds no PEM block", path)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s holds no private key: %w", path, err)
	}
	key, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s holds a %T, not an Ed25519 key", path, parsed)
	}
	return key, nil
}

// writeProofKey puts a new key at path, whole or not at all, unless there is one already.
func writeProofKey(path string) error {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	if err := errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	// A link, not a rename: the first of two writers wins, and the key never changes under one that has already read it.
	if err := os.Link(tmp.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}
