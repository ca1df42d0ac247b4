// Command release makes what is given to others: archives of every program for every system, packages for Debian's and
// Red Hat's families, a bill of materials for each program, and the sums of all. The same commit makes the same bytes.
//
//	go run ./internal/release --version v1.2.3 --out dist
//	go run ./internal/release --check dist     # build the commit again elsewhere, and compare
//
// [maker.all] lists what is made; each file of this package is about one kind of it. The packager and what writes bills
// of materials are pinned in tools.mod, away from berth's own dependencies.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "release:", err)
		os.Exit(1)
	}
}

// platforms are those that a release is for.
var platforms = []string{"linux/amd64", "linux/arm64", "linux/armv7", "darwin/amd64", "darwin/arm64"}

func run(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("release", flag.ContinueOnError)
	version := fs.String("version", "", "`version` as v1.2.3 (default the tag of this commit, else v0.1.0-devel)")
	out := fs.String("out", "dist", "`directory` to make; one that a release is in already is made anew")
	check := fs.String("check", "", "build the release in this `directory` again, from a clone of this commit in another place, and say what differs")
	only := fs.String("platform", strings.Join(platforms, ","), "`platforms` to build for, separated by commas")
	if err := fs.Parse(args); err != nil {
		return err
	}
	root, err := output(ctx, ".", "git", "rev-parse", "--show-toplevel")
	if err != nil {
		return err
	}
	m := &maker{root: root, platforms: strings.Split(*only, ",")}
	for _, p := range m.platforms {
		if !slices.Contains(platforms, p) {
			return fmt.Errorf("there is no release for %q, only for %s", p, strings.Join(platforms, ", "))
		}
	}
	if *check != "" {
		return m.check(ctx, *check)
	}
	if err := m.identify(ctx, *version); err != nil {
		return err
	}
	if m.out, err = fresh(*out); err != nil {
		return err
	}
	if err := m.all(ctx); err != nil {
		return err
	}
	fmt.Printf("made %s in %s\n", m.version, m.out)
	return nil
}

// identify finds which commit this is, and which version.
func (m *maker) identify(ctx context.Context, version string) error {
	changed, err := output(ctx, m.root, "git", "status", "--porcelain")
	if err != nil {
		return err
	}
	if version == "" {
		if version, err = output(ctx, m.root, "git", "tag", "--points-at", "HEAD", "--sort=-v:refname", "v[0-9]*"); err != nil {
			return err
		}
		version, _, _ = strings.Cut(version, "\n")
	}
	if version != "" && changed != "" {
		return fmt.Errorf("cannot make %s of what is not committed; commit it or take it away:\n%s", version, changed)
	}
	if version == "" {
		version = "v0.1.0-devel"
	}
	m.version = version
	if m.commit, err = output(ctx, m.root, "git", "rev-parse", "HEAD"); err != nil {
		return err
	}
	seconds, err := output(ctx, m.root, "git", "log", "-1", "--format=%ct")
	if err != nil {
		return err
	}
	n, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil {
		return fmt.Errorf("cannot tell when the commit was made: %w", err)
	}
	m.date = time.Unix(n, 0).UTC()
	return nil
}

// fresh makes an empty directory in place of an earlier release, and of nothing else.
func fresh(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	if _, err := os.Stat(filepath.Join(dir, sumsFile)); err != nil && len(entries) > 0 {
		return "", fmt.Errorf("%s holds something that is no release; choose another directory with --out", dir)
	}
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	return dir, os.MkdirAll(dir, 0o755)
}

// check builds a release again, from a clone at another path, and compares the sums.
func (m *maker) check(ctx context.Context, dir string) error {
	version, err := os.ReadFile(filepath.Join(dir, agentsDir, versionFile))
	if err != nil {
		return err
	}
	want, err := os.ReadFile(filepath.Join(dir, sumsFile))
	if err != nil {
		return err
	}
	elsewhere, err := os.MkdirTemp("", "berth-release-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(elsewhere)
	again := &maker{root: filepath.Join(elsewhere, "clone"), out: filepath.Join(elsewhere, "out"), platforms: m.platforms}
	if _, err := output(ctx, m.root, "git", "clone", "-q", m.root, again.root); err != nil {
		return err
	}
	if err := os.Mkdir(again.out, 0o755); err != nil {
		return err
	}
	if err := again.identify(ctx, strings.TrimSpace(string(version))); err != nil {
		return err
	}
	if err := again.all(ctx); err != nil {
		return err
	}
	got, err := os.ReadFile(filepath.Join(again.out, sumsFile))
	if err != nil {
		return err
	}
	if bytes.Equal(got, want) {
		fmt.Printf("%s is what commit %s makes: %d files have the same sums\n", dir, again.commit, bytes.Count(got, []byte("\n")))
		return nil
	}
	for line := range strings.Lines(string(want)) {
		if !strings.Contains(string(got), line) {
			fmt.Fprintln(os.Stderr, "differs:", strings.TrimSpace(line))
		}
	}
	return fmt.Errorf("%s is not what commit %s makes with %s; a release of another commit or Go version differs, too", dir, again.commit, m.platforms)
}

// output runs a command to its end and returns what it printed, without the last newline.
func output(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	return finish(cmd)
}

func finish(cmd *exec.Cmd) (string, error) {
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(errOut.Bytes()))
	}
	return strings.TrimRight(string(out), "\n"), nil
}
