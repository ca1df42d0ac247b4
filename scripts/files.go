package scripts

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/wire/agentpb"
)

const (
	// copyBuffer is what is read of a pipe at once.
	copyBuffer = 64 << 10
	// gather is how long output may gather in a pipe when it came in small pieces: a script that prints line by
	// line, faster than others see, would wake us for each. The pipe has room for much more meanwhile.
	gather = 2 * time.Millisecond
)

// files are where the output of one run goes.
type files struct {
	stdout, stderr *pipe
	logFile        *os.File // nil when there is none
	log            *slog.Logger
	failed         sync.Once     // the log file's failure is said once
	eof            chan struct{} // closed when nobody holds the pipes any more, or nobody reads them
}

// pipe is one output stream.
type pipe struct {
	read, write *os.File
	to          io.WriteCloser
}

func (r *Runner) openFiles(s *agentpb.WorkspaceAgentScript, source uuid.UUID) (*files, error) {
	stdout, err := r.openPipe(source, agentpb.Log_INFO)
	if err != nil {
		return nil, err
	}
	stderr, err := r.openPipe(source, agentpb.Log_ERROR)
	if err != nil {
		return nil, errors.Join(err, stdout.read.Close(), stdout.write.Close(), stdout.to.Close())
	}
	return &files{stdout: stdout, stderr: stderr, logFile: r.openLog(s, source), log: r.cfg.Log, eof: make(chan struct{})}, nil
}

func (r *Runner) openPipe(source uuid.UUID, level agentpb.Log_Level) (*pipe, error) {
	read, write, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("cannot make a pipe for the script's output: %w", err)
	}
	widen(read)
	return &pipe{read, write, r.cfg.Logs(source, level)}, nil
}

// closeWriteEnds lets go of the ends that the child has now. Closing twice is harmless.
func (f *files) closeWriteEnds() {
	f.stdout.write.Close()
	f.stderr.write.Close()
}

// follow copies both streams until their ends, or that of ctx.
func (f *files) follow(ctx context.Context) {
	defer close(f.eof)
	defer context.AfterFunc(ctx, func() {
		f.stdout.read.Close()
		f.stderr.read.Close()
	})()
	var both sync.WaitGroup
	both.Go(func() { f.copy(f.stdout) })
	both.Go(func() { f.copy(f.stderr) })
	both.Wait()
	if f.logFile != nil {
		f.note(f.logFile.Close())
	}
}

func (f *files) copy(p *pipe) {
	defer p.read.Close()
	buf := make([]byte, copyBuffer)
	for {
		n, err := p.read.Read(buf)
		if n > 0 {
			f.write(p.to, buf[:n])
		}
		if err != nil { // the end, or the end of our interest
			f.note(p.to.Close())
			return
		}
		if n < copyBuffer/2 {
			time.Sleep(gather)
		}
	}
}

// write passes output on. A full disk must neither stop the script nor its way to the server.
func (f *files) write(to io.Writer, b []byte) {
	_, err := to.Write(b)
	if f.logFile != nil {
		_, fileErr := f.logFile.Write(b)
		err = errors.Join(err, fileErr)
	}
	f.note(err)
}

func (f *files) note(err error) {
	if err != nil {
		f.failed.Do(func() { f.log.Warn("a part of a script's output is lost", "err", err) })
	}
}

// drained tells whether all output came within the grace.
func (f *files) drained(grace time.Duration, stop <-chan struct{}) bool {
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-f.eof:
		return true
	case <-timer.C:
	case <-stop:
	}
	return false
}

// holders names the processes that hold the streams open, with the verb that fits.
func (f *files) holders() string {
	names := pipeHolders(f.stdout.read, f.stderr.read)
	switch len(names) {
	case 0:
		return "some process holds"
	case 1:
		return names[0] + " holds"
	}
	return strings.Join(names, ", ") + " hold"
}
