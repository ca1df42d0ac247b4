package shell

import (
	"os"
	"os/exec"
	"sync"
	"testing"
)

// TestWaitTakesNoThread: many commands are waited for, and the process does not get a thread for each.
func TestWaitTakesNoThread(t *testing.T) {
	const commands = 100
	threads := func() int {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		return len(tasks)
	}
	before := threads()
	release, held, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer release.Close()
	var waiting sync.WaitGroup
	codes := make([]int, commands)
	for i := range commands {
		cmd := exec.Command("/bin/sh", "-c", "read line; exit 7")
		cmd.Stdin = release
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		waiting.Go(func() {
			Wait(cmd)
			codes[i] = cmd.ProcessState.ExitCode()
		})
	}
	if more := threads() - before; more > commands/4 {
		t.Errorf("%d commands take %d threads", commands, more)
	}
	held.Close()
	waiting.Wait()
	for i, code := range codes {
		if code != 7 {
			t.Errorf("command %d: exit code %d, want 7", i, code)
		}
	}
}
