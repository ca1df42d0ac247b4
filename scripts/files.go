package scripts

import (
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/berthd/berth/scripts/hold"
	"github.com/berthd/berth/wire/agentpb"
)

// output is where one run's goes.
type output struct {
	takers [2]hold.Taker
	eof    chan struct{} // closed when nobody holds the pipes any more, or nobody reads them
	lost   error         // why nobody does, if there could be more; to be read after eof
}

func (r *Runner) openOutput(t tag, kept [2]uint64) *output {
	o := &output{eof: make(chan struct{})}
	failed := &failure{log: r.cfg.Log}
	for i, level := range map[int]agentpb.Log_Level{hold.Stdout: agentpb.Log_INFO, hold.Stderr: agentpb.Log_ERROR} {
		var to hold.Taker
		if r.cfg.Stream != nil {
			to = r.cfg.Stream(t.Source, level, t.stream(i), kept[i])
		} else {
			to = &counted{r.cfg.Logs(t.Source, level), kept[i]}
		}
		o.takers[i] = watched{to, failed}
	}
	return o
}

// drained tells whether all output came within the grace.
func (o *output) drained(grace time.Duration, stop <-chan struct{}) bool {
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-o.eof:
		return true
	case <-timer.C:
	case <-stop:
	}
	return false
}

// counted is a taker that has settled all that it was given.
type counted struct {
	io.WriteCloser
	taken uint64
}

// Write passes b on, and has it then, one way or the other.
func (c *counted) Write(b []byte) (int, error) {
	c.taken += uint64(len(b))
	return c.WriteCloser.Write(b)
}

// Settled implements [hold.Taker].
func (c *counted) Settled() uint64 { return c.taken }

// watched is a taker whose errors are told.
type watched struct {
	hold.Taker
	failed *failure
}

// Write implements [io.Writer].
func (w watched) Write(b []byte) (int, error) {
	n, err := w.Taker.Write(b)
	w.failed.note(err)
	return n, err
}

// Close implements [io.Closer].
func (w watched) Close() error {
	err := w.Taker.Close()
	w.failed.note(err)
	return err
}

// failure is said once.
type failure struct {
	log  *slog.Logger
	once sync.Once
}

func (f *failure) note(err error) {
	if err != nil {
		f.once.Do(func() { f.log.Warn("a part of a script's output is lost", "err", err) })
	}
}
