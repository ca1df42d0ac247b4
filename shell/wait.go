package shell

import "os/exec"

// Wait is cmd.Wait, but while the command runs no thread of this process stands still for it: each costs some 50 KiB, and commands may run
// for days.
func Wait(cmd *exec.Cmd) error {
	awaitExit(cmd.Process.Pid)
	return cmd.Wait()
}
