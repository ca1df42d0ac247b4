package main

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestQuick: the whole of it works on small machines, and every way to scan finds the same.
func TestQuick(t *testing.T) {
	cmd := exec.Command("go", "run", ".", "-quick")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	t.Logf("\n%s", out)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Count(string(out), "\n"), 2+4*4+2*2; got != want {
		t.Errorf("%d lines, want %d", got, want)
	}
}
