package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/identity"
	"github.com/berthd/berth/wire"
)

// conn is a session that holds until it is cut.
type conn struct {
	gone chan struct{}
	once sync.Once
	err  error // what it ends with by itself, after held
	held time.Duration
}

func newConn() *conn { return &conn{gone: make(chan struct{})} }

func (c *conn) run(ctx context.Context) error {
	var end <-chan time.Time
	if c.err != nil {
		timer := time.NewTimer(c.held)
		defer timer.Stop()
		end = timer.C
	}
	select {
	case <-end:
		return c.err
	case <-c.gone:
		return errLinkClosed
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *conn) Close() error {
	c.once.Do(func() { close(c.gone) })
	return nil
}

// shiftedClock is wall time that a test can set.
type shiftedClock struct{ shift atomic.Int64 }

func (c *shiftedClock) now() time.Time { return time.Now().Add(time.Duration(c.shift.Load())) }

func (c *shiftedClock) jump(d time.Duration) { c.shift.Add(int64(d)) }

// newLink returns a link under test and what it logs.
func newLink(dial func(context.Context) (session, error)) (*link, *shiftedClock, *bytes.Buffer) {
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, nil))
	clock := &shiftedClock{}
	l := &link{
		dial:     dial,
		event:    func(Event) {},
		trouble:  &trouble{log: log},
		flapping: &trouble{log: log},
		log:      log,
		wall:     clock.now,
	}
	l.over, l.giveUp = context.WithCancel(context.Background())
	return l, clock, &out
}

// runFor runs l for a while of the bubble's time and returns when each dial was.
func runFor(t *testing.T, l *link, d time.Duration) []time.Duration {
	t.Helper()
	var dials []time.Duration
	began := time.Now()
	dial := l.dial
	l.dial = func(ctx context.Context) (session, error) {
		dials = append(dials, time.Since(began))
		return dial(ctx)
	}
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	if err := l.run(ctx); err != nil {
		t.Errorf("run: %v", err)
	}
	return dials
}

func status(code int) error { return &wire.Error{StatusCode: code, Message: http.StatusText(code)} }

func TestLinkNeverGivesUp(t *testing.T) {
	tests := map[string]struct {
		err      error
		min, max int // dials in an hour
	}{
		// The mean delay is half the ceiling: 5 s, 10 s where another token may be handed over or the
		// machine declared, 30 s where a person has to act, and a minute where it is this machine's settings.
		"server gone":   {errors.New("connection reset"), 360, 1500},
		"server busy":   {status(http.StatusServiceUnavailable), 360, 1500},
		"too early":     {status(http.StatusTooEarly), 360, 1500},
		"token refused": {status(http.StatusUnauthorized), 180, 750},
		"forbidden":     {status(http.StatusForbidden), 180, 750},
		"unknown":       {status(http.StatusNotFound), 180, 750},
		"too often":     {status(http.StatusTooManyRequests), 60, 250},
		"ambiguous":     {status(http.StatusConflict), 30, 125},
		"told when":     {&wire.Error{StatusCode: 503, Message: "wait", AnswerTiming: wire.AnswerTiming{RetryAfter: time.Minute}}, 48, 61},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, _, out := newLink(func(context.Context) (session, error) { return nil, tt.err })
				dials := runFor(t, l, time.Hour)
				if n := len(dials); n < tt.min || n > tt.max {
					t.Errorf("%d dials in an hour, want %d to %d", n, tt.min, tt.max)
				}
				if last := time.Hour - dials[len(dials)-1]; last > 2*time.Minute+time.Second {
					t.Errorf("the last dial was %v before the end: it gave up", last)
				}
				if lines := strings.Count(out.String(), "level=WARN"); lines < 2 || lines > 8 {
					t.Errorf("%d warnings in an hour for one trouble, want a few:\n%s", lines, out)
				}
			})
		})
	}
}

// TestLinkWhenTheWorkspaceCloses: one more attempt, at once, and then nobody is to wait for a link.
func TestLinkWhenTheWorkspaceCloses(t *testing.T) {
	for name, tt := range map[string]struct {
		held time.Duration // how long the first link holds; 0: there is none
		last time.Duration // when the last dial is
	}{
		"no link":             {0, time.Hour},
		"a link that is lost": {time.Hour + time.Minute, time.Hour + time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				held := tt.held
				l, _, _ := newLink(func(context.Context) (session, error) {
					if held == 0 {
						return nil, errors.New("connection refused")
					}
					c := newConn()
					c.err, c.held = errors.New("reset"), held
					held = 0
					return c, nil
				})
				closing, closeNow := context.WithTimeout(t.Context(), time.Hour)
				defer closeNow()
				l.closing = closing.Done()
				dials := runFor(t, l, 2*time.Hour)
				if last := dials[len(dials)-1]; last != tt.last || l.over.Err() == nil {
					t.Errorf("the last dial was after %v, want %v; over: %v", last, tt.last, l.over.Err())
				}
			})
		})
	}
}

func TestLinkProvesAnewAtOnceWhenRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, _, _ := newLink(func(context.Context) (session, error) { return nil, status(http.StatusUnauthorized) })
		dials := runFor(t, l, time.Second)
		if len(dials) < 2 || dials[1] > 200*time.Millisecond {
			t.Errorf("dials at %v, want the second at once", dials)
		}
	})
}

// TestLinkOnRefused: a link that was up for a minute finds its token refused from then on.
func TestLinkOnRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		policy   RefusedPolicy
		renews   bool
		never    bool          // was the token good
		earliest time.Duration // of the end after the first refusal; 0 means that it does not end
		latest   time.Duration
	}{
		"stay":                         {policy: StayWhenRefused},
		"at once":                      {policy: ExitWhenRefused, earliest: time.Nanosecond, latest: 200 * time.Millisecond},
		"at once, though it renews":    {policy: ExitWhenRefused, renews: true, earliest: time.Nanosecond, latest: 200 * time.Millisecond},
		"at once, though never good":   {policy: ExitWhenRefused, never: true, earliest: time.Nanosecond, latest: 200 * time.Millisecond},
		"lost":                         {policy: ExitWhenLost, earliest: lossGrace, latest: lossGrace + time.Second},
		"lost, but it renews itself":   {policy: ExitWhenLost, renews: true},
		"never good, so it is to come": {policy: ExitWhenLost, never: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				good := !tt.never
				var refused time.Time
				l, _, _ := newLink(func(context.Context) (session, error) {
					if good {
						good = false
						c := newConn()
						c.err, c.held = errLinkClosed, time.Minute
						return c, nil
					}
					if refused.IsZero() {
						refused = time.Now()
					}
					return nil, fmt.Errorf("cannot link: %w", status(http.StatusUnauthorized))
				})
				l.onRefused, l.renews = tt.policy, tt.renews
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				err := l.run(ctx)
				if took := time.Since(refused); tt.earliest > 0 && (!errors.Is(err, ErrRefused) || took < tt.earliest || took > tt.latest || !l.refused.Load()) {
					t.Errorf("run = %v after %v, want ErrRefused after %v to %v", err, took, tt.earliest, tt.latest)
				}
				if tt.earliest == 0 && (err != nil || l.refused.Load()) {
					t.Errorf("run = %v, want that it stays", err)
				}
			})
		})
	}
}

// TestLinkFindsANewBuild: while a workspace is built anew its machine is unknown, or known twice. It is
// back within half a minute of the build's end, however long that took.
func TestLinkFindsANewBuild(t *testing.T) {
	for _, code := range []int{http.StatusNotFound, http.StatusConflict, http.StatusTooEarly} {
		synctest.Test(t, func(t *testing.T) {
			const building = 20 * time.Minute
			began := time.Now()
			good := true
			var back time.Duration
			l, _, _ := newLink(func(context.Context) (session, error) {
				c := newConn()
				switch {
				case good:
					good = false
					c.err, c.held = errLinkClosed, time.Minute
				case time.Since(began) < building:
					return nil, status(code)
				case back == 0:
					back = time.Since(began) - building
				}
				return c, nil
			})
			runFor(t, l, time.Hour)
			if back == 0 || back > 30*time.Second {
				t.Errorf("%d: back %v after the build", code, back)
			}
		})
	}
}

// TestLinkComesBackWithinTheGrace: another token is found wherever in the grace it is handed over.
func TestLinkComesBackWithinTheGrace(t *testing.T) {
	for _, after := range []time.Duration{0, time.Second, 10 * time.Second, lossGrace - time.Second} {
		synctest.Test(t, func(t *testing.T) {
			good := true
			var refused, back time.Time
			l, _, _ := newLink(func(context.Context) (session, error) {
				c := newConn()
				switch {
				case good:
					good = false
					c.err, c.held = errLinkClosed, time.Minute
				case refused.IsZero():
					refused = time.Now()
					return nil, status(http.StatusUnauthorized)
				case time.Since(refused) < after:
					return nil, status(http.StatusUnauthorized)
				case back.IsZero():
					back = time.Now()
				}
				return c, nil
			})
			l.onRefused = ExitWhenLost
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
			defer cancel()
			if err := l.run(ctx); err != nil || back.IsZero() || back.Sub(refused) > 30*time.Second {
				t.Errorf("a token handed over after %v: run = %v, back after %v", after, err, back.Sub(refused))
			}
		})
	}
}

func TestLinkEndsWhenTheAgentChanged(t *testing.T) {
	l, _, _ := newLink(func(context.Context) (session, error) {
		c := newConn()
		c.err = errAgentChanged
		return c, nil
	})
	if err := l.run(t.Context()); !errors.Is(err, errAgentChanged) {
		t.Errorf("run = %v, want errAgentChanged", err)
	}
}

