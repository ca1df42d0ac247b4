package hold

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/oom"
)

// What a holder's process inherits.
const (
	connFile = 3 + iota
	logFile
)

// maxJob bounds a job: the longest environment that Linux takes is 6 MiB.
const maxJob = 16 << 20

// inherited is a job as a process gets it, on its standard input. What may be no text goes as bytes, which JSON leaves alone.
type inherited struct {
	Job       Job
	Path, Dir []byte
	Args, Env [][]byte
	HasLog    bool
}

func bequeath(job Job, hasLog bool) ([]byte, error) {
	i := inherited{Job: job, Path: []byte(job.Path), Dir: []byte(job.Dir), Args: convert[[]byte](job.Args), Env: convert[[]byte](job.Env), HasLog: hasLog}
	i.Job.Path, i.Job.Dir, i.Job.Args, i.Job.Env = "", "", nil, nil
	return json.Marshal(i)
}

func inherit(text []byte) (job Job, hasLog bool, err error) {
	var i inherited
	if err := json.Unmarshal(text, &i); err != nil {
		return Job{}, false, err
	}
	job = i.Job
	job.Path, job.Dir, job.Args, job.Env = string(i.Path), string(i.Dir), convert[string](i.Args), convert[string](i.Env)
	if len(job.Args) == 0 {
		return Job{}, false, errors.New("there is no command")
	}
	return job, i.HasLog, nil
}

func convert[To, From string | []byte](list []From) []To {
	var converted []To
	for _, one := range list {
		converted = append(converted, To(one))
	}
	return converted
}

// Start starts the process of a holder, which outlives this one. cmd is to call [RunProcess]; with credential, which may be nil, it
// runs as another user. log, which may be nil, gets all output.
func Start(cmd *exec.Cmd, credential *syscall.Credential, job Job, log *os.File) (*Held, error) {
	text, err := bequeath(job, log != nil)
	if err != nil {
		return nil, fmt.Errorf("cannot start a script's holder: %w", err)
	}
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, fmt.Errorf("cannot start a script's holder: %w", err)
	}
	cmd.Stdin = bytes.NewReader(text)
	cmd.ExtraFiles = []*os.File{theirs}
	if log != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, log)
	}
	cmd.Dir = "/" // keep no file system busy
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: credential}
	err = oom.Start(cmd)
	theirs.Close()
	if err != nil {
		ours.Close()
		return nil, fmt.Errorf("cannot start a script's holder: %w", err)
	}
	ended := make(chan struct{})
	go func() { // it ends with cmd, or with this process
		defer close(ended)
		cmd.Wait()
	}()
	held, err := Attach(ours)
	if err != nil {
		return nil, err
	}
	held.ended = ended
	return held, nil
}

// socketPair makes two sockets that are connected with each other.
func socketPair() (net.Conn, *os.File, error) {
	syscall.ForkLock.RLock()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err == nil {
		unix.CloseOnExec(fds[0])
		unix.CloseOnExec(fds[1])
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "holder"), os.NewFile(uintptr(fds[1]), "holder")
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return conn, theirs, nil
}

// RunProcess is the whole life of a holder's process, which [Start] has started.
func RunProcess() error {
	// A script's end is said to it, not signalled: a stop of the machine sends this to all at once. And a signal that was ignored when we were
	// started would stay ignored in the command: catching it makes it a default again there.
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM)
	defer signal.Stop(caught)
	text, err := io.ReadAll(io.LimitReader(os.Stdin, maxJob))
	if err != nil {
		return fmt.Errorf("cannot read what to hold: %w", err)
	}
	job, hasLog, err := inherit(text)
	if err != nil {
		return fmt.Errorf("cannot read what to hold (berthd starts this by itself): %w", err)
	}
	unix.CloseOnExec(connFile)
	file := os.NewFile(connFile, "conn")
	conn, err := net.FileConn(file)
	if err = errors.Join(err, file.Close()); err != nil {
		return fmt.Errorf("cannot speak with who started this: %w", err)
	}
	var log *os.File
	if hasLog {
		unix.CloseOnExec(logFile)
		log = os.NewFile(logFile, "log")
	}
	Run(job, nil, conn, log)
	return nil
}
