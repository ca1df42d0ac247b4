package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// far is an agent whose only way to its server is a link that can be cut.
type far struct {
	*road
	t    *testing.T
	pid  int
	away string // the agent's network namespace
}

func newFar(t *testing.T) *far {
	t.Helper()
	m := newMachine(t)
	m.isolate()
	f := &far{t: t, away: m.space + "-far"}
	// Within the other one it would be seen by nobody else.
	if out, err := exec.Command("ip", "netns", "add", f.away).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() { exec.Command("ip", "netns", "delete", f.away).Run() })
	m.must("ip", "link", "add", "here", "type", "veth", "peer", "name", "there", "netns", f.away)
	m.must("ip", "address", "add", "10.0.0.1/24", "dev", "here")
	m.must("ip", "link", "set", "here", "up")
	for _, args := range [][]string{{"link", "set", "lo", "up"}, {"address", "add", "10.0.0.2/24", "dev", "there"}, {"link", "set", "there", "up"}, {"route", "add", "default", "via", "10.0.0.1"}} {
		m.must("ip", append([]string{"-n", f.away}, args...)...)
	}
	f.road = newRoadAt(m, "10.0.0.1:7080", "agents:\n  - name: box\n")
	agent := *m
	agent.space = f.away
	d := agent.start("berthd", []string{"BERTH_URL=" + f.url(), "BERTH_TOKEN=" + f.token}, "run", "--state-dir", filepath.Join(m.home, "state"), "--prometheus-address", "unix:"+filepath.Join(m.home, "metrics"))
	d.wait("ready", 30*time.Second)
	f.pid = d.cmd.Process.Pid // ip has become berthd
	return f
}

// link cuts the link, or mends it: the agent's own end loses its carrier.
func (f *far) link(state string) {
	f.t.Helper()
	f.must("ip", "link", "set", "here", state)
}

// use is what an agent takes at one moment.
type use struct {
	processor               time.Duration // since it was started
	goroutines, descriptors int
	resident                int // KiB
}

func (u use) String() string {
	return fmt.Sprintf("%d goroutines, %d descriptors, %.1f MB", u.goroutines, u.descriptors, float64(u.resident)*1024/1e6)
}

var metric = regexp.MustCompile(`(?m)^go_goroutines (\d+)`)

// use reads it. What cannot be read fails the test.
func (f *far) use() (u use) {
	f.t.Helper()
	found := metric.FindStringSubmatch(f.must("curl", "-sf", "--unix-socket", filepath.Join(f.home, "metrics"), "http://berthd/"))
	if found == nil {
		f.t.Fatal("the metrics have no goroutines")
	}
	u.goroutines, _ = strconv.Atoi(found[1])
	proc := fmt.Sprintf("/proc/%d/", f.pid)
	descriptors, err := os.ReadDir(proc + "fd")
	if err != nil {
		f.t.Fatal(err)
	}
	u.descriptors = len(descriptors)
	stat, err := os.ReadFile(proc + "stat")
	if err != nil {
		f.t.Fatal(err)
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	for _, field := range fields[11:13] { // utime and stime, in ticks of 10 ms
		ticks, _ := strconv.Atoi(field)
		u.processor += time.Duration(ticks) * 10 * time.Millisecond
	}
	pages, _ := strconv.Atoi(fields[21])
	u.resident = pages * os.Getpagesize() / 1024
	return u
}

// What an agent may take more at the end than it took at the beginning: what the runtime keeps for a while, and what a ticker just does.
const (
	moreGoroutines, moreDescriptors = 8, 4
	moreResident                    = 4 << 10 // KiB
)

// flat fails if later moments took more than earlier ones of the same kind.
func flat(t *testing.T, what string, earlier, later []use) {
	t.Helper()
	most := func(all []use) (m use) {
		for _, u := range all {
			m.goroutines, m.descriptors, m.resident = max(m.goroutines, u.goroutines), max(m.descriptors, u.descriptors), max(m.resident, u.resident)
		}
		return m
	}
	before, after := most(earlier), most(later)
	t.Logf("%s: at most %v, then at most %v", what, before, after)
	if after.goroutines > before.goroutines+moreGoroutines || after.descriptors > before.descriptors+moreDescriptors || after.resident > before.resident+moreResident {
		t.Errorf("%s: it grew", what)
	}
}

// TestStill: an agent that cannot reach its server, or only now and then, takes no more the longer that lasts. With BERTH_LONG=1 for 24 minutes.
func TestStill(t *testing.T) {
	minute, step := 3*time.Second, time.Second
	if os.Getenv("BERTH_LONG") != "" {
		minute, step = time.Minute, 10*time.Second
	}
	const minutes = 24
	rounds := atLength(3, minutes)
	for name, test := range map[string]func(f *far){
		"offline": func(f *far) {
			f.link("down")
			time.Sleep(minute) // it is time itself that is to do no harm
		},
		"flapping": func(f *far) {
			for until := time.Now().Add(minute); time.Now().Before(until); {
				for _, state := range []string{"down", "up"} {
					f.link(state)
					time.Sleep(step)
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFar(t)
			var during []use
			var spent []time.Duration
			calm := []use{f.use()}
			last := calm[0]
			for range rounds {
				test(f)
				now := f.use()
				during, spent = append(during, now), append(spent, now.processor-last.processor)
				last = now
				t.Logf("%v of the processor; %v", spent[len(spent)-1], now)
			}
			third := rounds / 3
			flat(t, "the first and the last third", during[:third], during[rounds-third:])
			sum := func(all []time.Duration) (s time.Duration) {
				for _, d := range all {
					s += d
				}
				return s
			}
			// A tick of slack for each sample, as that is what the kernel counts in.
			if first, final := sum(spent[:third]), sum(spent[rounds-third:]); final > first*3/2+time.Duration(third)*100*time.Millisecond {
				t.Errorf("it takes more and more of the processor: %v", spent)
			}
			f.link("up")
			f.waitConnected(time.Minute)
			var after []use
			eventually(t, time.Minute, "what was for the bad times is gone", func() bool {
				after = append(after[:0], f.use())
				return after[0].goroutines <= calm[0].goroutines+moreGoroutines && after[0].descriptors <= calm[0].descriptors+moreDescriptors
			})
			t.Logf("before %v, afterwards %v", calm[0], after[0])
			if got := strings.TrimSpace(f.berth("ssh", "box", "echo", "reached")); got != "reached" {
				t.Errorf("afterwards a command says %q", got)
			}
			if slices.Max(spent) > minute/4 {
				t.Errorf("it takes a quarter of a processor: %v", spent)
			}
		})
	}
}
