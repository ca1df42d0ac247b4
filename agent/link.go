package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/berthd/berth/client"
)

const (
	// dialTimeout bounds one attempt to link, the identity exchange included. A metadata service
	// that drops packets and a slow relay of the server's cloud both fit.
	dialTimeout = time.Minute
	// lasted is how long a session must have held for its loss to count as a new trouble rather
	// than as one more failed attempt.
	lasted = 30 * time.Second
	// lossGrace is how long a token that was good is refused until it counts as lost: time to write
	// another one into its file, and short enough for the machine to be back within half a minute.
	lossGrace = 20 * time.Second
)

// errClockJumped ends a session because the machine slept or its clock was set.
var errClockJumped = errors.New("the clock jumped: this machine slept, or its time was set")

// errAgentChanged ends a session because the server gave another agent id than before.
var errAgentChanged = errors.New("the server made this workspace another agent")

// session is what one successful dial leads to.
type session interface {
	// run does the agent's duties until something ends the session, and returns what.
	run(context.Context) error
	// Close cuts the connection.
	Close() error
}

// link keeps a session with the control server up. It never gives up: only ctx, a refused token
// under a policy that says so, and a change of the agent's identity end it.
type link struct {
	dial      func(context.Context) (session, error)
	onRefused RefusedPolicy
	renews    bool // the identity may give another token by itself
	event     func(Event)
	trouble   *trouble // with dialling
	flapping  *trouble // with sessions that end soon
	log       *slog.Logger
	wall      func() time.Time
	// closing is closed when the workspace closes: what is dialled from then on is dialled once, and over ends when that
	// came to nothing. Nobody is to wait for a link then.
	closing <-chan struct{}
	over    context.Context
	giveUp  context.CancelFunc

	wasGood bool        // some token was taken
	refused atomic.Bool // the link has ended because of the policy
}

func (l *link) run(ctx context.Context) error {
	jumps := make(chan time.Duration, 1)
	watching := make(chan struct{})
	watchCtx, stop := context.WithCancel(ctx)
	go func() {
		defer close(watching)
		watchClock(watchCtx, l.wall, func(gap time.Duration) {
			select {
			case jumps <- gap:
			default: // one redial answers any number of jumps
			}
		})
	}()
	defer func() { stop(); <-watching }()

	pace := client.NewPace()
	refusals, since := 0, time.Time{}
	for {
		last := l.closes()
		held, err := l.attempt(ctx, jumps)
		if ctx.Err() != nil {
			return nil
		}
		if last {
			l.giveUp()
			<-ctx.Done()
			return nil
		}
		if errors.Is(err, errAgentChanged) {
			return err
		}
		problem := client.Explain(err)
		if problem.Kind != client.KindRefused {
			refusals = 0
		} else if refusals++; refusals == 1 {
			since = time.Now()
		}
		if l.hopeless(refusals, since) {
			l.refused.Store(true)
			return fmt.Errorf("%w: %w", ErrRefused, problem)
		}
		if held >= lasted || errors.Is(err, errClockJumped) {
			pace.Reset()
		}
		pace.Known = l.wasGood
		wait := pace.After(problem)
		if refusals == 1 {
			// The token may have been replaced just now: prove anew at once.
			wait = pace.Soon()
		} else if refusals > 0 && l.mayLose() {
			wait = min(wait, time.Until(since.Add(lossGrace)))
		}
		if !l.pause(ctx, wait, jumps) {
			return nil
		}
	}
}

// closes tells whether the workspace closes.
func (l *link) closes() bool {
	select {
	case <-l.closing:
		return true
	default:
		return false
	}
}

// pause waits before the next attempt; a jump of the clock cuts it short, and so does the end of the workspace. It returns
// false if ctx is done first.
func (l *link) pause(ctx context.Context, d time.Duration, jumps <-chan time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
	case <-jumps:
	case <-l.closing:
	}
	return true
}

// mayLose tells whether a token that goes on being refused counts as lost.
func (l *link) mayLose() bool { return l.onRefused == ExitWhenLost && l.wasGood && !l.renews }

// hopeless tells whether the policy says to leave after so many refusals in a row.
func (l *link) hopeless(refusals int, since time.Time) bool {
	if l.onRefused == ExitWhenRefused {
		return refusals > 1
	}
	return refusals > 1 && l.mayLose() && time.Since(since) >= lossGrace
}

// attempt links once and stays with it. It returns how long the session held, and why it ended.
func (l *link) attempt(ctx context.Context, jumps <-chan time.Duration) (time.Duration, error) {
	dialCtx, cancel := context.WithTimeout(ctx, dialTimeout)
	up, err := l.dial(dialCtx)
	cancel()
	if err != nil {
		l.explain(ctx, err)
		return 0, err
	}
	defer up.Close()
	l.wasGood = true

	select {
	case <-jumps: // what jumped before we were linked has no session to end
	default:
	}

	settled := time.AfterFunc(lasted, l.flapping.clear)
	defer settled.Stop()
	since := time.Now()
	sessionCtx, end := context.WithCancelCause(ctx)
	defer end(nil)
	ended := make(chan error, 1)
	go func() { ended <- up.run(sessionCtx) }()
	select {
	case err = <-ended:
	case gap := <-jumps:
		l.log.Info("the clock jumped; linking anew", "by", gap.Round(time.Second))
		end(errClockJumped)
		up.Close()
		<-ended
		err = errClockJumped
	}
	held := time.Since(since)
	if ctx.Err() == nil {
		l.lost(held, err)
	}
	return held, err
}

// explain tells a person why linking failed.
func (l *link) explain(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return
	}
	problem := client.Explain(err)
	if l.trouble.report(problem.Cause, problem.Fix) {
		l.log.Debug("the error in full", "error", err)
	}
	l.event(Event{Step: StepTrouble, Cause: problem.Cause, Fix: problem.Fix})
}

// lost tells that a session ended. A short one is a trouble like a failed dial; a long one is news.
func (l *link) lost(held time.Duration, err error) {
	if held < lasted && !errors.Is(err, errClockJumped) && !errors.Is(err, errAgentChanged) {
		l.flapping.report(fmt.Sprintf("the link to the control server was lost as soon as it was made: %v", err), "see the server's log if this goes on")
	} else {
		l.log.Info("the link to the control server is lost; linking anew", "after", held.Round(time.Second), "reason", err)
	}
	l.event(Event{Step: StepLost, Detail: err.Error()})
}

// pause waits for d. It returns false if ctx is done first.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
