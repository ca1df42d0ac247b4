package service

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/berthd/berth/deploy/systemd"
	"github.com/berthd/berth/wire"
)

// Request says what a service is to be.
type Request struct {
	// Program is the berthd that is installed. What lies beside it comes along.
	Program string
	// Settings are the variables that it is to have; others that are set already stay.
	Settings Settings
	// Token is what berthd shows the control server; empty leaves it as it is.
	Token wire.Secret
	// Encrypt has systemd keep the token encrypted to this machine. A token that is, stays so.
	Encrypt bool
	// NewUser is made, with a home; empty makes none.
	NewUser string
	// NoStart leaves the service to the next boot.
	NoStart bool
}

// packagedProgram is where packages of distributions have berthd.
const packagedProgram = "/usr/bin/berthd"

// Install plans how the service becomes what the request says.
func (s *Service) Install(ctx context.Context, r Request) (*Plan, error) {
	i := installation{Service: s, request: r}
	i.request.Settings = Settings{} // the caller's stay as they are
	maps.Copy(i.request.Settings, r.Settings)
	i.planDirectory(s.config, 0o755)
	for _, step := range []func(context.Context) error{i.planUser, i.planPrograms, i.planToken, i.planSettings, i.planUnit} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	if err := i.planRecord(); err != nil {
		return nil, err
	}
	i.planStart(ctx)
	return &i.plan, nil
}

// installation is a plan that is being made.
type installation struct {
	*Service
	request Request
	plan    Plan
	made    []string // files, and directories with a / at the end
}

func (i *installation) planUser(context.Context) error {
	name := i.request.NewUser
	if name == "" {
		return nil
	}
	argv := []string{"useradd", "--create-home", "--shell", "/bin/bash"}
	if i.root != "" {
		argv = append(argv, "--root", i.root)
	}
	i.plan.add(command{argv: append(argv, name)})
	return nil
}

// planPrograms leaves the programs where a package put them.
func (i *installation) planPrograms(context.Context) error {
	if i.fromPackage() {
		return nil
	}
	if unit := i.packaged(); unit != "" {
		return fmt.Errorf("a package has installed berthd here (%s): run %s install, or remove the package", unit, packagedProgram)
	}
	for _, name := range []string{"berthd", "berthd-ptyhost"} {
		source, target := filepath.Join(filepath.Dir(i.request.Program), name), filepath.Join(i.programs, name)
		if name == "berthd" {
			source = i.request.Program // however it is called
		}
		switch same, err := sameContent(source, target); {
		case errors.Is(err, fs.ErrNotExist):
			i.plan.Notes = append(i.plan.Notes, fmt.Sprintf("%s is not there: terminals will take more memory", source))
		case err != nil:
			return fmt.Errorf("cannot compare programs: %w", err)
		case !same:
			i.planDirectory(i.programs, 0o755)
			i.plan.add(program{source, target})
			i.made = append(i.made, target)
		}
	}
	return nil
}

// fromPackage tells whether the program is where only packages put it.
func (i *installation) fromPackage() bool {
	return i.request.Program == filepath.Join(i.root, packagedProgram)
}

// sameContent tells whether two files hold the same. One that is not there does not hold what the first does.
func sameContent(first, second string) (bool, error) {
	a, err := os.Open(first)
	if err != nil {
		return false, err
	}
	defer a.Close()
	b, err := os.Open(second)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	defer b.Close()
	ofA, errA := a.Stat()
	ofB, errB := b.Stat()
	if err := errors.Join(errA, errB); err != nil || ofA.Size() != ofB.Size() {
		return false, err
	}
	if os.SameFile(ofA, ofB) {
		return true, nil
	}
	sums := [2]hash.Hash{sha256.New(), sha256.New()}
	for i, file := range []io.Reader{a, b} {
		if _, err := io.Copy(sums[i], file); err != nil {
			return false, err
		}
	}
	return bytes.Equal(sums[0].Sum(nil), sums[1].Sum(nil)), nil
}

