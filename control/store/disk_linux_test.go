package store

import (
	"context"
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// TestDiskFillsUnseen lets JetStream itself run out of space, as when another program takes the last
// of it between the check and the write: once there is space, the store works again, with what was
// stored before.
func TestDiskFillsUnseen(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err != nil {
		t.Fatalf("this test needs root, to mount a disk of its own: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	s := open(t, Options{Dir: filepath.Join(dir, "data")})
	s.embed.disk.free = func(string) (uint64, error) { return math.MaxUint64, nil }
	agent := uuid.New()
	add := func() error {
		// A write that JetStream drops is not answered at all.
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		return s.AppendLogs(ctx, agent, LogBatch{Lines: lines(strings.Repeat("x", 100<<10))})
	}
	if err := add(); err != nil {
		t.Fatal(err)
	}
	ballast := filepath.Join(dir, "ballast")
	f, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = f.Write(make([]byte, 64<<10))
	}
	if !errors.Is(err, unix.ENOSPC) || f.Close() != nil {
		t.Fatal(err)
	}
	if err := add(); err == nil {
		t.Fatal("a write to a full disk succeeded")
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	patience, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for add() != nil {
		select {
		case <-again.C:
		case <-patience.Done():
			t.Fatal("the store never came back")
		}
	}
	got, _ := logged(t, s, agent, 0)
	if len(got) < 2 {
		t.Errorf("%d lines are there", len(got))
	}
}
