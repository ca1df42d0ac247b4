package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// ledgerSources is how many scripts write at the same time.
const ledgerSources = 5

// TestLedger: scripts write numbered lines while the server is restarted, the link is cut and berthd is killed.
// Who followed the log all the time and who reads it afterwards see each line once and in order.
func TestLedger(t *testing.T) {
	total, blocks := atLength(30_000, 1_000_000), atLength(10, 100)
	restarts, cuts, kills := atLength(1, 10), atLength(2, 20), atLength(1, 10)

	m := newMachine(t)
	config := "agents:\n  - name: box\n    scripts:\n"
	for i := range ledgerSources {
		// A line tells its source, the run of the script and its number in that run.
		config += fmt.Sprintf(`      - display_name: source-%[1]d
        cron: "* * * * * *"
        log_path: %[2]s/log-%[1]d
        script: |
          cd %[2]s
          if [ -e stop ]; then [ -e end-%[1]d ] || { : >end-%[1]d; echo %[1]d end; }; exit; fi
          run=$(($(cat run-%[1]d 2>/dev/null || echo 0) + 1)); echo $run >run-%[1]d
          i=0
          while [ $i -lt %[3]d ]; do seq -f "%[1]d $run %%g" $((100 * i + 1)) $((100 * i + 100)) || exit; i=$((i + 1)); done
`, i, m.tmp, blocks)
	}
	r := newRoadOn(m, config)
	link := newCutter(t, r.addr)
	run := func() {
		env := []string{"BERTH_URL=http://" + link.addr, "BERTH_TOKEN=" + r.token}
		r.agent = r.start("berthd", env, "run", "--state-dir", filepath.Join(r.home, "state"))
	}
	run()
	r.waitConnected(20 * time.Second)
	var follower accounts
	follow := r.client("logs", "box", "-f", "--output", "json")
	followed, err := follow.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := follow.Start(); err != nil {
		t.Fatal(err)
	}
	reading := make(chan error, 1)
	go func() { reading <- follower.read(followed) }()

	events := slices.Concat(slices.Repeat([]func(){func() {
		if r.server.cmd.Process.Kill(); rand.IntN(2) == 0 {
			<-time.After(time.Second) // agents and readers meet a port where nobody listens
		}
		<-r.server.done
		r.serve()
	}}, restarts), slices.Repeat([]func(){link.cut}, cuts), slices.Repeat([]func(){func() {
		r.agent.cmd.Process.Kill()
		<-r.agent.done
		run()
	}}, kills))
	rand.Shuffle(len(events), func(i, j int) { events[i], events[j] = events[j], events[i] })
	for i, event := range events {
		// They are spread over the lines, and come at no particular moment.
		due := (i+1)*total/(len(events)+1) + rand.IntN(100)
		follower.await(t, "lines come", func() bool { return follower.count >= due })
		event()
	}
	follower.await(t, "all lines have come", func() bool { return follower.count >= total })
	if err := os.WriteFile(filepath.Join(m.tmp, "stop"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	follower.await(t, "all sources have ended", func() bool { return follower.ended == ledgerSources })
	follow.Process.Signal(os.Interrupt)
	if err := errors.Join(<-reading, follow.Wait()); err != nil {
		t.Fatalf("the follower: %v", err)
	}

	var later accounts
	if err := later.read(strings.NewReader(r.berth("logs", "box", "--output", "json"))); err != nil {
		t.Fatal(err)
	}
	for i := range ledgerSources {
		printed, err := os.ReadFile(filepath.Join(m.tmp, fmt.Sprintf("log-%d", i)))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(follower.lines[i], later.lines[i]) {
			t.Errorf("source %d: %d lines were followed, %d are read later", i, len(follower.lines[i]), len(later.lines[i]))
		}
		later.check(t, i, strings.Split(string(printed), "\n"), 100*blocks)
	}
	t.Logf("%d lines, %d restarts of the server, %d cuts, %d kills of berthd", later.count, restarts, cuts, kills)
}

// accounts are the lines of the sources as a reader of the log has them.
type accounts struct {
	mu    sync.Mutex
	lines [ledgerSources][]string
	count int
	ended int // sources whose last line is there
}

// read takes what berth logs prints as JSON.
func (a *accounts) read(r io.Reader) error {
	for lines := json.NewDecoder(bufio.NewReaderSize(r, 1<<20)); ; {
		var line struct {
			Output string `json:"output"`
		}
		if err := lines.Decode(&line); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		number, rest, _ := strings.Cut(line.Output, " ")
		source, err := strconv.Atoi(number)
		if err != nil || source >= ledgerSources {
			return fmt.Errorf("no script wrote %q", line.Output)
		}
		a.mu.Lock()
		a.lines[source] = append(a.lines[source], rest)
		a.count++
		if rest == "end" {
			a.ended++
		}
		a.mu.Unlock()
	}
}

// await waits until something holds of what was read so far.
func (a *accounts) await(t *testing.T, what string, holds func() bool) {
	t.Helper()
	eventually(t, 10*time.Minute, what, func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		return holds()
	})
}

// check checks what was read of a source: each run that its log file tells of goes from its first line up to its last.
func (a *accounts) check(t *testing.T, source int, printed []string, whole int) {
	t.Helper()
	least := map[int]int{} // by run
	for _, line := range printed {
		var run, n int
		if _, err := fmt.Sscanf(line, strconv.Itoa(source)+" %d %d", &run, &n); err == nil {
			least[run] = n
		}
	}
	run, n, partial := 0, 0, 0
	end := func() {
		if n < least[run] {
			t.Errorf("source %d: of run %d %d lines are read, %d were printed", source, run, n, least[run])
		}
		delete(least, run)
		if run > 0 && n < whole {
			partial++
		}
	}
	for i, line := range a.lines[source] {
		var r, k int
		switch _, err := fmt.Sscanf(line, "%d %d", &r, &k); {
		case line == "end" && i == len(a.lines[source])-1:
		case err != nil:
			t.Fatalf("source %d: line %q", source, line)
		case r == run && k == n+1:
			n++
		case r > run && k == 1:
			end()
			run, n = r, 1
		default:
			t.Fatalf("source %d: line %d of run %d stands behind line %d of run %d", source, k, r, n, run)
		}
	}
	end()
	if len(least) > 0 || partial > 0 {
		t.Errorf("source %d: missing runs and their lines are %v; %d runs are cut short", source, least, partial)
	}
}

// cutter is a way to a server that can be cut.
type cutter struct {
	addr string

	mu    sync.Mutex
	conns []net.Conn
}

func newCutter(t *testing.T, to string) *cutter {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{addr: l.Addr().String()}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			from, err := l.Accept()
			if err != nil {
				return
			}
			there, err := net.Dial("tcp", to)
			if err != nil {
				from.Close()
				continue
			}
			c.mu.Lock()
			c.conns = append(c.conns, from, there)
			c.mu.Unlock()
			pass := func(to, from net.Conn) {
				io.Copy(to, from)
				to.Close()
				from.Close()
			}
			all.Go(func() { pass(there, from) })
			all.Go(func() { pass(from, there) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		c.cut()
		all.Wait()
	})
	return c
}

// cut ends every connection; new ones get through.
func (c *cutter) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.conns {
		conn.Close()
	}
	c.conns = nil
}
