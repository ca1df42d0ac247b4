package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestSSH is the measurement with little of everything. It fails on what the long one fails on; figures are not judged.
func TestSSH(t *testing.T) {
	s := settings{bin: t.TempDir()}
	for target, packages := range map[string][]string{
		s.bin: {"../../cmd/berth", "../../cmd/berthd", "../../cmd/berthd-ptyhost"}, filepath.Join(s.bin, "bench-ssh"): {"."},
	} {
		build := exec.Command("go", append([]string{"build", "-o", target}, packages...)...)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("cannot build: %v\n%s", err, out)
		}
	}
	var out bytes.Buffer
	if err := run(t.Context(), quickly(s), &out); err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", &out)
	for _, row := range []string{"exec of true", "ssh HOST true", "at once", "bulk down", "bulk up", "sftp put", "sftp get", "rsync -a", "memory of a session"} {
		if !strings.Contains(out.String(), row) {
			t.Errorf("nothing was measured of %s", row)
		}
	}
}
