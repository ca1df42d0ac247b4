package berthd

import (
	"os"
	"path/filepath"
	"testing"
)

// TestTrusted: what others may have put beside berthd is not run.
func TestTrusted(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, mode os.FileMode, owner int) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, owner, -1); err != nil {
			t.Fatal(err)
		}
	}
	us := os.Getuid()
	file("ours", 0o755, us)
	file("group's too", 0o775, us)
	file("everybody's", 0o757, us)
	if us == 0 {
		file("another's", 0o755, 65534)
	}
	if err := os.Symlink("ours", filepath.Join(dir, "a link")); err != nil {
		t.Fatal(err)
	}
	if err := trusted(filepath.Join(dir, "ours")); err != nil {
		t.Errorf("ours: %v", err)
	}
	for _, name := range []string{"group's too", "everybody's", "another's", "a link", "missing", "."} {
		if err := trusted(filepath.Join(dir, name)); err == nil {
			t.Errorf("%s is trusted", name)
		}
	}
}
