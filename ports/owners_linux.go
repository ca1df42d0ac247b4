package ports

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// recheck is how old an answer may grow before it is looked at again: a descriptor may have been handed to another process, and a process may
	// run another program. Sooner would be most of what a watch costs.
	recheck = 30 * time.Second
	// retryUnknown is the same for a socket whose owner could not be found, which is mostly for want of rights and costs a whole walk.
	retryUnknown = time.Minute
	// How much of what was found out is looked at again in one scan, so that no scan is a long one.
	maxProcesses = 8
	maxHolders   = 64
)

// owners remembers which process holds which socket. Its zero value knows nothing.
type owners struct {
	byKey     map[socketKey]*holder
	holders   []*holder // of the sockets of the last scan, in their order
	processes map[int]*process
	count     count // when they were last seen to live
	next      int   // where to look again
	walks     budget
	reader    reader
	lost      bool // some owner has ended since this was last asked

	users     map[uint32]string
	usersRead time.Time
}

// holder is who holds a socket.
type holder struct {
	key     socketKey
	pid     int // 0: not found
	fd      string
	checked time.Time // zero: not looked for yet
}

// resolve makes sure that the owner of each socket is known, as far as it can be, and forgets those of other sockets. It reports whether anything that
// is told of owners has changed. fresh says that the sockets are others than the last time.
func (o *owners) resolve(ctx context.Context, sockets []socket, fresh bool, processes count, now time.Time) bool {
	if fresh {
		o.take(sockets)
	}
	changed := o.verify(processes, now)
	var wanted map[uint32]*holder
	for _, h := range o.holders {
		if h.pid == 0 && h.key.inode != 0 && now.Sub(h.checked) >= retryUnknown {
			if wanted == nil {
				wanted = make(map[uint32]*holder)
			}
			wanted[h.key.inode] = h
		}
	}
	if len(wanted) == 0 || !o.walks.grant(now) {
		return changed
	}
	began := time.Now()
	found := walk(ctx, wanted)
	o.walks.spend(time.Since(began))
	for h, at := range found {
		h.pid, h.fd, h.checked = at.pid, at.fd, now
	}
	if ctx.Err() == nil {
		for _, h := range wanted {
			h.checked = now
		}
	}
	o.read()
	return changed || len(found) > 0
}

// read reads what may be told of owners that are new.
func (o *owners) read() {
	var pids []int
	for _, h := range o.holders {
		if h.pid != 0 && o.processes[h.pid] == nil {
			pids = append(pids, h.pid)
		}
	}
	slices.Sort(pids)
	pids = slices.Compact(pids)
	read := make([]*process, len(pids))
	share(len(pids), func(next func() (int, bool)) {
		var r reader
		for i, ok := next(); ok; i, ok = next() {
			read[i] = r.process(pids[i])
		}
	})
	if o.processes == nil {
		o.processes = make(map[int]*process)
	}
	for i, pid := range pids {
		o.processes[pid] = read[i]
	}
}

// take replaces the sockets.
func (o *owners) take(sockets []socket) {
	byKey := make(map[socketKey]*holder, len(sockets))
	o.holders = o.holders[:0]
	used := make(map[int]bool)
	for _, s := range sockets {
		h := byKey[s.key]
		if h == nil {
			if h = o.byKey[s.key]; h == nil {
				h = &holder{key: s.key}
			}
			byKey[s.key] = h
		}
		used[h.pid] = true
		o.holders = append(o.holders, h)
	}
	o.byKey = byKey
	for pid := range o.processes {
		if !used[pid] {
			delete(o.processes, pid)
		}
	}
}

// verify looks whether what was found out still holds: whether the processes live, if any may have ended, and of what was read long ago a part
// again. It reports whether anything has changed.
func (o *owners) verify(processes count, now time.Time) bool {
	changed := false
	left := maxProcesses
	same := processes.known() && processes == o.count
	o.count = processes
	for pid, p := range o.processes {
		if !same && errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			o.lose(pid)
			changed = true
			continue
		}
		if now.Sub(p.read) < recheck || left == 0 {
			continue
		}
		left--
		again := o.reader.process(pid)
		if again.ticks != p.ticks { // another process by now, or none
			o.lose(pid)
			changed = true
			continue
		}
		again.started = p.started
		changed = changed || again.name != p.name || again.command != p.command || again.container != p.container || again.editor != p.editor
		o.processes[pid] = again
	}
	left = maxHolders
	for range o.holders {
		o.next = (o.next + 1) % len(o.holders)
		h := o.holders[o.next]
		if h.pid == 0 || now.Sub(h.checked) < recheck {
			continue
		}
		h.checked = now
		if link, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", h.pid, h.fd)); err != nil || link != fmt.Sprintf("socket:[%d]", h.key.inode) {
			h.pid, h.checked = 0, time.Time{}
			changed = true
		}
		if left--; left == 0 {
			break
		}
	}
	return changed
}

