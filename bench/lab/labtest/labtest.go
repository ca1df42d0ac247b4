// Package labtest tests benches: [Quick] runs one with little of everything, in [Programs]. Figures are not judged.
package labtest

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// Programs builds our programs into a folder that it returns. The test runs in a bench's folder.
func Programs(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	build := exec.Command("go", "build", "-o", dir, "../../cmd/berth", "../../cmd/berthd", "../../cmd/berthd-ptyhost")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("cannot build: %v\n%s", err, out)
	}
	return dir
}

// Quick fails on what the long measurement fails on, and if one of these rows was not printed.
func Quick(t *testing.T, run func(ctx context.Context, out io.Writer) error, rows ...string) {
	t.Helper()
	var out bytes.Buffer
	if err := run(t.Context(), &out); err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", &out)
	for _, row := range rows {
		if !strings.Contains(out.String(), row) {
			t.Errorf("nothing was measured of %s", row)
		}
	}
}
