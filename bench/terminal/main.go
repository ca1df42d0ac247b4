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
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/berthd/berth/bench/lab"
)

// settings say how much is measured.
type settings struct {
	lab.Bench
	size int // bytes of bulk output
	keys int // keystrokes a round
	idle int // sessions whose memory is measured
	full int // sessions with a full scrollback

	settle time.Duration // before memory is read, so that what is garbage is given back
}

func main() {
	s := settings{Bench: lab.Bench{Name: "terminal", Rounds: 5}, size: 64 << 20, keys: 200, idle: 20, full: 5, settle: 3 * time.Second}
	s.Main("bulk, interrupt, echo, attach or memory", s.quickly, s.run)
}

// quickly makes settings under which figures mean nothing.
func (s *settings) quickly() {
	s.Rounds, s.size, s.keys, s.idle, s.full = 1, 1<<20, 10, 2, 1
}

// run measures all and prints a table.
func (s *settings) run(ctx context.Context, out io.Writer) error {
	return s.In(ctx, func(dir string) error {
		w, err := start(ctx, s.Bin, dir)
		if err != nil {
			return err
		}
		defer w.Stop()
		file := filepath.Join(dir, "text")
		if err := os.WriteFile(file, text(s.size), 0o600); err != nil {
			return err
		}
		part := func(name string, measure func(context.Context, *world, *settings, string, io.Writer) error) lab.Part {
			return lab.Part{Name: name, Measure: func(out io.Writer) error { return measure(ctx, w, s, file, out) }}
		}
		return s.Table(out, w.World, part("bulk", bulk), part("interrupt", interrupt), part("echo", echo), part("attach", attaching), part("memory", memory))
	})
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
