// Package service installs berthd as a service of systemd, and takes it away again.
//
// [System] and [User] say where things belong. [Service.Install] and [Service.Uninstall] look at what is there and return a [Plan], which a
// person can read ([Plan.Show]) before it is carried out ([Plan.Do]). Nothing is changed before that, and what is as it should be is in no plan.
package service

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// UnitName is what systemd knows berthd by.
const UnitName = "berthd.service"

// TokenFile is the variable that names the token's file where credentials cannot be had.
const TokenFile = "BERTH_TOKEN_FILE"

// credential is the name that the unit has for the token.
const credential = "agent-token"

// Versions of systemd, by what they brought.
const (
	withEncryption = 250 // systemd-creds
	withStore      = 252 // credentials are looked for in /etc/credstore
)

// ErrNoSystemd tells that this machine was not started by systemd.
var ErrNoSystemd = errors.New("systemd does not run here")

// Service is a berthd that systemd starts: where its parts belong, and how systemd is spoken to.
type Service struct {
	root string // of a system that is not running; empty: this one
	user bool   // of a user's own systemd

	programs string // directory
	unit     string
	config   string   // directory
	kept     []string // directories of state and logs
	version  int      // of systemd
}

// System returns the service of a machine. With a root it is that of the system whose files are there, and which does not run: nothing is
// started. The error is [ErrNoSystemd] where there is none.
func System(ctx context.Context, root string) (*Service, error) {
	s := &Service{
		root: root, programs: filepath.Join(root, "/usr/local/bin"), unit: filepath.Join(root, "/etc/systemd/system", UnitName), config: filepath.Join(root, "/etc/berthd"),
		kept: []string{filepath.Join(root, "/var/lib/berthd"), filepath.Join(root, "/var/log/berthd")},
	}
	return s, s.findSystemd(ctx)
}

// User returns the service of the user that this process runs as, with their home, configuration (~/.config) and state (~/.local/state). The
// error is [ErrNoSystemd] where there is none.
func User(ctx context.Context, home, config, state string) (*Service, error) {
	s := &Service{
		user: true, programs: filepath.Join(home, ".local/bin"), unit: filepath.Join(config, "systemd/user", UnitName), config: filepath.Join(config, "berthd"),
		kept: []string{filepath.Join(state, "berthd")},
	}
	return s, s.findSystemd(ctx)
}

// findSystemd looks for systemd and its version.
func (s *Service) findSystemd(ctx context.Context) error {
	if s.root == "" {
		if _, err := os.Stat("/run/systemd/system"); err != nil { // sd_booted(3)
			return ErrNoSystemd
		}
	}
	out, err := command{argv: []string{"systemctl", "--version"}}.output(ctx)
	if errors.Is(err, exec.ErrNotFound) {
		return ErrNoSystemd
	} else if err != nil {
		return err
	}
	if words := strings.Fields(out); len(words) > 1 { // systemd 252 (252.38-1~deb12u1)
		s.version, _ = strconv.Atoi(words[1]) // 0 has nothing of what newer ones have
	}
	return nil
}

// systemctl is a command to the systemd that has the service.
func (s *Service) systemctl(args ...string) command {
	argv := []string{"systemctl"}
	switch {
	case s.user:
		argv = append(argv, "--user")
	case s.root != "":
		argv = append(argv, "--root="+s.root)
	}
	return command{argv: append(argv, args...)}
}

// is asks whether the unit is enabled, or active.
func (s *Service) is(ctx context.Context, state string) bool {
	out, _ := s.systemctl("is-"+state, UnitName).output(ctx) // it fails to say no
	return strings.TrimSpace(out) == state
}

// Status is the one line that berthd tells systemd of itself, empty if it does not run.
func (s *Service) Status(ctx context.Context) string {
	if s.root != "" {
		return ""
	}
	out, _ := s.systemctl("show", "--value", "--property=StatusText", UnitName).output(ctx)
	return strings.TrimSpace(out)
}

// settingsFile is what systemd reads berthd's variables from.
func (s *Service) settingsFile() string { return filepath.Join(s.config, "berthd.env") }

// record lists what was installed, for [Service.Uninstall].
func (s *Service) record() string { return filepath.Join(s.config, "installed") }

// Settings reads the variables that the service has.
func (s *Service) Settings() (Settings, error) {
	text, err := read(s.settingsFile())
	return parseSettings(text), err
}

// stores tells whether systemd hands the token over by itself. Of one that is not running, the version is not known.
func (s *Service) stores() bool { return !s.user && s.root == "" && s.version >= withStore }

// plainToken is the file that the token is in.
func (s *Service) plainToken() string {
	if s.stores() {
		return filepath.Join("/etc/credstore", credential)
	}
	return filepath.Join(s.config, credential)
}

// sealedToken is the file that the token is in where it is encrypted, and sealedUnit what tells systemd so.
func (s *Service) sealedToken() string {
	return filepath.Join(s.root, "/etc/credstore.encrypted", credential)
}
func (s *Service) sealedUnit() string { return filepath.Join(s.unit+".d", "encrypted-token.conf") }

// HasToken tells whether the service has been given a token.
func (s *Service) HasToken() bool { return exists(s.plainToken()) || exists(s.sealedToken()) }

// packaged returns the unit that a package of the distribution brought, empty if there is none.
func (s *Service) packaged() string {
	for _, dir := range []string{"/usr/lib/systemd", "/lib/systemd"} {
		kind := "system"
		if s.user {
			kind = "user"
		}
		if path := filepath.Join(s.root, dir, kind, UnitName); exists(path) {
			return path
		}
	}
	return ""
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// read returns what a file holds, nil if it is not there.
func read(path string) ([]byte, error) {
	text, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("cannot see what is installed: %w", err)
	case text == nil:
		return []byte{}, nil
	}
	return text, nil
}
