// Package oom keeps the kernel's out-of-memory killer away from this process, and leaves what it starts as likely a victim as ever.
//
// [Protect] is called once, and from then on [Start] in the place of [exec.Cmd.Start]. A child has its parent's value from the moment it is forked, so
// this process takes back its own for as long as it starts one: no program ever runs with it, and nothing is run in between that would.
package oom

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
)

// wanted are values of /proc/PID/oom_score_adj, the best first. -900 is below all that people run, and above -1000, with which a process that takes all
// memory by a mistake of its own could not be ended. Without root's rights a process may undo what others without them did, down to 0 mostly.
var wanted = []int{-900, 0}

// score is that of this process. There is one, whoever asks.
var score struct {
	mu                  sync.Mutex
	file                *os.File // nil: nothing was changed
	ordinary, protected []byte   // what the process was started with, and what it has now
	starting            int      // how many programs are being started
}

// Protect makes this process an unlikely victim, as far as it may: for the whole of it that takes root's rights (CAP_SYS_RESOURCE). An error says that
// nothing has changed. A process that is protected better stays so.
func Protect() error {
	score.mu.Lock()
	defer score.mu.Unlock()
	if score.file != nil {
		return nil
	}
	file, err := os.OpenFile("/proc/self/oom_score_adj", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("cannot keep the out-of-memory killer away: %w", err)
	}
	text := make([]byte, 16) // -1000 and a newline
	n, err := file.Read(text)
	ordinary := strings.TrimSpace(string(text[:n]))
	value, parseErr := strconv.Atoi(ordinary)
	if err = errors.Join(err, parseErr); err == nil {
		for _, w := range wanted {
			if value <= w {
				break
			}
			protected := []byte(strconv.Itoa(w))
			if _, err = file.WriteAt(protected, 0); err == nil {
				score.file, score.ordinary, score.protected = file, []byte(ordinary), protected
				return nil
			}
		}
	}
	file.Close()
	if err != nil {
		return fmt.Errorf("cannot keep the out-of-memory killer away: %w", err)
	}
	return nil
}

// Start starts cmd with the value that this process was started with.
func Start(cmd *exec.Cmd) error {
	defer expose()()
	return cmd.Start()
}

// Exec calls exec, which puts another program in the place of this one, with the value that this process was started with. It returns if that fails.
func Exec(exec func() error) error {
	defer expose()()
	return exec()
}

// expose gives this process what it was started with, until the function that it returns is called.
func expose() (end func()) {
	score.mu.Lock()
	defer score.mu.Unlock()
	if score.starting++; score.starting == 1 {
		set(score.ordinary)
	}
	return func() {
		score.mu.Lock()
		defer score.mu.Unlock()
		if score.starting--; score.starting == 0 {
			set(score.protected)
		}
	}
}

// set changes the score. It went well before; if it does not now, the killer finds bigger victims than this process.
func set(value []byte) {
	if score.file != nil {
		_, _ = score.file.WriteAt(value, 0)
	}
}
