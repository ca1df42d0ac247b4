package berthd

import (
	"bytes"
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// container is a berthd that is process 1 of a process namespace.
type container struct {
	*daemon
	init int // its process 1, as it is known outside
}

func startContainer(t *testing.T, args ...string) *container {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("a process namespace needs root")
	}
	srv := httptest.NewServer(answer(503, "Wait."))
	t.Cleanup(srv.Close)
	argv := append([]string{"--pid", "--fork", "--mount-proc", "--kill-child", os.Args[0]}, args...)
	c := &container{daemon: launch(t, exec.Command("unshare", argv...), []string{"BERTH_URL=" + srv.URL})}
	c.says("level=WARN", "Wait")
	one := children(t, c.cmd.Process.Pid)
	if len(one) != 1 {
		t.Fatalf("unshare has the children %v", one)
	}
	c.init = one[0]
	t.Cleanup(func() { syscall.Kill(c.init, syscall.SIGKILL) })
	return c
}

// children are those of a process, as all its threads have made them.
func children(t *testing.T, pid int) []int {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	var found []int
	for _, file := range files {
		text, _ := os.ReadFile(file) // a thread may have ended
		for word := range strings.FieldsSeq(string(text)) {
			if child, err := strconv.Atoi(word); err == nil {
				found = append(found, child)
			}
		}
	}
	return found
}

// berthd is the child of the init that is berthd itself; the owner of the terminals may be another.
func (c *container) berthd() int {
	c.t.Helper()
	for _, pid := range children(c.t, c.init) {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if len(cmdline) > 0 && !bytes.Contains(cmdline, []byte("ptyhost")) {
			return pid
		}
	}
	c.t.Fatal("berthd is no child of the init")
	return 0
}

func (c *container) signal(pid int, sig syscall.Signal) {
	c.t.Helper()
	if err := syscall.Kill(pid, sig); err != nil {
		c.t.Fatal(err)
	}
}

// TestInitReaps: whatever is orphaned in the container is waited for.
func TestInitReaps(t *testing.T) {
	c := startContainer(t)
	const orphans = 300
	script := fmt.Sprintf("i=0; while [ $i -lt %d ]; do (sleep 0.01 &); i=$((i+1)); done", orphans)
	enter := []string{"--target", strconv.Itoa(c.init), "--pid", "--mount"}
	if out, err := exec.Command("nsenter", append(enter, "sh", "-c", script)...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	limit := time.Now().Add(20 * time.Second)
	for {
		out, err := exec.Command("nsenter", append(enter, "sh", "-c", "cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z ' || true")...).Output()
		if err != nil {
			t.Fatal(err)
		}
		if string(out) == "0\n" {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("%s of %d orphans are not waited for", bytes.TrimSpace(out), orphans)
		}
		time.Sleep(50 * time.Millisecond)
	}
	c.signal(c.init, syscall.SIGTERM)
	if code := c.wait(); code != ExitOK {
		t.Errorf("exit code %d after SIGTERM, want %d", code, ExitOK)
	}
}

// TestInitPassesOn: signals, what a killed berthd ends with, and a start in place on SIGHUP.
func TestInitPassesOn(t *testing.T) {
	c := startContainer(t)
	before := c.berthd()
	c.signal(c.init, syscall.SIGHUP)
	c.says("to be started again")
	c.says("berthd starts")
	c.says("level=WARN", "Wait")
	now := c.berthd()
	if now == before {
		t.Error("berthd was not started again")
	}
	if env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", c.init)); err != nil || bytes.Contains(env, []byte(envInit)) {
		t.Errorf("the init takes itself for another's child: %v", err)
	}
	c.signal(now, syscall.SIGKILL)
	if code := c.wait(); code != 128+int(syscall.SIGKILL) {
		t.Errorf("exit code %d of one that was killed, want %d", code, 128+int(syscall.SIGKILL))
	}
}

// TestNoInit: --no-reap leaves process 1 to berthd.
func TestNoInit(t *testing.T) {
	c := startContainer(t, "--no-reap")
	c.signal(c.init, syscall.SIGHUP)
	if code := c.wait(); code != ExitRestart {
		t.Errorf("exit code %d, want %d", code, ExitRestart)
	}
}
