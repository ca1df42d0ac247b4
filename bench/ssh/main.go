// Command ssh measures SSH, each figure beside its peer's in one run: OpenSSH's sshd on loopback, berth's server on loopback without a
// mesh, and an agent over the mesh with `berth ssh --stdio` as ProxyCommand. The client is OpenSSH's in every case. Beside bulk stands
// what a plain stream carries over the same mesh (`berth speedtest`).
//
//	go run ./bench/ssh [-rounds 5] [-only WHAT] [-size BYTES] [-files N] [-quick]
//
// Every server is a process of its own. MB/s are 10^6 bytes per second, from the start of the client to its end. The rounds alternate
// between all ways.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/berthd/berth/bench/lab"
)

// settings say how much is measured.
type settings struct {
	lab.Bench
	execs int // commands on an open connection, a round
	at    int // commands at once
	size  int // bytes of bulk and of the file that SFTP carries
	files int // that rsync carries
	idle  int // sessions whose memory is measured

	settle time.Duration // before memory is read, so that what is garbage is given back
}

func main() {
	if len(os.Args) == 3 && os.Args[1] == "serve" {
		if err := serve(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, "bench/ssh:", err)
			os.Exit(1)
		}
		return
	}
	s := settings{Bench: lab.Bench{Name: "ssh", Rounds: 5}, execs: 50, at: 50, idle: 200, settle: 5 * time.Second}
	flag.IntVar(&s.size, "size", 1<<30, "bytes of bulk and of the file that SFTP carries")
	flag.IntVar(&s.files, "files", 20_000, "files that rsync carries")
	s.Main("exec, open, parallel, bulk, sftp, rsync or memory", s.quickly, s.run)
}

// quickly makes settings under which figures mean nothing.
func (s *settings) quickly() {
	s.Rounds, s.execs, s.at, s.size, s.files, s.idle, s.settle = 1, 3, 3, 1<<20, 20, 3, 0
}

// run measures all and prints a table.
func (s *settings) run(ctx context.Context, out io.Writer) error {
	return s.In(ctx, func(dir string) error {
		w, err := start(ctx, s.Bin, dir)
		if err != nil {
			return err
		}
		defer w.Stop()
		part := func(name string, measure func(*world, *settings, io.Writer) error) lab.Part {
			return lab.Part{Name: name, Measure: func(out io.Writer) error { return measure(w, s, out) }}
		}
		return s.Table(out, w.World, part("exec", execs), part("open", opens), part("parallel", parallel), part("bulk", bulk), part("sftp", files), part("rsync", rsync), part("memory", memory))
	})
}
