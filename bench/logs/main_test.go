package main

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestLogs is the measurement with few lines and without its peer. It fails on what the long one fails on; figures are not judged.
func TestLogs(t *testing.T) {
	s := settings{bin: t.TempDir(), only: "loop"}
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
	for _, row := range []string{"a shell loop", "processors", "most memory"} {
		if !strings.Contains(out.String(), row) {
			t.Errorf("nothing was measured of %s", row)
		}
	}
}
