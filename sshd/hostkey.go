package sshd

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/crypto/ssh"
)

const hostKeyFile = "ssh_host_ed25519_key"

// HostKey returns the host key kept in dir, and makes a random Ed25519 one (readable by this user only) if there is none. dir is made if needed.
// Two processes that make one at the same time end up with the same key.
func HostKey(dir string) (ssh.Signer, error) {
	path := filepath.Join(dir, hostKeyFile)
	signer, err := readHostKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return signer, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the folder of the SSH host key: %w", err)
	}
	if err := writeHostKey(path); err != nil {
		return nil, fmt.Errorf("cannot write a new SSH host key: %w", err)
	}
	return readHostKey(path)
}

func readHostKey(path string) (ssh.Signer, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read the SSH host key: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("cannot read the SSH host key: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		if err := f.Chmod(0o600); err != nil {
			return nil, fmt.Errorf("cannot use the SSH host key: others may read it, and that cannot be changed: %w", err)
		}
	}
	// A key of any type is under 16 KiB.
	text := make([]byte, 16<<10)
	n, err := f.Read(text)
	if err != nil {
		return nil, fmt.Errorf("cannot read the SSH host key %s (remove it to have a new one made): %w", path, err)
	}
	signer, err := ssh.ParsePrivateKey(text[:n])
	if err != nil {
		return nil, fmt.Errorf("cannot use the SSH host key %s (remove it to have a new one made): %w", path, err)
	}
	return signer, nil
}

// writeHostKey puts a new key at path, whole or not at all, unless there is one already.
func writeHostKey(path string) error {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	block, err := ssh.MarshalPrivateKey(key, "berth")
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), hostKeyFile+".*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(pem.EncodeToMemory(block))
	if err := errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	// A link, not a rename: the first of two writers wins, and the key never changes under one that has already read it.
	if err := os.Link(tmp.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}
