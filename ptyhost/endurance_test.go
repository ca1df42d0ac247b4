package ptyhost

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"
)

// long runs the variants that take minutes.
var long = os.Getenv("BERTH_LONG") != ""

// held is what this process, the host among it, holds of the system.
type held struct {
	goroutines, descriptors, terminals, zombies int
	heap                                        uint64
}

func measure(t *testing.T) held {
	t.Helper()
	runtime.GC()
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	h := held{goroutines: runtime.NumGoroutine(), heap: mem.HeapAlloc}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	h.descriptors = len(fds)
	for _, fd := range fds {
		// A terminal's entry in /dev/pts is there as long as its master is open.
		if to, _ := os.Readlink("/proc/self/fd/" + fd.Name()); strings.HasSuffix(to, "/ptmx") {
			h.terminals++
		}
	}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range stats {
		stat, _ := os.ReadFile(file)
		if _, rest, ok := bytes.Cut(stat, []byte(") Z ")); ok && bytes.HasPrefix(rest, fmt.Appendf(nil, "%d ", os.Getpid())) {
			h.zombies++
		}
	}
	return h
}

// TestOpensAndCloses wants nothing left of thousands of sessions, however they ended: by themselves, closed on request, left by
// an SSH client, or started for nobody.
func TestOpensAndCloses(t *testing.T) {
	n := 500
	if long {
		n = 10_000
	}
	c := startTestHost(t)
	one := func(i int) error {
		ctx, cancel := context.WithTimeout(context.Background(), within)
		defer cancel()
		id := uuid.NewString()
		create := shell("echo up; read x")
		create.KillOnDetach = i%4 == 1
		if i%4 == 2 {
			create = shell("echo up; exit 3")
		}
		a, err := c.Attach(ctx, AttachRequest{ID: id, Size: Size{24, 80}, Create: create})
		if err != nil {
			return err
		}
		defer a.Close()
		if i%4 == 3 { // left, and closed later
			a.Close()
			return c.Kill(ctx, id, "")
		}
		if _, err := io.ReadFull(a, make([]byte, 2)); err != nil {
			return err
		}
		switch i % 4 {
		case 0:
			if err := c.Kill(ctx, id, ""); err != nil {
				return err
			}
		case 1:
			return a.Close()
		}
		if _, err := io.Copy(io.Discard, a); err != nil {
			return err
		}
		_, err = a.Wait()
		return err
	}
	run := func(n int) {
		t.Helper()
		next := make(chan int)
		var workers sync.WaitGroup
		for range 8 {
			workers.Go(func() {
				for i := range next {
					if err := one(i); err != nil {
						t.Errorf("session %d: %v", i, err)
					}
				}
			})
		}
		for i := range n {
			next <- i
		}
		close(next)
		workers.Wait()
	}
	// Those that ended with nobody there are kept for a while, a bounded number of them; here they are fetched.
	fetch := func() {
		eventually(t, "no sessions", func() bool {
			infos, err := c.List(testContext(t))
			if err != nil {
				t.Fatal(err)
			}
			for _, info := range infos {
				if info.Exited != nil {
					if a, err := c.Attach(testContext(t), AttachRequest{ID: info.ID}); err == nil {
						io.Copy(io.Discard, a)
						a.Close()
					}
				}
			}
			return len(infos) == 0
		})
	}
	run(64)
	fetch()
	before := measure(t)
	run(n)
	fetch()
	var after held
	eventually(t, fmt.Sprintf("all is as it was before %d sessions", n), func() bool {
		after = measure(t)
		return after.goroutines <= before.goroutines && after.descriptors <= before.descriptors && after.terminals == 0 && after.zombies == 0 &&
			after.heap < before.heap+1<<20
	})
	t.Logf("before %+v, after %d sessions %+v", before, n, after)
}

// TestRandomFlood wants noise to reach a raw viewer byte for byte in number, while one that does not read costs nothing, and no memory to grow.
func TestRandomFlood(t *testing.T) {
	size := int64(16 << 20) // with the race detector noise takes a second a MiB
	if long {
		size = 2 << 30
	}
	c := startTestHost(t)
	id := uuid.NewString()
	a := attach(t, c, AttachRequest{ID: id, Raw: true, Create: shell(fmt.Sprintf("stty raw -echo; head -c %d /dev/urandom; exit 4", size))})
	attach(t, c, AttachRequest{ID: id}) // it reads nothing
	before := measure(t)
	var peak, got uint64
	buf := make([]byte, 256<<10)
	for part := uint64(0); ; {
		n, err := a.Read(buf)
		got += uint64(n)
		if part += uint64(n); part > 4<<20 {
			part = 0
			peak = max(peak, measure(t).heap)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if got != uint64(size) {
		t.Errorf("read %d bytes, want %d", got, size)
	}
	wantExit(t, a, ExitStatus{Code: 4})
	t.Logf("heap before %d KiB, at most %d KiB while %d MiB passed", before.heap>>10, peak>>10, size>>20)
	// A full scrollback has 4 MiB, the viewers' queues have less than 1 MiB, and noise makes combined characters and links of all kinds.
	if peak > before.heap+16<<20 {
		t.Errorf("the heap grew from %d to %d bytes", before.heap, peak)
	}
}
