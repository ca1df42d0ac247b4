package main

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// populate starts the processes of a machine and waits until all of them are as they should be.
func populate(m machine) error {
	ready, said, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	begin := func(flags uintptr, listeners, connections int) error {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d", roleVar, listeners, connections), "GOMAXPROCS=1")
		cmd.ExtraFiles = []*os.File{said}
		cmd.Stderr = os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
		return cmd.Start() // it ends with the machine
	}
	all := 0
	for _, group := range []struct {
		n                      int
		flags                  uintptr
		listeners, connections int
	}{
		{m.processes, 0, m.listeners, m.connections},
		{m.idle, 0, 0, 0},
		{m.namespaces, syscall.CLONE_NEWNET, 1, 0},
	} {
		for range group.n {
			if err := begin(group.flags, group.listeners, group.connections); err != nil {
				return fmt.Errorf("cannot start a process: %w", err)
			}
			all++
		}
	}
	said.Close()
	return wait(ready, all)
}

// play is a process of a machine: it opens what its role says by plain system calls, so that nothing of it wakes up, and stays.
func play(role string) error {
	var listeners, connections int
	if _, err := fmt.Sscan(role, &listeners, &connections); err != nil {
		return fmt.Errorf("cannot play %q: %w", role, err)
	}
	for i := range listeners {
		l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("cannot open a socket: %w", err)
		}
		if err := unix.Bind(l, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			return fmt.Errorf("cannot bind a socket: %w", err)
		}
		if err := unix.Listen(l, 128); err != nil {
			return fmt.Errorf("cannot listen: %w", err)
		}
		if i > 0 {
			continue
		}
		at, err := unix.Getsockname(l)
		if err != nil {
			return fmt.Errorf("cannot tell an address: %w", err)
		}
		for range connections {
			if err := connect(l, at); err != nil {
				return err
			}
		}
	}
	if _, err := unix.Write(3, []byte{'.'}); err != nil {
		return fmt.Errorf("cannot say that we are ready: %w", err)
	}
	unix.Close(3)
	return unix.Pause()
}

// connect makes a connection to a listener of this process, and keeps both ends.
func connect(listener int, at unix.Sockaddr) error {
	c, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot open a socket: %w", err)
	}
	if err := unix.Connect(c, at); err != nil {
		return fmt.Errorf("cannot connect: %w", err)
	}
	if _, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC); err != nil {
		return fmt.Errorf("cannot accept: %w", err)
	}
	return nil
}
