//go:build !linux

package main

import (
	"os/exec"
	"syscall"
	"time"
)

// childAttributes keep Ctrl-C on the terminal from the agent, which is stopped in its turn.
func childAttributes() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }

func startTied(cmd *exec.Cmd) error { return cmd.Start() }

// sweep has nothing to find: only Linux tells a process of what its children leave behind.
func sweep(time.Duration) {}
