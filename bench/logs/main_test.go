package main

import (
	"testing"

	"github.com/berthd/berth/bench/lab"
	"github.com/berthd/berth/bench/lab/labtest"
)

// TestLogs is the measurement with few lines and without its peer.
func TestLogs(t *testing.T) {
	s := settings{Bench: lab.Bench{Bin: labtest.Programs(t), Only: "loop"}}
	s.quickly()
	labtest.Quick(t, s.run, "a shell loop", "processors", "most memory")
}
