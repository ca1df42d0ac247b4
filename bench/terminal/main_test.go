package main

import (
	"testing"

	"github.com/berthd/berth/bench/lab"
	"github.com/berthd/berth/bench/lab/labtest"
)

// TestTerminal is the measurement with little of everything.
func TestTerminal(t *testing.T) {
	s := settings{Bench: lab.Bench{Bin: labtest.Programs(t)}}
	s.quickly()
	labtest.Quick(t, s.run, "bulk output", "Ctrl-C while yes runs", "echo of a key, p99", "echo beside a flood, p99", "attach to 10,000 lines", "a session with a full scrollback")
}
