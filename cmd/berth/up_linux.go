package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// childAttributes keep Ctrl-C on the terminal from the agent, which is stopped in its turn, and end it
// if this process is killed.
func childAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
}

// startTied starts cmd so that whatever it leaves running becomes a child of this process, where sweep
// finds it: terminals outlive the agent on purpose.
func startTied(cmd *exec.Cmd) error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	// The kernel sends Pdeathsig when the thread that started the child ends, so that thread stays.
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			select {}
		}
	}()
	return <-started
}

// sweep ends every child of this process: politely at first, by force after grace.
func sweep(grace time.Duration) {
	const step = 20 * time.Millisecond
	deadline := time.Now().Add(grace)
	told := map[int]bool{}
	for {
		left := children()
		if len(left) == 0 {
			return
		}
		for _, pid := range left {
			switch {
			case time.Now().After(deadline):
				unix.Kill(pid, unix.SIGKILL)
			case !told[pid]:
				told[pid] = true
				// Shells ignore SIGTERM but not the loss of their terminal.
				unix.Kill(pid, unix.SIGHUP)
				unix.Kill(pid, unix.SIGTERM)
			}
			unix.Wait4(pid, nil, unix.WNOHANG, nil)
		}
		time.Sleep(step)
	}
}

// children lists the processes whose parent this one is, zombies included.
func children() []int {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	var pids []int
	for _, stat := range stats {
		data, err := os.ReadFile(stat)
		if err != nil {
			continue // it has ended
		}
		// "pid (name) state ppid …", where the name may hold anything.
		pid, _, _ := bytes.Cut(data, []byte(" "))
		fields := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
		if len(fields) < 2 || string(fields[1]) != strconv.Itoa(os.Getpid()) {
			continue
		}
		if n, err := strconv.Atoi(string(pid)); err == nil {
			pids = append(pids, n)
		}
	}
	return pids
}
