package scripts

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// groupPoll is how often the processes of a hung-up script are looked at.
const groupPoll = 100 * time.Millisecond

// killLimit is how long what does not end by SIGKILL at once is killed again: a process that forked while it was looked for is met the next time, and one
// that the kernel holds is left to it.
const killLimit = time.Second

// process is one as /proc shows it.
type process struct {
	pid, parent, session int
	started              string // with the id it names a process for good
}

// tree is all that came of a script's process: its session, and whoever was forked by a member, however far it went. Who has left by a double fork
// before the tree was first looked at, as a daemon does, is none of it.
type tree struct {
	leader int // the script's process, which began a session
	seen   map[int]process
}

func newTree(leader int) *tree { return &tree{leader: leader, seen: map[int]process{}} }

// living returns the members that are there, and remembers them: once its parent is dead, nothing shows where a process came from.
func (t *tree) living() []process {
	all := processes()
	for grown := true; grown; {
		grown = false
		for pid, p := range all {
			if t.seen[pid] == p {
				continue
			}
			parent, known := t.seen[p.parent]
			forked := known && all[p.parent].started == parent.started
			if pid == t.leader || p.session == t.leader || forked {
				t.seen[pid] = p
				grown = true
			}
		}
	}
	var living []process
	for pid, p := range t.seen {
		if now, ok := all[pid]; ok && now.started == p.started {
			living = append(living, p)
		}
	}
	return living
}

// signal sends sig to all members, and tells whether there was any. The group is signalled as a whole: it cannot fork away.
func (t *tree) signal(sig syscall.Signal) bool {
	living := t.living()
	group := syscall.Kill(-t.leader, sig) == nil
	for _, p := range living {
		if own, err := syscall.Getpgid(p.pid); !group || err != nil || own != t.leader {
			_ = syscall.Kill(p.pid, sig) // gone meanwhile is as good
		}
	}
	return len(living) > 0 || group && !hasProc()
}

// kill ends whoever is left.
func (t *tree) kill() {
	for limit := time.Now().Add(killLimit); t.signal(syscall.SIGKILL) && time.Now().Before(limit); {
		time.Sleep(killLimit / 100) // the dead take a moment to be gone
	}
}

// hasProc tells whether processes are shown: outside of Linux only the group can be asked.
func hasProc() bool {
	_, err := os.Stat("/proc/self/stat")
	return err == nil
}

// processes lists what lives, by id.
func processes() map[int]process {
	all := map[int]process{}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return all
	}
	for _, dir := range dirs {
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue // it has ended meanwhile
		}
		if p, ok := parseStat(string(bytes.TrimSpace(stat))); ok {
			all[p.pid] = p
		}
	}
	return all
}

// parseStat reads a line of /proc/PID/stat (proc(5)); false for the dead that wait for their parent.
func parseStat(stat string) (process, bool) {
	// The command in parentheses may hold spaces and parentheses.
	open, end := strings.IndexByte(stat, '('), strings.LastIndexByte(stat, ')')
	if open < 0 || end < open {
		return process{}, false
	}
	fields := strings.Fields(stat[end+1:]) // from the third on: state, parent, group, session, …; the 22nd is the start
	if len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return process{}, false
	}
	pid, pidErr := strconv.Atoi(strings.TrimSpace(stat[:open]))
	parent, parentErr := strconv.Atoi(fields[1])
	session, sessionErr := strconv.Atoi(fields[3])
	if errors.Join(pidErr, parentErr, sessionErr) != nil {
		return process{}, false
	}
	return process{pid: pid, parent: parent, session: session, started: fields[19]}, true
}

// end waits until nothing is left of a script that was hung up at some time, and kills what does not end within the grace.
func (r *Runner) end(t *tree, hungUp time.Time) {
	defer t.kill()
	deadline := time.NewTimer(time.Until(hungUp.Add(r.hangupGrace)))
	defer deadline.Stop()
	tick := time.NewTicker(groupPoll)
	defer tick.Stop()
	for t.signal(0) {
		select {
		case <-tick.C:
		case <-deadline.C:
			return
		case <-r.alive.Done():
			return
		}
	}
}
