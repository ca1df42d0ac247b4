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
	"os/exec"
	"os/signal"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/berthd/berth/bench/lab"
)

// settings say how much is measured.
type settings struct {
	bin    string // folder with berth, berthd and bench-ssh, which is this program; empty to build them
	only   string // measure this alone
	rounds int
	execs  int // commands on an open connection, a round
	at     int // commands at once
	size   int // bytes of bulk and of the file that SFTP carries
	files  int // that rsync carries
	idle   int // sessions whose memory is measured

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
	s := settings{execs: 50, at: 50, idle: 200, settle: 5 * time.Second}
	quick := flag.Bool("quick", false, "little of everything, once, to see that it works")
	flag.StringVar(&s.bin, "bin", "", "folder with berth, berthd, berthd-ptyhost and bench-ssh (this program); without it they are built as for a release")
	flag.StringVar(&s.only, "only", "", "measure only exec, open, parallel, bulk, sftp, rsync or memory")
	flag.IntVar(&s.rounds, "rounds", 5, "how often each is measured")
	flag.IntVar(&s.size, "size", 1<<30, "bytes of bulk and of the file that SFTP carries")
	flag.IntVar(&s.files, "files", 20_000, "files that rsync carries")
	flag.Parse()
	if *quick {
		s = quickly(s)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, s, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench/ssh:", err)
		os.Exit(1)
	}
}

// quickly returns settings under which figures mean nothing.
func quickly(s settings) settings {
	s.rounds, s.execs, s.at, s.size, s.files, s.idle, s.settle = 1, 3, 3, 1<<20, 20, 3, 0
	return s
}

// run measures all and prints a table.
func run(ctx context.Context, s settings, out io.Writer) error {
	dir, err := os.MkdirTemp("", "bssh")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if s.bin == "" {
		s.bin = dir
		if err := lab.Build(ctx, dir); err != nil {
			return err
		}
		build := exec.CommandContext(ctx, "go", "build", "-o", filepath.Join(dir, "bench-ssh"), "./bench/ssh")
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("cannot build: %w\n%s", err, out)
		}
	}
	w, err := start(ctx, s.bin, dir)
	if err != nil {
		return err
	}
	defer w.Stop()

	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(table, "what\tby\tmedian\tleast to most\tto its peer\t\n")
	for _, m := range []struct {
		name    string
		measure func(*world, settings, io.Writer) error
	}{{"exec", execs}, {"open", opens}, {"parallel", parallel}, {"bulk", bulk}, {"sftp", files}, {"rsync", rsync}, {"memory", memory}} {
		if s.only != "" && s.only != m.name {
			continue
		}
		if err := m.measure(w, s, table); err != nil {
			return fmt.Errorf("%s: %w\n%s", m.name, err, w.Log())
		}
	}
	return table.Flush()
}
