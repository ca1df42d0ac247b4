package reporter

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/berthd/berth/mask"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

var sourceA, sourceB = uuid.MustParse("aaaaaaaa-0000-4000-8000-000000000000"), uuid.MustParse("bbbbbbbb-0000-4000-8000-000000000000")

func numbered(from, to int) []string {
	var lines []string
	for i := from; i <= to; i++ {
		lines = append(lines, fmt.Sprintf("line %d", i))
	}
	return lines
}

func write(t *testing.T, r *Reporter, source uuid.UUID, lines ...string) {
	t.Helper()
	w := r.Writer(source, agentpb.Log_INFO)
	for _, line := range lines {
		if _, err := io.WriteString(w, line+"\n"); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

func flush(t *testing.T, r *Reporter) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := r.Flush(ctx); err != nil {
		t.Fatal(err)
	}
}

func wantLines(t *testing.T, s *server, source uuid.UUID, want []string) {
	t.Helper()
	if diff := gocmp.Diff(want, s.stored(source)); diff != "" {
		t.Errorf("lines (-want +got):\n%s", diff)
	}
}

func TestLinesArriveOnceOverFailingLinks(t *testing.T) {
	s := newServer(t)
	var calls int
	s.beforeLogs = func() error {
		if calls++; calls%4 == 0 {
			return errors.New("disk full over there")
		}
		return nil
	}
	s.afterLogs = func() error { // stored, but the agent does not hear it
		if calls%3 == 0 {
			go s.cut()
			return errors.New("gone")
		}
		return nil
	}
	r := open(t, Config{Dir: t.TempDir()})
	link1(t, r, s, wire.CurrentVersion)
	const total = 2000
	for i := 1; i <= total; i += 100 {
		write(t, r, sourceA, numbered(i, i+99)...)
		write(t, r, sourceB, numbered(i, i+99)...)
	}
	flush(t, r)
	wantLines(t, s, sourceA, numbered(1, total))
	wantLines(t, s, sourceB, numbered(1, total))
}

func TestLevelsAndLastLine(t *testing.T) {
	s := newServer(t)
	r := open(t, Config{})
	w := r.Writer(sourceA, agentpb.Log_ERROR)
	if _, err := io.WriteString(w, "one\r\n\ntwo"); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(nil); !errors.Is(err, os.ErrClosed) {
		t.Errorf("write after close: %v", err)
	}
	link1(t, r, s, wire.CurrentVersion)
	flush(t, r)
	wantLines(t, s, sourceA, []string{"one", "", "two"})
	if diff := gocmp.Diff([]agentpb.Log_Level{5, 5, 5}, s.levels[sourceA]); diff != "" {
		t.Error(diff)
	}
}

// TestAnotherAgentsLines: what an agent left undelivered is sent when it is back, and is nobody else's.
func TestAnotherAgentsLines(t *testing.T) {
	s := newServer(t)
	dir := t.TempDir()
	one, other := uuid.New(), uuid.New()
	for _, left := range []struct {
		agent uuid.UUID
		lines []string
	}{{one, numbered(1, 10)}, {one, numbered(11, 20)}, {other, numbered(21, 30)}} {
		r, err := Open(Config{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		if left.agent == other { // the first agent's are still there
			if got := r.spool.backlog(); got == 0 {
				t.Error("nothing was left for the agent itself")
			}
		}
		r.For(left.agent)
		write(t, r, sourceA, left.lines...)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
	r := open(t, Config{Dir: dir})
	r.For(other)
	link1(t, r, s, wire.CurrentVersion)
	flush(t, r)
	wantLines(t, s, sourceA, numbered(21, 30))
}

func TestRestartGoesOnWhereItWas(t *testing.T) {
	s := newServer(t)
	dir := t.TempDir()
	for round := range 4 {
		r, err := Open(Config{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		write(t, r, sourceA, numbered(round*20+1, round*20+10)...)
		if round%2 == 0 { // delivered now; else by the next round
			stop := linked(r, s.addr, wire.CurrentVersion)
			flush(t, r)
			stop()
		}
		write(t, r, sourceA, numbered(round*20+11, round*20+20)...)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if err := r.Close(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("second close: %v", err)
		}
	}
	r := open(t, Config{Dir: dir})
	link1(t, r, s, wire.CurrentVersion)
	flush(t, r)
	wantLines(t, s, sourceA, numbered(1, 80))
	if len(s.last) != 1 {
		t.Errorf("%d spool ids for one undamaged spool", len(s.last))
	}
}

func TestSpoolIsOpenedOnce(t *testing.T) {
	dir := t.TempDir()
	open(t, Config{Dir: dir})
	_, err := Open(Config{Dir: dir})
	if !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), dir) {
		t.Errorf("got %v, want ErrInUse with the directory", err)
	}
}

func TestAnotherBootBeginsAnotherNumbering(t *testing.T) {
	s := newServer(t)
	dir := t.TempDir()
	r, err := Open(Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	write(t, r, sourceA, numbered(1, 5)...)
	stop := linked(r, s.addr, wire.CurrentVersion)
	flush(t, r)
	stop()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	// The power went: lines 4 and 5 had reached the server but not the disk.
	st, err := readState(dir)
	if err != nil {
		t.Fatal(err)
	}
	st.Boot = "another"
	st.Acknowledged[0].Sequence = 3
	if err := writeState(dir, st); err != nil {
		t.Fatal(err)
	}
	r = open(t, Config{Dir: dir})
	write(t, r, sourceA, numbered(6, 9)...)
	link1(t, r, s, wire.CurrentVersion)
	flush(t, r)
	wantLines(t, s, sourceA, numbered(1, 9))
}

var missing = regexp.MustCompile(`^\[berth: (\d+) lines are missing here: (.*)\]$`)

func TestBoundKeepsFirstAndLast(t *testing.T) {
	for name, memory := range map[string]bool{"disk": false, "memory": true} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			cfg := Config{Limit: 1 << 20}
			if !memory {
				cfg.Dir = t.TempDir()
			}
			r := open(t, cfg)
			const total = 60_000 // of some 150 bytes each on disk
			pad := strings.Repeat("x", 80)
			w := r.Writer(sourceA, agentpb.Log_INFO)
			var buf bytes.Buffer
			for i := 1; i <= total; i++ {
				fmt.Fprintf(&buf, "line %d %s\n", i, pad)
				if i%100 == 0 {
					if _, err := buf.WriteTo(w); err != nil {
						t.Fatal(err)
					}
				}
			}
			bound := int64(1<<20 + maxAppend)
			if memory {
				bound = int64(memoryLimit + maxAppend)
			}
			if got := r.spool.backlog(); got > bound {
				t.Errorf("%d bytes are kept, bound %d", got, bound)
			}
			link1(t, r, s, wire.CurrentVersion)
			flush(t, r)
			got := s.stored(sourceA)
			next, gaps := 1, 0
			for _, line := range got {
				if m := missing.FindStringSubmatch(line); m != nil {
					n, err := strconv.Atoi(m[1])
					if err != nil || !strings.Contains(m[2], "room") {
						t.Errorf("gap line %q", line)
					}
					next += n
					gaps++
					continue
				}
				if want := fmt.Sprintf("line %d %s", next, pad); line != want {
					t.Fatalf("got %q, want %q", line, want)
				}
				next++
			}
			if next != total+1 || gaps != 1 {
				t.Errorf("lines and gaps end at %d of %d with %d gaps, want one", next-1, total, gaps)
			}
		})
	}
}

func TestUnusableDirectoryMeansMemory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	s := newServer(t)
	r := open(t, Config{Dir: filepath.Join(file, "spool"), Log: slog.New(slog.NewTextHandler(&log, nil))})
	write(t, r, sourceA, numbered(1, 9)...)
	if n := strings.Count(log.String(), "kept in memory"); n != 1 {
		t.Errorf("said %d times that lines are in memory:\n%s", n, log.String())
	}
	link1(t, r, s, wire.CurrentVersion)
	flush(t, r)
	wantLines(t, s, sourceA, numbered(1, 9))
}

func TestDiskThatRefusesMeanwhile(t *testing.T) {
	var log bytes.Buffer
	s := newServer(t)
	dir := t.TempDir()
	r := open(t, Config{Dir: dir, Log: slog.New(slog.NewTextHandler(&log, nil))})
	write(t, r, sourceA, numbered(1, 10)...)

	// The disk refuses: the segment cannot be written any more, and no other can be made.
	r.spool.mu.Lock()
	seg := r.spool.segments[0]
	readOnly, err := os.Open(seg.path)
	if err != nil {
		t.Fatal(err)
	}
	seg.file.Close()
	seg.file = readOnly
	r.spool.mu.Unlock()
	aside := dir + ".aside"
	if err := os.Rename(dir, aside); err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", 1000)
	var want []string
	for i := range 3 * memorySegmentSize / 1000 {
		want = append(want, fmt.Sprintf("%d %s", i, long))
	}
	write(t, r, sourceA, want...)

	if err := os.Rename(aside, dir); err != nil { // and takes lines again
		t.Fatal(err)
	}
	more := make([]string, 2*memorySegmentSize/1000)
	for i := range more {
		more[i] = fmt.Sprintf("again %d %s", i, long)
	}
	write(t, r, sourceA, more...)
	if n := strings.Count(log.String(), "level=WARN"); n != 1 {
		t.Errorf("%d warnings, want one:\n%s", n, log.String())
	}
	if !strings.Contains(log.String(), "on disk again") {
		t.Errorf("did not say that the disk is back:\n%s", log.String())
	}
	link1(t, r, s, wire.CurrentVersion)
	flush(t, r)
	wantLines(t, s, sourceA, append(append(numbered(1, 10), want...), more...))
}

// TestDamageCostsOnlyWhatItHit: one byte of the spool's files is another one. BERTH_LONG=1 tries 1,000 positions, and
// BERTH_SEED=N others.
func TestDamageCostsOnlyWhatItHit(t *testing.T) {
	positions := 60
	if os.Getenv("BERTH_LONG") != "" {
		positions = 1000
	}
	seed, err := strconv.ParseUint(cmp.Or(os.Getenv("BERTH_SEED"), "1"), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	template := t.TempDir()
	cfg := Config{Dir: template, Limit: 1 << 20}
	r, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for i := range 900 {
		want = append(want, fmt.Sprintf("line %d %s", i, strings.Repeat("é\xff", i%20)))
	}
	write(t, r, sourceA, want...)
	for i, line := range want {
		want[i] = string(bytes.ToValidUTF8([]byte(line), []byte(wire.Unreadable)))
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	names, err := filepath.Glob(filepath.Join(template, "*"+segmentSuffix))
	if err != nil || len(names) < 2 {
		t.Fatal(names, err)
	}
	names = append(names, filepath.Join(template, stateName))
	var healthy [][]byte
	total := 0
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		healthy = append(healthy, b)
		total += len(b)
	}
	s := newServer(t)
	random := rand.New(rand.NewPCG(seed, 2))
	for range positions {
		position := random.IntN(total)
		cfg.Dir = t.TempDir()
		costs, at := 1, position
		for i, name := range names {
			b := bytes.Clone(healthy[i])
			if 0 <= at && at < len(b) {
				b[at] ^= byte(1 + random.IntN(255))
				if filepath.Base(name) == stateName {
					costs = 0
				}
			}
			at -= len(b)
			if err := os.WriteFile(filepath.Join(cfg.Dir, filepath.Base(name)), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		var log bytes.Buffer
		cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
		r, err := Open(cfg)
		if err != nil {
			t.Fatalf("byte %d: %v", position, err)
		}
		if !strings.Contains(log.String(), "damaged") {
			t.Errorf("byte %d: nothing was said:\n%s", position, log.String())
		}
		write(t, r, sourceA, "after")
		s.mu.Lock()
		clear(s.lines)
		clear(s.last)
		s.mu.Unlock()
		stop := linked(r, s.addr, wire.CurrentVersion)
		flush(t, r)
		stop()
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		// One byte lies in one record, or in the state: all other lines must be there, in order.
		got := s.stored(sourceA)
		lost := 0
		for _, line := range append(want, "after") {
			if len(got) > 0 && got[0] == line {
				got = got[1:]
				continue
			}
			lost++
			if len(got) > 0 && missing.MatchString(got[0]) {
				got = got[1:]
			}
		}
		if lost != costs || len(got) != 0 {
			t.Errorf("byte %d: %d lines lost, %d lines too many: %q", position, lost, len(got), got)
		}
	}
}

func TestDamagedStateDoublesNothing(t *testing.T) {
	s := newServer(t)
	dir := t.TempDir()
	r, err := Open(Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	write(t, r, sourceA, numbered(1, 10)...)
	stop := linked(r, s.addr, wire.CurrentVersion)
	flush(t, r)
	stop()
	write(t, r, sourceA, numbered(11, 20)...)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, stateName), []byte("00000000\n{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	r = open(t, Config{Dir: dir})
	write(t, r, sourceA, numbered(21, 30)...)
	link1(t, r, s, wire.CurrentVersion)
	flush(t, r)
	wantLines(t, s, sourceA, numbered(1, 30))
}

// What a child process of this test binary is told.
const (
	childDir    = "BERTH_TEST_SPOOL"
	childServer = "BERTH_TEST_SERVER"
	childRound  = "BERTH_TEST_ROUND"
)

// writeUntilKilled writes numbered lines of two sources and says on stdout how far it came.
func writeUntilKilled(dir, addr, round string) {
	r, err := Open(Config{Dir: dir})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	linked(r, addr, wire.CurrentVersion)
	a, b := r.Writer(sourceA, agentpb.Log_INFO), r.Writer(sourceB, agentpb.Log_INFO)
	for i := 1; ; i++ {
		for _, w := range []io.Writer{a, b} {
			if _, err := fmt.Fprintf(w, "%s %d\n", round, i); err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
		}
		fmt.Println(i)
	}
}

func TestKillLosesAndDoublesNothing(t *testing.T) {
	s := newServer(t)
	dir := t.TempDir()
	const rounds = 6
	promised := make([]int, rounds)
	for round := range promised {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childDir+"="+dir, childServer+"="+s.addr, fmt.Sprintf("%s=%d", childRound, round))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// It is killed at a number of lines, by then in the middle of everything else.
		enough := 500 + rand.IntN(3000)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			n, err := strconv.Atoi(lines.Text())
			if err != nil {
				t.Fatal(lines.Text())
			}
			promised[round] = n
			if n == enough {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
			if n%700 == 0 {
				s.cut()
			}
		}
		if err := cmd.Wait(); err == nil {
			t.Fatal("the child ended by itself")
		}
	}
	r := open(t, Config{Dir: dir})
	link1(t, r, s, wire.CurrentVersion)
	flush(t, r)
	for _, source := range []uuid.UUID{sourceA, sourceB} {
		got := s.stored(source)
		for round, least := range promised {
			n := 0
			for len(got) > 0 && got[0] == fmt.Sprintf("%d %d", round, n+1) {
				n++
				got = got[1:]
			}
			if n < least {
				t.Errorf("source %s round %d: %d lines in order, %d were taken; next is %q", source, round, n, least, got[:min(1, len(got))])
			}
		}
		if len(got) > 0 {
			t.Errorf("source %s: %d lines too many, first %q", source, len(got), got[0])
		}
	}
}

func TestDeliveredSegmentsAreRemoved(t *testing.T) {
	s := newServer(t)
	dir := t.TempDir()
	r := open(t, Config{Dir: dir, Limit: 1 << 20})
	link1(t, r, s, wire.CurrentVersion)
	for range 20 {
		write(t, r, sourceA, strings.Repeat("x", 10_000), strings.Repeat("y", 10_000))
	}
	flush(t, r)
	write(t, r, sourceA, "last")
	flush(t, r)
	names, err := filepath.Glob(filepath.Join(dir, "*"+segmentSuffix))
	if err != nil || len(names) > 1 {
		t.Errorf("%d segments are left: %v", len(names), err)
	}
}

// BenchmarkWriter writes lines of 100 bytes: as a busy pipe gives them, 64 KiB at once, and one by one, as a script gives
// them whose output is read as fast as it comes.
func BenchmarkWriter(b *testing.B) {
	line := strings.Repeat("x", 99) + "\n"
	for _, lines := range []int{1, 655} {
		b.Run(strconv.Itoa(lines), func(b *testing.B) {
			r, err := Open(Config{Dir: b.TempDir(), Mask: mask.New("4a1e5bb4-57a7-4c1c-94ac-2b80e5b5e7a1", "s3cret-value")})
			if err != nil {
				b.Fatal(err)
			}
			defer r.Close()
			w := r.Writer(sourceA, agentpb.Log_INFO)
			part := []byte(strings.Repeat(line, lines))
			b.SetBytes(int64(len(part)))
			for b.Loop() {
				if _, err := w.Write(part); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