// lose forgets a process that is gone. Its sockets may live on in others that have them too.
func (o *owners) lose(pid int) {
	o.lost = true
	delete(o.processes, pid)
	for _, h := range o.holders {
		if h.pid == pid {
			h.pid, h.checked = 0, time.Time{}
		}
	}
}

// pid returns the owner of the socket at i, or 0.
func (o *owners) pid(i int) int { return o.holders[i].pid }

// process returns what is known of the owner of a socket.
func (o *owners) process(pid int) *process {
	if o.processes[pid] == nil { // lost, and found again by another way
		o.read()
	}
	return o.processes[pid]
}

// user returns the name of a user, or the number if it has none.
func (o *owners) user(uid uint32) string {
	// A machine may have many users, and get others.
	if o.users == nil || len(o.users) > 1000 || time.Since(o.usersRead) > retryUnknown {
		o.users, o.usersRead = make(map[uint32]string), time.Now()
	}
	if name, ok := o.users[uid]; ok {
		return name
	}
	id := strconv.FormatUint(uint64(uid), 10)
	name := id
	if u, err := user.LookupId(id); err == nil {
		name = u.Username
	}
	o.users[uid] = name
	return name
}

// budget is how much time walks through all descriptors may take, which on a large machine is most of a second each: programs that open and close
// sockets all the time are not worth a processor. Its zero value is a whole one.
type budget struct {
	left time.Duration
	seen time.Time
}

const (
	walkShare = 20          // one part in so many of all time
	walkBurst = time.Second // at once after a pause
)

// grant reports whether there is time to spend.
func (b *budget) grant(now time.Time) bool {
	if b.seen.IsZero() {
		b.left = walkBurst
	} else {
		b.left = min(walkBurst, b.left+now.Sub(b.seen)/walkShare)
	}
	b.seen = now
	return b.left > 0
}

func (b *budget) spend(d time.Duration) { b.left -= d }

// place is where a socket was found.
type place struct {
	pid int
	fd  string
}

// walk looks through the descriptors of every process for sockets in wanted, in the order of the processes' ids, until nothing is left. It returns the first
// place of each.
func walk(ctx context.Context, wanted map[uint32]*holder) map[*holder]place {
	pids := processes()
	found := make(map[*holder]place, len(wanted))
	var mu sync.Mutex
	share(len(pids), func(next func() (int, bool)) {
		w := walker{dirents: make([]byte, 32<<10)}
		for i, ok := next(); ok && ctx.Err() == nil; i, ok = next() {
			w.process(pids[i], wanted)
			mu.Lock()
			for _, f := range w.found {
				if at, ok := found[f.holder]; !ok || f.pid < at.pid {
					found[f.holder] = f.place
				}
			}
			// Processes that come before this one are being looked at or have been.
			done := len(found) == len(wanted)
			mu.Unlock()
			if done {
				return
			}
		}
	})
	return found
}

// share has n pieces of work done on as many processors as there are, up to four. work takes the next piece in order until there is none.
func share(n int, work func(next func() (int, bool))) {
	var taken atomic.Int64
	next := func() (int, bool) {
		i := int(taken.Add(1)) - 1
		return i, i < n
	}
	var all sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), 4, 1+n/minShare) - 1 {
		all.Go(func() { work(next) })
	}
	work(next)
	all.Wait()
}

// minShare is how many pieces make it worth to wake another processor.
const minShare = 32

// walker goes through descriptor tables without a string or a file object for each descriptor: there may be hundreds of thousands.
type walker struct {
	dirents []byte
	names   []string
	link    [64]byte // "socket:[4294967295]" fits; what does not is no socket
	found   []sighting
}

type sighting struct {
	holder *holder
	place
}

// process finds the sockets in wanted that a process has.
func (w *walker) process(pid int, wanted map[uint32]*holder) {
	w.found = w.found[:0]
	dir, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/fd", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil { // gone, or not ours to read
		return
	}
	defer unix.Close(dir)
	for { // until nothing comes: a signal cuts a piece short
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
			if h, ok := wanted[inode]; ok {
				w.found = append(w.found, sighting{h, place{pid, fd}})
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
