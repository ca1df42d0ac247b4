package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestArchive: neither the place of files, nor their time, nor the umask shows in an archive.
func TestArchive(t *testing.T) {
	var archives [][]byte
	for _, when := range []time.Time{time.Unix(1e9, 0), time.Now()} {
		dir := t.TempDir()
		program, text := filepath.Join(dir, "p"), filepath.Join(dir, "t")
		for path, mode := range map[string]os.FileMode{program: 0o700, text: 0o600} {
			if err := os.WriteFile(path, []byte("what is in it"), mode); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(path, when, when); err != nil {
				t.Fatal(err)
			}
		}
		m := &maker{out: dir, date: time.Unix(1.7e9, 0).UTC()}
		if err := m.archive("a.tar.gz", []packed{{program, "berthd"}, {text, "LICENSE"}}); err != nil {
			t.Fatal(err)
		}
		body, err := os.ReadFile(filepath.Join(dir, "a.tar.gz"))
		if err != nil {
			t.Fatal(err)
		}
		archives = append(archives, body)
		list, err := exec.Command("tar", "-tvzf", filepath.Join(dir, "a.tar.gz")).Output()
		if err != nil {
			t.Fatal(err)
		}
		if got := string(list); !strings.HasPrefix(got, "-rwxr-xr-x root/root ") || !strings.Contains(got, "berthd\n-rw-r--r-- root/root ") {
			t.Errorf("tar sees %s", got)
		}
		if err := writeSums(dir, "*.tar.gz"); err != nil {
			t.Fatal(err)
		}
		check := exec.Command("sha256sum", "-c", sumsFile)
		check.Dir = dir
		if out, err := check.CombinedOutput(); err != nil || string(out) != "a.tar.gz: OK\n" {
			t.Errorf("sha256sum says %q, %v", out, err)
		}
	}
	if !bytes.Equal(archives[0], archives[1]) {
		t.Error("the same files make different archives")
	}
}

// TestFresh: only an earlier release gives way.
func TestFresh(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "dist")
	for range 2 {
		got, err := fresh(dir)
		if err != nil || got != dir {
			t.Fatal(got, err)
		}
		for _, name := range []string{"berth.tar.gz", sumsFile} {
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.Remove(filepath.Join(dir, sumsFile)); err != nil {
		t.Fatal(err)
	}
	if _, err := fresh(dir); err == nil || !strings.Contains(err.Error(), "is no release") {
		t.Errorf("a directory of somebody's: %v", err)
	}
}
