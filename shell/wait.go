package shell

import (
	"os"
	"os/exec"
)

// Wait is cmd.Wait, but while the command runs no thread of this process stands still for it: each costs some 50 KiB, and commands may run
// for days.
func Wait(cmd *exec.Cmd) error {
	awaitExit(cmd.Process.Pid)
	return cmd.Wait()
}

// Reap waits as [Wait] does for a process that no [exec.Cmd] of this program stands for: a child from before execve(2).
func Reap(pid int) {
	awaitExit(pid)
	if p, err := os.FindProcess(pid); err == nil {
		_, _ = p.Wait() // it says how it ended to nobody who wants to know
	}
}