// planToken puts the token where it is handed to berthd alone.
func (i *installation) planToken(ctx context.Context) error {
	sealed, plain := i.sealedToken(), i.plainToken()
	seal := i.request.Encrypt || !i.user && exists(sealed)
	token := i.request.Token
	if i.request.Encrypt && token == "" {
		text, err := read(plain)
		if err != nil {
			return err
		}
		token = wire.Secret(strings.TrimSpace(string(text)))
	}
	switch {
	case seal && (i.user || i.root != "" || i.version < withEncryption):
		return fmt.Errorf("systemd %d cannot encrypt a credential for this service: it takes version %d, and a system that runs; leave out --encrypt", i.version, withEncryption)
	case token == "" && i.request.Encrypt && !exists(sealed):
		return errors.New("there is no token to encrypt: give one")
	case token == "":
		return nil
	case !seal:
		if !i.stores() {
			i.request.Settings[TokenFile] = strings.TrimPrefix(plain, i.root)
		}
		return i.planFile(plain, 0o600, true, []byte(token.Reveal()+"\n"))
	}
	if now, err := (command{argv: []string{"systemd-creds", "decrypt", "--name=" + credential, sealed, "-"}}).output(ctx); err != nil || now != token.Reveal() {
		i.planDirectory(filepath.Dir(sealed), 0o700)
		i.plan.add(command{argv: []string{"systemd-creds", "encrypt", "--name=" + credential, "-", sealed}, secret: token})
		i.made = append(i.made, sealed)
	}
	if exists(plain) {
		i.plan.add(removal{path: plain})
	}
	return i.planFile(i.sealedUnit(), 0o644, false, []byte("# The token is encrypted.\n[Service]\nLoadCredential=\nLoadCredentialEncrypted="+credential+":"+sealed+"\n"))
}

func (i *installation) planSettings(context.Context) error {
	before, err := read(i.settingsFile())
	if err != nil {
		return err
	}
	return i.planFile(i.settingsFile(), 0o600, false, i.request.Settings.apply(before)) // headers may be credentials
}

func (i *installation) planUnit(context.Context) error {
	if i.packaged() != "" {
		return nil
	}
	unit, program := systemd.Unit, "/usr/local/bin/berthd"
	if i.user {
		unit, program = systemd.UserUnit, "%h/.local/bin/berthd"
	}
	if i.fromPackage() {
		unit = strings.Replace(unit, "ExecStart="+program, "ExecStart="+packagedProgram, 1)
	}
	return i.planFile(i.unit, 0o644, false, []byte(unit))
}

// planRecord has it written down what is made, before it is.
func (i *installation) planRecord() error {
	before, err := read(i.record())
	if err != nil || len(i.made) == 0 {
		return err
	}
	known := lines(before)
	for _, path := range i.made {
		if path = "/" + strings.TrimPrefix(strings.TrimPrefix(path, i.root), "/"); !slices.Contains(known, path) {
			known = append(known, path)
		}
	}
	if body := strings.Join(known, "\n") + "\n"; string(before) != body {
		first := slices.IndexFunc(i.plan.steps, func(s step) bool { return s != directory{i.config, 0o755} })
		i.plan.steps = slices.Insert(i.plan.steps, max(0, first), step(&file{path: i.record(), mode: 0o644, body: []byte(body), before: before}))
	}
	return nil
}

func (i *installation) planStart(ctx context.Context) {
	changed := !i.plan.Empty()
	runs := i.root == ""
	if changed && runs {
		i.plan.add(i.systemctl("daemon-reload"))
	}
	if !i.is(ctx, "enabled") {
		i.plan.add(i.systemctl("enable", UnitName))
	}
	if runs && !i.request.NoStart && (changed || !i.is(ctx, "active")) {
		start := i.systemctl("restart", UnitName) // terminals live through it
		start.hint = "journalctl --unit " + UnitName + " says why"
		if i.user {
			start.hint = "journalctl --user --unit " + UnitName + " says why"
		}
		i.plan.add(start)
	}
}

// planFile has a file hold body, unless it does.
func (i *installation) planFile(path string, mode fs.FileMode, secret bool, body []byte) error {
	before, err := read(path)
	if err != nil {
		return err
	}
	if info, err := os.Stat(path); before != nil && bytes.Equal(before, body) && err == nil && info.Mode().Perm() == mode {
		return nil
	}
	dirMode := fs.FileMode(0o755)
	if secret {
		dirMode = 0o700
	}
	i.planDirectory(filepath.Dir(path), dirMode)
	i.plan.add(&file{path: path, mode: mode, body: body, before: before, secret: secret})
	i.made = append(i.made, path)
	return nil
}

// planDirectory has a directory be there.
func (i *installation) planDirectory(path string, mode fs.FileMode) {
	if exists(path) || slices.Contains(i.made, path+"/") {
		return
	}
	i.plan.add(directory{path, mode})
	i.made = append(i.made, path+"/")
}
