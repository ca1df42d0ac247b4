package berthd

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

// envInit tells berthd that process 1 is an init of ours. It is not passed on.
const envInit = "BERTHD_INIT"

// isInit tells whether this process has to be an init: it is process 1, whose children are all that are orphaned in its container.
func (p process) isInit() bool { return os.Getpid() == 1 && p.env[envInit] == "" }

// endsContainer tells whether the end of this process is that of its container.
func (p process) endsContainer() bool { return os.Getpid() == 1 || p.env[envInit] != "" }

// initProgram is process 1 of a container. It runs berthd, and apart from that only what nobody else may do: it waits for every process that is
// orphaned. berthd waits for children of its own by their ids, which an init in the same process would take from it.
type initProgram struct {
	mu       sync.Mutex
	child    int  // 0 while there is none
	stopping bool // it was told to end
}

// runInit runs berthd, called as whole says, until it ends for good, and ends as it does: with its code, or 128 and the signal that killed it.
func runInit(whole []string, environ []string) error {
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("cannot find berthd's own program: %w", err)
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	var one initProgram
	go func() {
		for sig := range signals {
			one.forward(sig.(syscall.Signal))
		}
	}()
	argv := append(selfCommand(whole), whole...)
	environ = append(environ, envInit+"=1")
	for {
		if err := one.start(exe, argv, environ); err != nil {
			return fmt.Errorf("cannot start berthd: %w", err)
		}
		status, again := one.wait()
		switch {
		case status.Signaled():
			return exitStatus(128 + int(status.Signal()))
		case status.ExitStatus() == ExitRestart && again:
		case status.ExitStatus() != ExitOK:
			return exitStatus(status.ExitStatus())
		default:
			return nil
		}
	}
}

func (i *initProgram) start(exe string, argv, environ []string) (err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.child, err = syscall.ForkExec(exe, argv, &syscall.ProcAttr{Env: environ, Files: []uintptr{0, 1, 2}})
	if err == nil && i.stopping { // told while there was none
		err = syscall.Kill(i.child, syscall.SIGTERM)
	}
	return err
}

// forward passes a signal on.
func (i *initProgram) forward(sig syscall.Signal) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.stopping = i.stopping || sig == syscall.SIGTERM || sig == syscall.SIGINT
	if i.child != 0 {
		_ = syscall.Kill(i.child, sig) // it may have ended just now
	}
}

// wait waits for orphans, and for berthd, whose end it tells, and whether it may be started again.
func (i *initProgram) wait() (status syscall.WaitStatus, again bool) {
	for {
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		i.mu.Lock()
		ended := err != nil || pid == i.child // without a child there is nothing to wait for
		if ended {
			i.child = 0
		}
		again = !i.stopping
		i.mu.Unlock()
		if ended {
			return status, again
		}
	}
}
