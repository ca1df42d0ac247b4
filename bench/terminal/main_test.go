package main

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestTerminal is the measurement with little of everything. It fails on what the long one fails on; figures are not judged.
func TestTerminal(t *testing.T) {
	s := settings{bin: t.TempDir()}
	build := exec.Command("go", "build", "-o", s.bin, "../../cmd/berth", "../../cmd/berthd", "../../cmd/berthd-ptyhost")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("cannot build: %v\n%s", err, out)
	}
	var out bytes.Buffer
	if err := run(t.Context(), quickly(s), &out); err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", &out)
	for _, row := range []string{"bulk output", "Ctrl-C while yes runs", "echo of a key, p99", "echo beside a flood, p99", "attach to 10,000 lines", "a session with a full scrollback"} {
		if !strings.Contains(out.String(), row) {
			t.Errorf("nothing was measured of %s", row)
		}
	}
}
