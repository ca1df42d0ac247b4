package ports

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// recheck is how old an answer may grow before it is looked at again: a descriptor may have been handed to another process, and a process may
	// run another program.
	recheck = 5 * time.Second
	// retryUnknown is the same for a socket whose owner could not be found, which is mostly for want of rights and costs a whole walk.
	retryUnknown = time.Minute
	// A command line can have megabytes; this much says what it is.
	maxCommand = 4096
)

// owners remembers which process holds which socket. Its zero value knows nothing.
type owners struct {
	sockets   map[socketKey]owner
	processes map[int]*process
	users     map[uint32]string
}

type owner struct {
	pid     int // 0: not found
	fd      string
	checked time.Time
}

type process struct {
	name, command string
	helper        string // what it belongs to, if it is hidden
	started       *time.Time
	read          time.Time
}

// resolve makes sure that the owner of each socket is known, as far as it can be, and forgets those of other sockets.
func (o *owners) resolve(ctx context.Context, sockets []socket) {
	now := time.Now()
	next := make(map[socketKey]owner, len(sockets))
	wanted := make(map[uint32]socketKey)
	pids := make(map[int]*process)
	keep := func(pid int) {
		if p := o.processes[pid]; p != nil && now.Sub(p.read) < recheck {
			pids[pid] = p
		}
	}
	for _, s := range sockets {
		if s.pid != 0 { // the source knows
			keep(s.pid)
			continue
		}
		known, ok := o.sockets[s.key]
		if ok && known.holds(s.key.inode, now) {
			next[s.key] = known
			keep(known.pid)
			continue
		}
		next[s.key] = owner{checked: now}
		if s.key.inode != 0 {
			wanted[s.key.inode] = s.key
		}
	}
	walk(ctx, wanted, func(key socketKey, pid int, fd string) { next[key] = owner{pid, fd, now} })
	o.sockets, o.processes = next, pids
}

// holds reports whether what was found out about a socket may still be used.
func (w *owner) holds(inode uint32, now time.Time) bool {
	switch {
	case w.pid == 0:
		return now.Sub(w.checked) < retryUnknown
	case now.Sub(w.checked) < recheck:
		// A pid in use tells enough for that long; looking into each process would cost more than all else.
		return !errors.Is(unix.Kill(w.pid, 0), unix.ESRCH)
	}
	link, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", w.pid, w.fd))
	w.checked = now
	return err == nil && link == fmt.Sprintf("socket:[%d]", inode)
}

// pid returns the owner of s, or 0.
func (o *owners) pid(s socket) int {
	if s.pid != 0 {
		return s.pid
	}
	return o.sockets[s.key].pid
}

// walk looks through the descriptors of every process, in the order of their ids, for sockets in wanted. It takes out what it finds, and stops when
// nothing is left.
func walk(ctx context.Context, wanted map[uint32]socketKey, found func(key socketKey, pid int, fd string)) {
	if len(wanted) == 0 {
		return
	}
	proc, err := os.Open("/proc")
	if err != nil {
		return
	}
	names, err := proc.Readdirnames(-1)
	proc.Close()
	if err != nil {
		return
	}
	var pids []int
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	w := walker{dirents: make([]byte, 32<<10)}
	for _, pid := range pids {
		if len(wanted) == 0 || ctx.Err() != nil {
			return
		}
		w.process(pid, wanted, found)
	}
}

// walker goes through descriptor tables without a string or a file object for each descriptor: there may be hundreds of thousands.
type walker struct {
	dirents []byte
	names   []string
	link    [64]byte // "socket:[4294967295]" fits; what does not is no socket
}

func (w *walker) process(pid int, wanted map[uint32]socketKey, found func(socketKey, int, string)) {
	dir, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/fd", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil { // gone, or not ours to read
		return
	}
	defer unix.Close(dir)
	for {
		n, err := unix.ReadDirent(dir, w.dirents)
		if err != nil || n <= 0 {
			return
		}
		_, _, w.names = unix.ParseDirent(w.dirents[:n], -1, w.names[:0])
		for _, fd := range w.names {
			n, err := unix.Readlinkat(dir, fd, w.link[:])
			if err != nil {
				continue
			}
			inode, ok := socketInode(w.link[:n])
			if !ok {
				continue
			}
			if key, ok := wanted[inode]; ok {
				delete(wanted, inode)
				found(key, pid, fd)
				if len(wanted) == 0 {
					return
				}
			}
		}
	}
}

// socketInode takes the number out of "socket:[123]".
func socketInode(link []byte) (uint32, bool) {
	digits, ok := bytes.CutPrefix(link, []byte("socket:["))
	if !ok {
		return 0, false
	}
	digits, ok = bytes.CutSuffix(digits, []byte("]"))
	if !ok || len(digits) == 0 || len(digits) > 10 {
		return 0, false
	}
	var n uint64
	for _, d := range digits {
		if d < '0' || d > '9' {
			return 0, false
		}
		n = n*10 + uint64(d-'0')
	}
	return uint32(n), n <= 1<<32-1
}

// process returns what is known of a process.
func (o *owners) process(pid int) *process {
	p := o.processes[pid]
	if p == nil {
		p = readProcess(pid)
		o.processes[pid] = p
	}
	return p
}

// readProcess reads what may be read of a process.
func readProcess(pid int) *process {
	p := &process{read: time.Now()}
	if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil {
		p.name, p.started = parseStat(string(stat), bootTime())
	}
	if f, err := os.Open(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil {
		text, _ := io.ReadAll(io.LimitReader(f, maxArguments))
		f.Close()
		p.helper = editorOf(text)
		text = text[:min(len(text), maxCommand)]
		p.command = strings.ToValidUTF8(strings.TrimRight(strings.ReplaceAll(string(text), "\x00", " "), " "), "�")
	}
	return p
}

// parseStat takes the name and the start time out of /proc/PID/stat (proc(5)). The name may hold anything, brackets and spaces included.
func parseStat(stat string, boot time.Time) (name string, started *time.Time) {
	_, rest, ok := strings.Cut(stat, "(")
	end := strings.LastIndexByte(rest, ')')
	if !ok || end < 0 {
		return "", nil
	}
	name = strings.ToValidUTF8(rest[:end], "�")
	const startTime = 22 - 3 // the third field is the first one after the name
	fields := strings.Fields(rest[end+1:])
	if boot.IsZero() || len(fields) <= startTime {
		return name, nil
	}
	ticks, err := strconv.ParseInt(fields[startTime], 10, 64)
	// The kernel counts in hundredths of a second on every architecture that Go runs on. A century of them is a broken line.
	if err != nil || ticks < 0 || ticks > 100*100*365*24*3600 {
		return name, nil
	}
	// The boot time is only known to within a moment; without rounding the answer would change from one reading to the next.
	t := boot.Add(time.Duration(ticks) * (time.Second / 100)).UTC().Round(time.Second)
	return name, &t
}

// bootTime is when the machine started, or zero.
func bootTime() time.Time {
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return time.Time{}
	}
	return time.Now().Add(-time.Duration(up.Nano()))
}

// user returns the name of a user, or the number if it has none.
func (o *owners) user(uid uint32) string {
	if name, ok := o.users[uid]; ok {
		return name
	}
	id := strconv.FormatUint(uint64(uid), 10)
	name := id
	if u, err := user.LookupId(id); err == nil {
		name = u.Username
	}
	if o.users == nil || len(o.users) > 1000 { // a machine may have more users than a list is worth
		o.users = make(map[uint32]string)
	}
	o.users[uid] = name
	return name
}
