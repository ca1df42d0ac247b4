package rpc

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"storj.io/drpc/drpcmux"

	"github.com/berthd/berth/wire"
)

// mute is a connection whose other side falls silent.
type mute struct {
	net.Conn
	dead atomic.Bool
}

func (m *mute) Write(p []byte) (int, error) {
	if m.dead.Load() {
		return len(p), nil
	}
	return m.Conn.Write(p)
}

func (m *mute) Close() error {
	if m.dead.Load() {
		return nil
	}
	return m.Conn.Close()
}

// TestSilentCaller: whenever a caller falls silent, it is found dead at the time of the protocol, and taken
// neither for one that left nor for one that speaks something else.
//
// yamux keeps used timers for its next session, and those of a bubble may not leave it. So this test has a
// process of its own.
func TestSilentCaller(t *testing.T) {
	const own = "BERTH_TEST_SILENT_CALLER"
	if os.Getenv(own) == "" {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestSilentCaller$")
		cmd.Env = append(os.Environ(), own+"=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	synctest.Test(t, func(t *testing.T) {
		for _, after := range []time.Duration{time.Second, 16 * time.Second, 29 * time.Second, 44 * time.Second} {
			near, far := net.Pipe()
			caller := &mute{Conn: near}
			c, err := NewClient(caller)
			if err != nil {
				t.Fatal(err)
			}
			served := make(chan error, 1)
			go func() {
				served <- Serve(t.Context(), far, drpcmux.New(), ServeOptions{PingInterval: wire.PingInterval, PingTimeout: wire.PingTimeout})
			}()
			time.Sleep(after)
			caller.dead.Store(true)
			begun := time.Now()
			if err := <-served; !errors.Is(err, ErrDead) {
				t.Errorf("silent after %v: Serve = %v, want ErrDead", after, err)
			}
			if took := time.Since(begun); took < wire.PingTimeout-wire.PingInterval || took > wire.PingTimeout {
				t.Errorf("silent after %v: found dead after %v", after, took)
			}
			c.Close()
			near.Close()
		}
	})
}
