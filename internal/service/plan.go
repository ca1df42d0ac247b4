package service

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/berthd/berth/wire"
)

// Plan is what is to be done to a machine, in order. It holds no step that has been done already.
type Plan struct {
	steps []step
	// Notes are for a person to read, whatever is done.
	Notes []string
}

// step is one thing that a plan does. Doing it twice is no harm.
type step interface {
	show(io.Writer)
	do(context.Context) error
}

// Empty tells whether there is nothing to do.
func (p *Plan) Empty() bool { return len(p.steps) == 0 }

// Show writes what the plan would do: each file, with the lines that change, and each command. Secrets are left out.
func (p *Plan) Show(w io.Writer) {
	for _, s := range p.steps {
		s.show(w)
	}
}

// Do does it. What was done before an error stays: a plan made anew goes on from there.
func (p *Plan) Do(ctx context.Context) error {
	for _, s := range p.steps {
		if err := s.do(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (p *Plan) add(s ...step) { p.steps = append(p.steps, s...) }

// line is how every step begins: what is done, and to what.
func line(w io.Writer, verb, what, remark string) {
	if remark != "" {
		remark = "  (" + remark + ")"
	}
	fmt.Fprintf(w, "  %-7s %s%s\n", verb, what, remark)
}

// file is to have a content.
type file struct {
	path   string
	mode   fs.FileMode
	body   []byte
	before []byte // nil: there is no file yet
	secret bool   // nothing of the content is shown
}

// shownLines is how many lines of a new file are shown: all of a few settings, none of a unit.
const shownLines = 12

func (f *file) show(w io.Writer) {
	verb, remark := "write", fmt.Sprintf("new, %#o", f.mode)
	if f.before != nil {
		verb, remark = "change", fmt.Sprintf("%#o", f.mode)
	}
	if f.secret {
		line(w, verb, f.path, remark+", a secret: it is not shown")
		return
	}
	line(w, verb, f.path, remark)
	after := lines(f.body)
	if f.before == nil && len(after) > shownLines {
		return
	}
	for _, changed := range difference(lines(f.before), after) {
		fmt.Fprintf(w, "          %s\n", masked(changed))
	}
}

func (f *file) do(context.Context) error {
	return replace(f.path, f.mode, bytes.NewReader(f.body))
}

// program is a file that is to be as another one.
type program struct{ from, to string }

func (p program) show(w io.Writer) { line(w, "copy", p.to, "from "+p.from) }

func (p program) do(context.Context) error {
	from, err := os.Open(p.from)
	if err != nil {
		return fmt.Errorf("cannot install a program: %w", err)
	}
	defer from.Close()
	return replace(p.to, 0o755, from)
}

// replace writes a file in one step: whoever reads it, or runs it, has the old one or the new one.
func replace(path string, mode fs.FileMode, body io.Reader) error {
	next, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-")
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	defer os.Remove(next.Name()) // not there any more, if all went well
	_, err = io.Copy(next, body)
	err = errors.Join(err, next.Chmod(mode), next.Sync(), next.Close())
	if err == nil {
		err = os.Rename(next.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	return nil
}

// directory is to be there.
type directory struct {
	path string
	mode fs.FileMode
}

func (d directory) show(w io.Writer) { line(w, "make", d.path+"/", fmt.Sprintf("%#o", d.mode)) }

func (d directory) do(context.Context) error {
	if err := os.MkdirAll(d.path, d.mode); err != nil {
		return fmt.Errorf("cannot make a directory: %w", err)
	}
	return nil
}

// removal is of what is not to be there: a file, or a directory.
type removal struct {
	path  string
	all   bool // what is in the directory, too; else one that is not empty stays
	isDir bool
}

func (r removal) show(w io.Writer) {
	switch {
	case r.all:
		line(w, "remove", r.path+"/", "and all that is in it")
	case r.isDir:
		line(w, "remove", r.path+"/", "if nothing else is in it")
	default:
		line(w, "remove", r.path, "")
	}
}

func (r removal) do(context.Context) error {
	if r.all {
		return os.RemoveAll(r.path)
	}
	if err := os.Remove(r.path); err != nil && !errors.Is(err, fs.ErrNotExist) && !(r.isDir && errors.Is(err, fs.ErrExist)) {
		return fmt.Errorf("cannot remove what was installed: %w", err)
	}
	return nil
}

// command is a program that is run.
type command struct {
	argv   []string
	secret wire.Secret // what it reads
	hint   string      // what to do when it fails
}

func (c command) show(w io.Writer) {
	remark := ""
	if c.secret != "" {
		remark = "it reads the token"
	}
	line(w, "run", strings.Join(c.argv, " "), remark)
}

func (c command) do(ctx context.Context) error {
	_, err := c.output(ctx)
	if err != nil && c.hint != "" {
		return fmt.Errorf("%w: %s", err, c.hint)
	}
	return err
}

// output runs the command and returns what it printed.
func (c command) output(ctx context.Context) (string, error) {
	cmd := exec.CommandContext(ctx, c.argv[0], c.argv[1:]...)
	var out, said bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(c.secret.Reveal()), &out, &said
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s failed: %w: %s", strings.Join(c.argv, " "), err, strings.Join(strings.Fields(said.String()), " "))
	}
	return out.String(), nil
}

func lines(text []byte) []string {
	if len(text) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
}

// difference returns the lines that are only in one of two texts, marked - and +: those that go, then those that come.
func difference(before, after []string) (changed []string) {
	for _, line := range before {
		if !slices.Contains(after, line) {
			changed = append(changed, "-"+line)
		}
	}
	for _, line := range after {
		if !slices.Contains(before, line) {
			changed = append(changed, "+"+line)
		}
	}
	return changed
}
