package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// memoryGroup makes a control group with so many bytes of memory and no swap, and returns its cgroup.procs.
func (m *machine) memoryGroup(limit int) (procs string) {
	m.t.Helper()
	dir, file, swap := "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
	if !exists(dir) { // version 2
		dir, file, swap = "/sys/fs/cgroup", "memory.max", "memory.swap.max"
		if err := os.WriteFile(dir+"/cgroup.subtree_control", []byte("+memory"), 0); err != nil {
			m.t.Fatalf("this test gives a control group a memory limit, which needs root and the memory controller: %v", err)
		}
	}
	dir = filepath.Join(dir, fmt.Sprintf("berth-e2e-%d", os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		m.t.Fatalf("this test makes a memory control group, which needs root: %v", err)
	}
	m.t.Cleanup(func() {
		m.reap()
		eventually(m.t, 20*time.Second, "the control group is empty", func() bool { return os.Remove(dir) == nil })
	})
	if err := os.WriteFile(filepath.Join(dir, file), fmt.Append(nil, limit), 0); err != nil {
		m.t.Fatal(err)
	}
	// Where the kernel does not count swap there is no such file.
	if value := map[bool]string{true: "0", false: fmt.Sprint(limit)}[file == "memory.max"]; exists(filepath.Join(dir, swap)) {
		if err := os.WriteFile(filepath.Join(dir, swap), []byte(value), 0); err != nil {
			m.t.Fatal(err)
		}
	}
	return filepath.Join(dir, "cgroup.procs")
}

// inGroup starts a program as a daemon in a control group.
func (m *machine) inGroup(procs, name string, env []string, args ...string) *daemon {
	m.t.Helper()
	cmd := m.command("sh", append([]string{"-c", `echo $$ >"$0" && exec "$@"`, procs, name}, args...)...)
	cmd.Env = m.env(env...)
	return m.startCommand(cmd, name)
}

// TestOutOfMemory: berthd and its workspace share a control group of 256 MiB. A command that eats all of it is ended, and
// berthd lives and tells. When the kernel ends berthd itself, the next one says so, and so does berth status.
func TestOutOfMemory(t *testing.T) {
	r := newRoad(t, "agents:\n  - name: box\n")
	procs := r.memoryGroup(256 << 20)
	run := func() {
		r.agent = r.inGroup(procs, "berthd", []string{"BERTH_URL=" + r.url(), "BERTH_TOKEN=" + r.token}, "run", "--state-dir", filepath.Join(r.home, "state"))
	}
	run()
	r.waitConnected(20 * time.Second)
	if out, err := r.client("ssh", "box", "tail /dev/zero; echo ended $?").CombinedOutput(); err != nil || !strings.Contains(string(out), "ended 137") {
		t.Fatalf("a command that eats all memory: %v: %s", err, out)
	}
	r.agent.wait("the OOM killer ended processes in this workspace", 20*time.Second)
	if out := r.berth("ssh", "box", "echo alive"); strings.TrimSpace(out) != "alive" {
		t.Errorf("after that a command printed %q", out)
	}
	eventually(t, 20*time.Second, "berth status tells of the OOM killer", func() bool {
		return strings.Contains(r.status(), "the OOM killer ended 1 processes in this workspace")
	})

	// Now berthd is the first that the kernel chooses, and who eats is no child of it.
	r.agent.wait("ready", 20*time.Second)
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", r.agent.cmd.Process.Pid), []byte("1000"), 0); err != nil {
		t.Fatal(err)
	}
	r.inGroup(procs, "tail", nil, "/dev/zero")
	select {
	case <-r.agent.done:
	case <-time.After(20 * time.Second):
		t.Fatal("berthd lives")
	}
	run()
	r.agent.wait("was killed (SIGKILL) by the OOM killer", 20*time.Second)
	eventually(t, 20*time.Second, "berth status tells how the last berthd ended", func() bool {
		return strings.Contains(r.status(), "was killed (SIGKILL) by the OOM killer: oom_kill in ")
	})
	t.Log(r.status())
}
