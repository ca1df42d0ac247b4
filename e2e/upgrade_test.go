package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// release makes the programs of another version.
func (m *machine) release(version string) (dir string) {
	m.t.Helper()
	dir = filepath.Join(m.tmp, version)
	m.must("mkdir", dir)
	m.build(version, filepath.Join(dir, "berthd"))
	m.must("cp", filepath.Join(bin, "berthd-ptyhost"), dir)
	return dir
}

// pack packs a directory with berthd as control servers host it, and returns the directory that they would serve below /bin/.
func (m *machine) pack(version, programs string) (dir, archive, sum string) {
	m.t.Helper()
	dir = filepath.Join(m.tmp, "hosted-"+version)
	archive = filepath.Join(dir, "berthd-linux-"+runtime.GOARCH+".tar.gz")
	m.must("mkdir", dir)
	m.must("tar", "-czf", archive, "-C", programs, ".")
	packed, err := os.ReadFile(archive)
	if err != nil {
		m.t.Fatal(err)
	}
	digest := sha256.Sum256(packed)
	sum = hex.EncodeToString(digest[:])
	for name, text := range map[string]string{"VERSION": version, "SHA256SUMS": sum + "  " + filepath.Base(archive)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text+"\n"), 0o644); err != nil {
			m.t.Fatal(err)
		}
	}
	return dir, archive, sum
}

// TestUpgrade: berthd is upgraded while people work, and goes back where the new one is no good.
func TestUpgrade(t *testing.T) {
	m := newMachine(t)
	hosted, _, _ := m.pack("v9.9.1", m.release("v9.9.1"))
	r := newRoadOn(m, "agents:\n  - name: box\n", "--agent-binaries", hosted)
	installed := r.install("berthd", "berthd-ptyhost")
	program := filepath.Join(installed, "berthd")
	r.runFrom(installed)
	r.waitConnected(20 * time.Second)
	pid := r.agent.cmd.Process.Pid
	work := r.mesh()
	kept := func(input string) {
		t.Helper()
		work.see("work", "", input, func(seen string) bool { return strings.Contains(seen, "kept=42") })
	}
	work.see("work", "bash --norc", "n=$((6*7)); echo kept=$n\n", func(seen string) bool { return strings.Contains(seen, "kept=42") })
	first := strings.Fields(r.must(program, "version"))[1]

	upgrade := func(args ...string) *exec.Cmd {
		return r.command(program, append([]string{"upgrade", "--socket", filepath.Join(r.home, "state", "berthd.sock")}, args...)...)
	}
	// runs looks whether a version runs in the same process, with the terminal as it was.
	runs := func(version string) {
		t.Helper()
		if got := strings.Fields(r.must(fmt.Sprintf("/proc/%d/exe", pid), "version"))[1]; got != version {
			t.Errorf("%s runs, want %s", got, version)
		}
		r.waitConnected(20 * time.Second)
		kept("clear; echo kept=$n\n")
	}

	if out, err := upgrade("--check").CombinedOutput(); err != nil || !strings.Contains(string(out), "hosts v9.9.1") {
		t.Fatalf("%v: %s", err, out)
	}
	runs(first)

	// A command over SSH that runs is waited for.
	busy := r.pipe("ssh", "box", "cat")
	busy.ask("here", "here")
	forth := r.startCommand(upgrade(), "upgrade")
	forth.wait("to end (1 now)", 60*time.Second)
	busy.ask("still here", "still here")
	busy.in.Close()
	forth.wait("v9.9.1 serves", 60*time.Second)
	runs("v9.9.1")
	if out, err := upgrade().CombinedOutput(); err != nil || !strings.Contains(string(out), "nothing to do") {
		t.Errorf("%v: %s", err, out)
	}

	if out, err := upgrade("--previous").CombinedOutput(); err != nil || !strings.Contains(string(out), first+" serves") {
		t.Fatalf("%v: %s", err, out)
	}
	runs(first)

	if out, err := upgrade("--sha256", strings.Repeat("0", 64)).CombinedOutput(); err == nil || !strings.Contains(string(out), "nothing was changed") {
		t.Errorf("%v: %s", err, out)
	}
	runs(first)

	// Those that can tell their version, and then do nothing, or end.
	for version, broken := range map[string]struct{ does, said string }{
		"v9.9.2": {"exec sleep 600", "did not come up within 3s: it does not answer"},
		"v9.9.3": {"exit 1", "did not come up within 2s: it ended"},
	} {
		dir := filepath.Join(r.tmp, "broken-"+version)
		r.must("mkdir", dir)
		if err := os.WriteFile(filepath.Join(dir, "berthd"), []byte("#!/bin/sh\n[ $1 = version ] && echo berthd "+version+" && exit\n"+broken.does+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		_, archive, sum := r.pack(version, dir)
		out, err := upgrade("--file", archive, "--sha256", sum, "--timeout", "3s").CombinedOutput()
		if err == nil || !strings.Contains(string(out), version+" "+broken.said) || !strings.Contains(string(out), first+" is back") {
			t.Errorf("%v: %s", err, out)
		}
		r.waitConnected(20 * time.Second)
		kept("clear; echo kept=$n\n")
		if got := strings.Fields(r.must(program, "version"))[1]; got != first {
			t.Errorf("%s is installed, want %s", got, first)
		}
	}
}

// TestAutoUpgrade: a berthd that was told to follows its server.
func TestAutoUpgrade(t *testing.T) {
	m := newMachine(t)
	hosted, _, _ := m.pack("v9.9.1", m.release("v9.9.1"))
	r := newRoadOn(m, "agents:\n  - name: box\n", "--agent-binaries", hosted)
	program := filepath.Join(r.install("berthd", "berthd-ptyhost"), "berthd")
	r.agent = r.start(program, []string{"BERTH_URL=" + r.url(), "BERTH_TOKEN=" + r.token, "BERTH_AUTO_UPGRADE=true"}, "run", "--state-dir", filepath.Join(r.home, "state"))
	r.agent.wait("v9.9.1 serves", 60*time.Second)
	r.waitConnected(20 * time.Second)
	if out := r.must(fmt.Sprintf("/proc/%d/exe", r.agent.cmd.Process.Pid), "version"); !strings.HasPrefix(out, "berthd v9.9.1 ") {
		t.Errorf("what runs is %s", out)
	}
	if out := r.agent.output(); strings.Contains(out, r.token) || strings.Count(out, "takes the place of this one") != 2 { // who starts the upgrade says so, and who is told to leave
		t.Errorf("it said:\n%s", out)
	}
}
