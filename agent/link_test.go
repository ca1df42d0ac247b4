package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/berthd/berth/client"
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
	return &link{
		dial:     dial,
		event:    func(Event) {},
		trouble:  &trouble{log: log},
		flapping: &trouble{log: log},
		log:      log,
		wall:     clock.now,
	}, clock, &out
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
		// The mean delay is half the ceiling: 5 s, or 30 s where a person has to act.
		"server gone":   {errors.New("connection reset"), 360, 1500},
		"unknown":       {status(http.StatusNotFound), 60, 250},
		"ambiguous":     {status(http.StatusConflict), 60, 250},
		"token refused": {status(http.StatusUnauthorized), 60, 250},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, _, out := newLink(func(context.Context) (session, error) { return nil, tt.err })
				dials := runFor(t, l, time.Hour)
				if n := len(dials); n < tt.min || n > tt.max {
					t.Errorf("%d dials in an hour, want %d to %d", n, tt.min, tt.max)
				}
				if last := time.Hour - dials[len(dials)-1]; last > time.Minute+time.Second {
					t.Errorf("the last dial was %v before the end: it gave up", last)
				}
				if lines := strings.Count(out.String(), "level=WARN"); lines < 2 || lines > 8 {
					t.Errorf("%d warnings in an hour for one trouble, want a few:\n%s", lines, out)
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

func TestLinkExitsOnRefused(t *testing.T) {
	l, _, _ := newLink(func(context.Context) (session, error) {
		return nil, fmt.Errorf("cannot link: %w", status(http.StatusUnauthorized))
	})
	l.exitOnRefused = true
	if err := l.run(t.Context()); !errors.Is(err, ErrRefused) {
		t.Errorf("run = %v, want ErrRefused", err)
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
	server := &url.URL{Scheme: "https", Host: "berth.example.com"}
	refused := &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
	tests := map[string]struct {
		err  error
		kept bool // to be explained as the server's
	}{
		"server's answer":   {fmt.Errorf("cannot exchange: %w", status(http.StatusConflict)), true},
		"server refuses":    {&url.Error{Op: "Post", URL: "https://berth.example.com/api", Err: refused}, true},
		"metadata refuses":  {&url.Error{Op: "Put", URL: "http://169.254.169.254/latest", Err: refused}, false},
		"no such file":      {fmt.Errorf("cannot read the token file: %w", fs.ErrNotExist), false},
		"metadata, wrapped": {fmt.Errorf("there is no metadata service: %w", refused), false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got := identityProblem(tt.err, server)
			if (got == tt.err) != tt.kept {
				t.Errorf("identityProblem = %v, want kept %v", got, tt.kept)
			}
			if p := client.Explain(got); !tt.kept && !strings.Contains(p.Cause, tt.err.Error()) {
				t.Errorf("explained as %q, want the source's own words", p.Cause)
			}
		})
	}
}
