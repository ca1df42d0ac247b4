package reporter

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/berthd/berth/wire"
)

// mount mounts a disk of its own for a test.
func mount(t *testing.T, kind, source, options string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting a disk takes root")
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", kind, "-o", options, source, dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fill leaves no room on a disk. What it returns makes room again.
func fill(t *testing.T, disk string) (empty func()) {
	t.Helper()
	path := filepath.Join(disk, "fill")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	for size := 64 << 10; size > 0; {
		if _, err := f.Write(make([]byte, size)); errors.Is(err, syscall.ENOSPC) {
			size /= 2
		} else if err != nil {
			t.Fatal(err)
		}
	}
	f.Close()
	return func() {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTroubleWithTheDisk: whatever a disk does while lines wait on it, those that come then and those that waited
// arrive once, it is said that lines are in memory, and once it takes lines again they are kept there.
func TestTroubleWithTheDisk(t *testing.T) {
	for _, c := range []struct {
		name string
		disk func(t *testing.T) string
		// hurt has the disk refuse; what it returns mends it, if that can be.
		hurt func(t *testing.T, disk string) (mend func())
	}{
		{"full", func(t *testing.T) string { return mount(t, "tmpfs", "none", "size=1m") }, fill},
		{"without inodes", func(t *testing.T) string { return mount(t, "tmpfs", "none", "size=16m,nr_inodes=20") },
			func(t *testing.T, disk string) func() {
				dir := filepath.Join(disk, "files")
				if err := os.Mkdir(dir, 0o700); err != nil {
					t.Fatal(err)
				}
				for i := 0; ; i++ {
					f, err := os.Create(filepath.Join(dir, fmt.Sprint(i)))
					if errors.Is(err, syscall.ENOSPC) {
						break
					}
					if err != nil {
						t.Fatal(err)
					}
					f.Close()
				}
				return func() {
					if err := os.RemoveAll(dir); err != nil {
						t.Fatal(err)
					}
				}
			}},
		{"gone read-only", func(t *testing.T) string {
			image := filepath.Join(t.TempDir(), "image")
			if out, err := exec.Command("mkfs.ext4", "-q", image, "8m").CombinedOutput(); err != nil {
				t.Fatalf("mkfs.ext4: %v: %s", err, out)
			}
			return mount(t, "ext4", image, "loop")
		}, func(t *testing.T, disk string) func() {
			// What the kernel does to a disk with errors.
			if out, err := exec.Command("mount", "-o", "remount,abort", disk).CombinedOutput(); err != nil {
				t.Fatalf("mount: %v: %s", err, out)
			}
			return nil
		}},
	} {
		for _, when := range []string{"while it runs", "before it starts"} {
			t.Run(c.name+", "+when, func(t *testing.T) {
				s := newServer(t)
				disk := c.disk(t)
				var log bytes.Buffer
				cfg := Config{Dir: filepath.Join(disk, "spool"), Log: slog.New(slog.NewTextHandler(&log, nil))}
				r, err := Open(cfg)
				if err != nil {
					t.Fatal(err)
				}
				want := numbered(1, 500)
				write(t, r, sourceA, want...)
				if when == "before it starts" {
					if err := r.Close(); err != nil {
						t.Fatal(err)
					}
				}
				mend := c.hurt(t, disk)
				if when == "before it starts" {
					if r, err = Open(cfg); err != nil {
						t.Fatal(err)
					}
				}
				more := func(from, to int) {
					lines := numbered(from, to)
					write(t, r, sourceA, lines...)
					want = append(want, lines...)
				}
				more(501, 10_000)
				stop := linked(r, s.addr, wire.CurrentVersion)
				flush(t, r)
				more(10_001, 10_500)
				flush(t, r)
				stop()
				if mend != nil {
					mend()
				}
				more(10_501, 20_000)
				// A disk without inodes goes on taking lines into the file that is there.
				inMemory := c.name != "without inodes" || when == "before it starts"
				for words, want := range map[string]int{"kept in memory": 1, "on disk again": 1, "cannot note": 1} {
					if !inMemory && words != "cannot note" || mend == nil && words == "on disk again" {
						want = 0
					}
					if got := strings.Count(log.String(), words); got != want {
						t.Errorf("said %d times %q, want %d", got, words, want)
					}
				}
				stop = linked(r, s.addr, wire.CurrentVersion)
				flush(t, r)
				stop()
				if err := r.Close(); err != nil && mend != nil {
					t.Error(err)
				}
				wantLines(t, s, sourceA, want)
				if t.Failed() {
					t.Logf("it said:\n%s", &log)
				}
			})
		}
	}
}
