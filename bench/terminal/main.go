// Command terminal measures terminals, each figure beside its peers' in one run: bulk output through `berth shell`,
// through OpenSSH's `ssh -tt`, through the terminal host alone, and through a bare loop that reads a PTY; the echo of
// keystrokes, alone and while another session floods; attaching to a full scrollback; memory of idle and full sessions.
//
//	go run ./bench/terminal [-rounds 5] [-only WHAT] [-quick] [-bin DIR]
//
// Server, agent, sshd and clients are processes of their own, on loopback. MB/s are 10^6 bytes of the file per second, from the
// Enter that starts the output to the last line seen. The rounds alternate between all ways. It takes some three minutes.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/berthd/berth/bench/lab"
)

// settings say how much is measured.
type settings struct {
	bin    string // folder with berth and berthd; empty to build them
	only   string // measure this alone
	rounds int
	size   int // bytes of bulk output
	keys   int // keystrokes a round
	idle   int // sessions whose memory is measured
	full   int // sessions with a full scrollback

	settle time.Duration // before memory is read, so that what is garbage is given back
}

func main() {
	s := settings{size: 64 << 20, keys: 200, idle: 20, full: 5, settle: 3 * time.Second}
	quick := flag.Bool("quick", false, "little of everything, once, to see that it works")
	flag.StringVar(&s.bin, "bin", "", "folder with berth, berthd and berthd-ptyhost; without it they are built as for a release")
	flag.StringVar(&s.only, "only", "", "measure only bulk, interrupt, echo, attach or memory")
	flag.IntVar(&s.rounds, "rounds", 5, "how often each is measured")
	flag.Parse()
	if *quick {
		s = quickly(s)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, s, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench/terminal:", err)
		os.Exit(1)
	}
}

// quickly returns settings under which figures mean nothing.
func quickly(s settings) settings {
	s.rounds, s.size, s.keys, s.idle, s.full = 1, 1<<20, 10, 2, 1
	return s
}

// run measures all and prints a table.
func run(ctx context.Context, s settings, out io.Writer) error {
	dir, err := os.MkdirTemp("", "bterm")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if s.bin == "" {
		s.bin = dir
		if err := lab.Build(ctx, dir); err != nil {
			return err
		}
	}
	file := filepath.Join(dir, "text")
	if err := os.WriteFile(file, text(s.size), 0o600); err != nil {
		return err
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
		measure func(context.Context, *world, settings, string, io.Writer) error
	}{{"bulk", bulk}, {"interrupt", interrupt}, {"echo", echo}, {"attach", attaching}, {"memory", memory}} {
		if s.only != "" && s.only != m.name {
			continue
		}
		if err := m.measure(ctx, w, s, file, table); err != nil {
			return fmt.Errorf("%w\n%s", err, w.Log())
		}
	}
	return table.Flush()
}

// text is what people print: source code, logs with colours, progress, other scripts than Latin, long lines.
func text(size int) []byte {
	lines := []string{
		"the quick brown fox jumps over the lazy dog 0123456789 abcdefghijklmnop",
		"\tfor i := range len(buf) { sum += int(buf[i]) } // checksum of what was read",
		"\x1b[32mINFO\x1b[0m 2026-01-02T03:04:05Z request served \x1b[1mGET /index.html\x1b[0m 200 in 1.2ms",
		"",
		"-rw-r--r-- 1 user user 4096 Jan  2 03:04 Makefile",
		"größer, schöner, weiter: déjà vu – 速い茶色の狐 ✓ done 🚀",
		"   Compiling serde v1.0.219 ( 42/128) [=========>                ]",
		strings.Repeat("long line without an end ", 12),
		"/usr/lib/gcc/x86_64-linux-gnu/12/../../../x86_64-linux-gnu/crt1.o: in function _start:",
		"}",
	}
	b := make([]byte, 0, size+1<<10)
	for i := 0; len(b) < size; i++ {
		b = append(b, lines[(i*7+i/10)%len(lines)]...)
		b = append(b, '\n')
	}
	return b
}
