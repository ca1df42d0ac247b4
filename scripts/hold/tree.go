package hold

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

// killLimit is how long what does not end by SIGKILL at once is killed again: a process that forked while it was looked for is met the next time, and one
// that the kernel holds is left to it.
const killLimit = time.Second

// process is one as /proc shows it.
type process struct {
	pid, parent, session int
	started              string // with the id it names a process for good
}

// Tree is all that came of a process: its session, and whoever was forked by a member, however far it went. Who has left by a double fork
// before the tree was first looked at, as a daemon does, is none of it.
type Tree struct {
	leader int // which began a session
	seen   map[int]process
}

// NewTree returns the tree of a process, which must have begun a session.
func NewTree(leader int) *Tree { return &Tree{leader: leader, seen: map[int]process{}} }

// living returns the members that are there, and remembers them: once its parent is dead, nothing shows where a process came from.
func (t *Tree) living() []process {
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

// Signal sends sig to all members, and tells whether there was any. The group is signalled as a whole: it cannot fork away.
func (t *Tree) Signal(sig syscall.Signal) bool {
	living := t.living()
	group := syscall.Kill(-t.leader, sig) == nil
	for _, p := range living {
		if own, err := syscall.Getpgid(p.pid); !group || err != nil || own != t.leader {
			_ = syscall.Kill(p.pid, sig) // gone meanwhile is as good
		}
	}
	return len(living) > 0 || group && !hasProc()
}

// Kill ends whoever is left.
func (t *Tree) Kill() {
	for limit := time.Now().Add(killLimit); t.Signal(syscall.SIGKILL) && time.Now().Before(limit); {
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
