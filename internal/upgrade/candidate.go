package upgrade

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// programs are what an archive holds of berthd; the first must be there.
var programs = []string{"berthd", "berthd-ptyhost"}

const (
	// maxProgram bounds one program: ten times what berthd takes.
	maxProgram = 256 << 20
	// maxUnpacked bounds all of an archive.
	maxUnpacked = 2 * maxProgram
	// maxEntries bounds what else may lie in an archive: a license, a readme.
	maxEntries = 64
	// previous is the end of the name under which an installed program is kept when another takes its place.
	previous = ".previous"
	// staging begins the names of the directories in which candidates lie, beside what they are to replace.
	staging = ".berthd-upgrade-"
	// tryTimeout is for a program that prints its version, on a machine that is busy.
	tryTimeout = 20 * time.Second
)

// Candidate is a berthd that lies beside an installed one, to take its place.
type Candidate struct {
	Version string // as it says itself
	dir     string // where it lies
	program string // what it is to replace
}

// Open checks an archive's SHA-256, unpacks it beside program, and has it tell its version, so that one which is damaged or made for another
// machine is found out before it is in use. pin is the sum in hex; empty means that the archive is trusted as it is.
func Open(archive, program, pin string) (*Candidate, error) {
	f, err := os.Open(archive)
	if err != nil {
		return nil, fmt.Errorf("cannot use the archive: %w", err)
	}
	defer f.Close()
	if err := checkSum(f, pin); err != nil {
		return nil, err
	}
	return stage(program, func(dir string) error { return unpack(f, dir) })
}

// Previous returns what was installed before the last upgrade of program.
func Previous(program string) (*Candidate, error) {
	return stage(program, func(dir string) error {
		for _, name := range programs {
			kept := target(program, name) + previous
			if err := copyFile(kept, filepath.Join(dir, name)); errors.Is(err, fs.ErrNotExist) && name != programs[0] {
				continue
			} else if errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("there is no %s: this berthd has not been upgraded here", kept)
			} else if err != nil {
				return err
			}
		}
		return nil
	})
}

// stage fills a new directory beside program, and tries what is there.
func stage(program string, fill func(dir string) error) (*Candidate, error) {
	beside := filepath.Dir(program)
	left, _ := filepath.Glob(filepath.Join(beside, staging+"*")) // of upgrades that were killed
	for _, dir := range left {
		os.RemoveAll(dir)
	}
	dir, err := os.MkdirTemp(beside, staging)
	if err != nil {
		return nil, fmt.Errorf("cannot upgrade %s: %w: run this as the owner of that directory (sudo), or install another image if this one is read-only", program, err)
	}
	c := &Candidate{dir: dir, program: program}
	if err = fill(dir); err == nil {
		c.Version, err = c.ask()
	}
	if err != nil {
		c.Discard()
		return nil, err
	}
	return c, nil
}

// checkSum reads f from its beginning to its end, and leaves it at its beginning.
func checkSum(f *os.File, pin string) error {
	var begin [2]byte
	if _, err := f.ReadAt(begin[:], 0); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("cannot read the archive: %w", err)
	}
	if begin != [2]byte{0x1f, 0x8b} { // gzip's
		return errors.New("what came is no archive: a login page of a proxy, or a download that broke; check the URL")
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return fmt.Errorf("cannot read the archive: %w", err)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); pin != "" && !strings.EqualFold(got, pin) {
		return fmt.Errorf("the archive's SHA-256 is %s, not %s: it is damaged, or not what it should be, and nothing was changed; try again, and tell the server's operator if it stays so", got, pin)
	}
	_, err := f.Seek(0, io.SeekStart)
	return err
}

// unpack writes the programs of a gzipped tar file to dir, and nothing else of it.
func unpack(r io.Reader, dir string) error {
	zip, err := gzip.NewReader(r)
	if err != nil {
		return fmt.Errorf("cannot read the archive: %w", err)
	}
	archive := tar.NewReader(io.LimitReader(zip, maxUnpacked))
	for range maxEntries {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			if _, err := os.Stat(filepath.Join(dir, programs[0])); err != nil {
				return errors.New("the archive holds no berthd")
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("cannot read the archive: %w", err)
		}
		for _, name := range programs {
			if strings.TrimPrefix(h.Name, "./") != name || h.Typeflag != tar.TypeReg {
				continue
			}
			if h.Size > maxProgram {
				return fmt.Errorf("cannot unpack %s: it has more than %d MiB", name, maxProgram>>20)
			}
			if err := writeFile(filepath.Join(dir, name), archive); err != nil {
				return fmt.Errorf("cannot unpack %s: %w", name, err)
			}
		}
	}
	return fmt.Errorf("the archive holds more than %d files", maxEntries)
}

// writeFile makes an executable file that is on the disk when it returns.
func writeFile(path string, r io.Reader) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if err == nil {
		err = f.Chmod(0o755) // whatever the umask
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func copyFile(from, to string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	return writeFile(to, f)
}

// ask has the program tell its version.
func (c *Candidate) ask() (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), tryTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(c.dir, programs[0]), "version")
	cmd.Env = []string{}
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("the new berthd cannot be run here, nothing was changed: %w", err)
	}
	// "berthd v1.2.3 (…)"
	words := bytes.Fields(out)
	if len(words) < 2 || string(words[0]) != "berthd" || len(words[1]) > maxVersion || !isVersion(string(words[1])) {
		return "", errors.New("what the archive holds is no berthd, nothing was changed: it does not tell its version")
	}
	return string(words[1]), nil
}

// Discard takes the candidate away.
func (c *Candidate) Discard() { os.RemoveAll(c.dir) }

// Install puts the candidate into the place of what is installed, which is kept beside it with the ending .previous; undo puts that back. A failure
// leaves things as they were. Nobody ever finds a program that is not whole.
func (c *Candidate) Install() (undo func() error, err error) {
	var undos []func() error
	undo = func() error {
		var errs []error
		for i := len(undos) - 1; i >= 0; i-- {
			errs = append(errs, undos[i]())
		}
		return errors.Join(errs...)
	}
	for i := len(programs) - 1; i >= 0; i-- { // berthd last: it starts the others
		back, err := c.swap(programs[i])
		if errors.Is(err, fs.ErrNotExist) && i > 0 {
			continue
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("cannot install %s: %w", programs[i], err), undo())
		}
		undos = append(undos, back)
	}
	return undo, nil
}

func (c *Candidate) swap(name string) (back func() error, err error) {
	staged, at := filepath.Join(c.dir, name), target(c.program, name)
	if _, err := os.Stat(staged); err != nil {
		return nil, err
	}
	info, err := os.Stat(at)
	if errors.Is(err, fs.ErrNotExist) {
		return func() error { return os.Remove(at) }, rename(staged, at)
	}
	if err != nil {
		return nil, err
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		if err := os.Chown(staged, int(stat.Uid), int(stat.Gid)); err != nil {
			return nil, err
		}
	}
	// The installed program has its name all the time.
	kept := at + previous
	if err := os.Remove(kept); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if os.Link(at, kept) != nil { // not on every file system
		if err := copyFile(at, kept); err != nil {
			return nil, err
		}
	}
	return func() error { return rename(kept, at) }, rename(staged, at)
}

// target is the path of one of the programs that go with program, which may have any name itself: stock start scripts call it coder.
func target(program, name string) string {
	if name == programs[0] {
		return program
	}
	return filepath.Join(filepath.Dir(program), name)
}

// rename renames for good: also a machine that loses power then has the one or the other.
func rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(to))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
