package main

import (
	"os"
	"testing"

	"github.com/berthd/berth/bench/lab"
	"github.com/berthd/berth/bench/lab/labtest"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "serve" {
		main()
		return
	}
	os.Exit(m.Run())
}

// TestSSH is the measurement with little of everything.
func TestSSH(t *testing.T) {
	s := settings{Bench: lab.Bench{Bin: labtest.Programs(t)}}
	s.quickly()
	labtest.Quick(t, s.run, "exec of true", "ssh HOST true", "at once", "bulk down", "bulk up", "sftp put", "sftp get", "rsync -a", "memory of a session")
}