func TestLinkStartsQuickAfterASessionThatLasted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failures := 20 // enough to reach the ceiling
		l, _, _ := newLink(func(context.Context) (session, error) {
			if failures > 0 {
				failures--
				return nil, errors.New("connection reset")
			}
			c := newConn()
			c.err, c.held = errLinkClosed, time.Hour
			return c, nil
		})
		dials := runFor(t, l, 90*time.Minute)
		last := len(dials) - 1
		if gap := dials[last] - dials[last-1] - time.Hour; gap < 0 || gap > 200*time.Millisecond {
			t.Errorf("redialled %v after a session of an hour, want at once", gap)
		}
	})
}

func TestLinkKeepsBackingOffWhenSessionsAreShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, _, out := newLink(func(context.Context) (session, error) {
			c := newConn()
			c.err, c.held = errLinkClosed, 10*time.Millisecond
			return c, nil
		})
		if n := len(runFor(t, l, time.Hour)); n > 1500 {
			t.Errorf("%d dials in an hour against a server that ends each link at once: a tight loop", n)
		}
		if lines := strings.Count(out.String(), "\n"); lines > 10 {
			t.Errorf("%d lines in an hour about one trouble:\n%s", lines, out)
		}
	})
}

func TestClockJumpCutsTheSessionAndRedialsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, clock, _ := newLink(func(context.Context) (session, error) { return newConn(), nil })
		time.AfterFunc(10*time.Minute+time.Millisecond, func() { clock.jump(8 * time.Hour) })
		dials := runFor(t, l, 11*time.Minute)
		if len(dials) != 2 {
			t.Fatalf("%d dials, want 2", len(dials))
		}
		if late := dials[1] - 10*time.Minute; late > clockTick+200*time.Millisecond {
			t.Errorf("redialled %v after waking, want at most %v", late, clockTick)
		}
	})
}

func TestClockJumpCutsTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, clock, _ := newLink(nil)
		var failures atomic.Int64
		l.dial = func(context.Context) (session, error) {
			failures.Add(1)
			return nil, status(http.StatusNotFound)
		}
		began := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		done := make(chan error, 1)
		go func() { done <- l.run(ctx) }()
		// Waits of up to a minute follow each other by now: a jump must not let one run out.
		time.Sleep(30 * time.Minute)
		cut := 0
		for range 10 {
			time.Sleep(3 * time.Minute)
			synctest.Wait()
			before := failures.Load()
			clock.jump(time.Hour)
			time.Sleep(clockTick + time.Millisecond)
			synctest.Wait()
			if failures.Load() > before {
				cut++
			}
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
		if cut != 10 {
			t.Errorf("%d of 10 jumps led to a dial at once (ran %v)", cut, time.Since(began))
		}
	})
}

func TestClockThatRunsEvenlyIsNoJump(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, clock, _ := newLink(func(context.Context) (session, error) { return newConn(), nil })
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		stop := make(chan struct{})
		defer close(stop)
		go func() {
			for {
				select {
				case <-tick.C:
					clock.jump(500 * time.Millisecond) // NTP steers by far less
				case <-stop:
					return
				}
			}
		}()
		if dials := runFor(t, l, time.Hour); len(dials) != 1 {
			t.Errorf("%d dials, want 1: a clock that is steered made it redial", len(dials))
		}
	})
}

func TestTroubleIsToldOnceThenRarely(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		tr := &trouble{log: slog.New(slog.NewTextHandler(&out, nil))}
		told := 0
		for range 24 * 60 * 6 { // every ten seconds for a day
			if tr.report("the server is gone", "start it") {
				told++
			}
			time.Sleep(10 * time.Second)
		}
		// At 0 and 1, 3, 7, 15, 31, 63, 123, 183... minutes.
		if told < 20 || told > 40 {
			t.Errorf("told %d times in a day, want about 30", told)
		}
		if !tr.report("the token is refused", "") {
			t.Error("another trouble was not told at once")
		}
		tr.clear()
		if !tr.report("the token is refused", "") {
			t.Error("a trouble that came back was not told")
		}
		if !strings.Contains(out.String(), `fix="start it"`) {
			t.Errorf("the fix is missing:\n%s", out.String())
		}
	})
}

func TestIdentityProblem(t *testing.T) {
	answer := fmt.Errorf("cannot exchange: %w", status(http.StatusConflict))
	if got := identityProblem(answer); got != answer {
		t.Errorf("the server's answer became %v", got)
	}
	failure := &identity.Failure{Cause: "there is no metadata service", Fix: "make one"}
	p := client.Explain(identityProblem(fmt.Errorf("cannot prove: %w", failure)))
	if p.Kind != client.KindMachine || p.Cause != failure.Cause || p.Fix != failure.Fix {
		t.Errorf("explained as %s: %v, want the source's own words", p.Kind, p)
	}
}
