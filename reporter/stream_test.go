package reporter

import (
	"bufio"
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

var streamID = uuid.MustParse("cccccccc-0000-4000-8000-000000000000")

// printed is what a script prints, always the same: lines of all lengths, the last without an end.
func printed() []byte {
	random := rand.New(rand.NewPCG(1, 2))
	var b bytes.Buffer
	for i := range 40_000 {
		fmt.Fprintf(&b, "%d%s\n", i, strings.Repeat(" x", random.IntN(1+i%97)))
	}
	b.WriteString("no end")
	return b.Bytes()
}

// childKept has the first byte of the stream that a child finds.
const childKept = "BERTH_TEST_KEPT"

// takeUntilKilled takes the stream in uneven parts and says on stdout up to where it need not be kept.
func takeUntilKilled(dir, addr, kept string) {
	first, err := strconv.ParseUint(kept, 10, 64)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	r, err := Open(Config{Dir: dir})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	linked(r, addr, wire.CurrentVersion)
	w := r.Stream(sourceA, agentpb.Log_INFO, streamID, first)
	for all := printed()[w.Settled():]; len(all) > 0; {
		n := min(1+rand.IntN(20_000), len(all))
		if _, err := w.Write(all[:n]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		all = all[n:]
		fmt.Println(w.Settled())
	}
	select {}
}

// TestStreamIsTakenOnce: whoever is killed while it takes a stream leaves it to the next, which finds how far it came, whether that was told or not.
func TestStreamIsTakenOnce(t *testing.T) {
	s := newServer(t)
	dir := t.TempDir()
	kept := "0"
	for range 8 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childDir+"="+dir, childServer+"="+s.addr, childKept+"="+kept)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		enough := 5 + rand.IntN(10)
		lines := bufio.NewScanner(out)
		for n := 1; lines.Scan(); n++ {
			if _, err := strconv.Atoi(lines.Text()); err != nil {
				t.Fatal(lines.Text())
			}
			if rand.IntN(3) > 0 { // what it says does not always arrive
				kept = lines.Text()
			}
			if n == enough {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := cmd.Wait(); err == nil {
			t.Fatal("the child ended by itself")
		}
	}
	first, err := strconv.ParseUint(kept, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	r := open(t, Config{Dir: dir})
	link1(t, r, s, wire.CurrentVersion)
	w := r.Stream(sourceA, agentpb.Log_INFO, streamID, first)
	if w.Settled() < first || w.Settled() == 0 {
		t.Errorf("it goes on at %d, %d was told", w.Settled(), first)
	}
	if _, err := w.Write(printed()[w.Settled():]); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if got, want := w.Settled(), uint64(len(printed())); got != want {
		t.Errorf("%d bytes are taken, want %d", got, want)
	}
	flush(t, r)
	wantLines(t, s, sourceA, strings.Split(string(printed()), "\n"))
	r.Forget(streamID)
	if _, known := r.spool.follow(streamID); known {
		t.Error("it is still known")
	}
}

// TestStreamWithoutLineEnds: what has no end for long need not be kept, and is counted should it be lost.
func TestStreamWithoutLineEnds(t *testing.T) {
	s := newServer(t)
	dir := t.TempDir()
	r := open(t, Config{Dir: dir})
	w := r.Stream(sourceA, agentpb.Log_INFO, streamID, 0)
	for _, part := range []string{"begin\nprogress 1", "\rprogress 2", strings.Repeat(".", maxHeld)} {
		if _, err := w.Write([]byte(part)); err != nil {
			t.Fatal(err)
		}
	}
	told := w.Settled()
	if want := uint64(len("begin\nprogress 1\rprogress 2") + maxHeld); told != want {
		t.Fatalf("%d bytes need not be kept, want %d", told, want)
	}
	r.Close() // forgets what it holds, as when it is killed
	again := open(t, Config{Dir: dir})
	link1(t, again, s, wire.CurrentVersion)
	w = again.Stream(sourceA, agentpb.Log_INFO, streamID, told)
	if _, err := w.Write([]byte("more\nend\n")); err != nil {
		t.Fatal(err)
	}
	flush(t, again)
	wantLines(t, s, sourceA, []string{"begin", fmt.Sprintf("more… [berth: %d more bytes]", told-uint64(len("begin\n"))), "end"})
}
