package berthd

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestLogFile: a log file and the one before it hold the end of the log, whole lines each.
func TestLogFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	for range 2 { // also of a berthd that starts again
		l, err := openLogFile(path, 100)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 20 {
			if n, err := fmt.Fprintf(l, "line %03d.\n", i); n != 10 || err != nil {
				t.Fatalf("%d, %v", n, err)
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	var want [2]string
	for i := range 10 {
		want[0] += fmt.Sprintf("line %03d.\n", i)
		want[1] += fmt.Sprintf("line %03d.\n", 10+i)
	}
	var got [2]string
	for i, name := range []string{path + ".1", path} {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		got[i] = string(b)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

// TestLogFileStays: what cannot be begun anew is written to all the same.
func TestLogFileStays(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "log")
	if err := os.MkdirAll(path+".1/in-the-way", 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := openLogFile(path, 100)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for range 30 {
		fmt.Fprintln(l, "line 0...")
	}
	b, err := os.ReadFile(path)
	if err != nil || strings.Count(string(b), "line 0...\n") != 30 || strings.Count(string(b), "cannot begin a new log") != 2 {
		t.Errorf("%v: %s", err, b)
	}

	null, err := openLogFile(os.DevNull, 100)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for range 30 {
		if _, err := fmt.Fprintln(null, "line 0..."); err != nil {
			t.Fatal(err)
		}
	}
}
