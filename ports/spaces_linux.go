package ports

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// settling is for how long a new process is looked at in each scan: one that is on its way into a namespace of its own does so within moments.
	settling = 3 * time.Second
	// maxSeats is how many processes are looked at again in one scan, so that no scan is a long one.
	maxSeats = 64
)

// namespace is a network namespace. Each has an id, which is the inode of its file in /proc/PID/ns or, where that may not be read, of its
// /proc/PID/net/tcp; the kernel takes both from one set of numbers.
type namespace struct {
	id     int64
	pid    int              // a process in it; 0 stands for ourselves
	pids   map[int]struct{} // all known ones
	walled bool             // it may not be entered, only read in /proc
	// The container that its processes run in, and the process that was asked.
	container   string
	containerOf int

	// Kept for the next scan while somebody watches. They keep the namespace alive, so not longer than its processes do.
	conn   *diagConn
	counts counts
	last   []socket  // that were in it
	asked  time.Time // when they were; zero: not yet
}

// close ends what is kept between scans.
func (ns *namespace) close() {
	ns.hangUp()
	ns.counts.close()
	ns.last, ns.asked = nil, time.Time{}
}

// steady reports whether the namespace may be taken to be as it was.
func (ns *namespace) steady(now time.Time) bool {
	return !ns.counts.changed(ns.pid) && now.Sub(ns.asked) < sweep // the first has to be called
}

func (ns *namespace) hangUp() {
	if ns.conn != nil {
		ns.conn.close()
		ns.conn = nil
	}
}

// spaces knows the network namespaces in use, by the processes in them. Its zero value has looked at none.
type spaces struct {
	own      namespace
	ownLink  int64
	ownTable int64
	self     string // the container that we run in ourselves

	seats  map[int]*seat
	byID   map[int64]*namespace
	tables map[int64]*namespace // by the inode of net/tcp
	sorted []*namespace
	full   bool // there are more than maxNamespaces

	loads  *os.File // /proc/loadavg
	count  count
	moved  time.Time // when the newest process was last another than before
	walked time.Time
}

// seat is where a process was last seen.
type seat struct {
	ns             *namespace // nil: ours
	since, checked time.Time
}

func (f *spaces) ours() *namespace { return &f.own }

// release ends what is kept between scans while somebody watches.
func (f *spaces) release() {
	f.own.close()
	for _, ns := range f.byID {
		ns.close()
	}
	if f.loads != nil {
		f.loads.Close()
		f.loads = nil
	}
}

// others returns the namespaces that are not ours, sorted by id. What it costs is a read of one file, unless processes have begun since the last time.
func (f *spaces) others(now time.Time) []*namespace {
	if f.seats == nil {
		f.seats, f.byID, f.tables = make(map[int]*seat), make(map[int64]*namespace), make(map[int64]*namespace)
		f.ownLink, _ = linkOf("self")
		f.ownTable, _ = tableOf("self")
		if group, err := os.ReadFile("/proc/self/cgroup"); err == nil {
			f.self = containerOf(group)
		}
	}
	before := f.count
	f.count = f.read()
	if f.count.newest != before.newest {
		f.moved = now
	}
	if now.Sub(f.moved) < settling || now.Sub(f.walked) >= recheck {
		f.walk(now)
	}
	f.lookAgain(now)
	changed := false
	for _, ns := range f.byID {
		if !f.alive(ns) {
			f.forget(ns)
			changed = true
		}
	}
	if changed || len(f.sorted) != len(f.byID) {
		f.sorted = slices.SortedFunc(maps.Values(f.byID), func(a, b *namespace) int { return cmp.Compare(a.id, b.id) })
	}
	return f.sorted
}

// count is what the kernel tells of all processes in a few microseconds: how many threads there are, and which was started last. While both stay as
// they are none has begun, as the number of the last one would be another, and so none has ended either. Where berthd is in a container a thread
// outside that begins as one inside ends hides it, until the next change.
type count struct{ threads, newest string }

// known reports whether a kernel counts at all: some sandboxes answer with noughts.
func (c count) known() bool { return c.threads != "" && c.threads != "0" }

// read reads /proc/loadavg (proc(5)): three averages, threads that run and all, the newest.
func (f *spaces) read() count {
	if f.loads == nil {
		var err error
		if f.loads, err = os.Open("/proc/loadavg"); err != nil {
			return count{}
		}
	}
	var line [64]byte
	n, _ := f.loads.ReadAt(line[:], 0)
	fields := strings.Fields(string(line[:n]))
	if len(fields) != 5 {
		return count{}
	}
	_, threads, _ := strings.Cut(fields[3], "/")
	return count{threads, fields[4]}
}

// walk looks at the processes that have not settled, and forgets those that are gone.
func (f *spaces) walk(now time.Time) {
	// What was there before the first walk has settled.
	begun := now
	if f.walked.IsZero() {
		begun = now.Add(-settling)
	}
	f.walked = now
	pids := processes()
	for _, pid := range pids {
		s := f.seats[pid]
		if s == nil {
			s = &seat{since: begun}
			f.seats[pid] = s
		}
		if now.Sub(s.since) < settling || s.checked.IsZero() {
			f.check(pid, s, now)
		}
	}
	if len(f.seats) == len(pids) {
		return
	}
	here := make(map[int]bool, len(pids))
	for _, pid := range pids {
		here[pid] = true
	}
	for pid, s := range f.seats {
		if !here[pid] {
			f.move(pid, s, nil)
			delete(f.seats, pid)
		}
	}
}

// lookAgain looks at some of the processes that settled long ago: one may have moved, or left its number to another.
func (f *spaces) lookAgain(now time.Time) {
	left := maxSeats
	for pid, s := range f.seats {
		if now.Sub(s.checked) < recheck {
			continue
		}
		f.check(pid, s, now)
		if left--; left == 0 {
			return
		}
	}
}

// check finds out where a process is.
func (f *spaces) check(pid int, s *seat, now time.Time) {
	s.checked = now
	name := strconv.Itoa(pid)
	id, err := linkOf(name)
	switch {
	case err == nil && id == f.ownLink:
		f.move(pid, s, nil)
		return
	case err == nil:
		if ns := f.byID[id]; ns != nil {
			f.move(pid, s, ns)
			return
		}
	case !errors.Is(err, fs.ErrPermission):
		f.move(pid, s, nil) // gone
		return
	}
	// A new one, or one that may not be seen: its table of sockets is what tells it from others then.
	table, tableErr := tableOf(name)
	switch {
	case tableErr != nil || table == f.ownTable:
		f.move(pid, s, nil)
		return
	case err != nil:
		id = table
	}
	ns := f.tables[table]
	if ns == nil {
		if len(f.byID) >= maxNamespaces {
			f.full = true
			return
		}
		ns = &namespace{id: id, pids: make(map[int]struct{})}
		f.byID[id], f.tables[table] = ns, ns
	}
	f.move(pid, s, ns)
}

// stays looks whether the process by which a namespace is looked into is still there. If not, the next scan tries another.
func (f *spaces) stays(ns *namespace, now time.Time) bool {
	if s := f.seats[ns.pid]; s != nil {
		f.check(ns.pid, s, now)
	}
	_, ok := ns.pids[ns.pid]
	return ok
}

func (f *spaces) move(pid int, s *seat, ns *namespace) {
	if s.ns == ns {
		return
	}
	if s.ns != nil {
		delete(s.ns.pids, pid)
	}
	if s.ns = ns; ns != nil {
		ns.pids[pid] = struct{}{}
	}
}

// alive reports whether a namespace has a process still, and sees to it that pid is one.
func (f *spaces) alive(ns *namespace) bool {
	for {
		if _, ok := ns.pids[ns.pid]; ok && !errors.Is(unix.Kill(ns.pid, 0), unix.ESRCH) {
			return true
		}
		delete(ns.pids, ns.pid)
		if len(ns.pids) == 0 {
			return false
		}
		ns.pid = slices.Min(slices.Collect(maps.Keys(ns.pids)))
	}
}

func (f *spaces) forget(ns *namespace) {
	ns.close()
	delete(f.byID, ns.id)
	maps.DeleteFunc(f.tables, func(_ int64, other *namespace) bool { return other == ns })
	for pid, s := range f.seats {
		if s.ns == ns {
			delete(f.seats, pid)
		}
	}
}

// sweep is how long another network namespace may be taken to be as it was because it has as many sockets, while no owner of a socket ends. Asking in each
// of 20 takes about 2 ms.
const sweep = 10 * time.Second

// peek appends the sockets of another network namespace. One that ends while it is looked at has none; one that cannot be asked for the moment has
// those it had.
func (l *Lister) peek(ctx context.Context, ns *namespace, exact bool, now time.Time, all []socket) []socket {
	if !exact && ns.steady(now) {
		return append(all, ns.last...)
	}
	before := len(all)
	found, err := l.ask(ctx, ns, all)
	if ctx.Err() != nil {
		return all
	}
	if err != nil {
		l.cfg.Log.Debug("cannot read the sockets of a network namespace", "namespace", ns.id, "pid", ns.pid, "err", err)
		if !l.spaces.stays(ns, now) {
			return all
		}
		return append(all, ns.last...)
	}
	ns.last, ns.asked = append(ns.last[:0], found[before:]...), now
	if exact { // its counts are not of this moment
		ns.asked = time.Time{}
	}
	return found
}

// ask appends the sockets of another network namespace. One that may not be entered has them in /proc.
func (l *Lister) ask(ctx context.Context, ns *namespace, all []socket) ([]socket, error) {
	if !ns.walled {
		found, err := l.source.sockets(ctx, ns, all)
		if !errors.Is(err, fs.ErrPermission) {
			return found, err
		}
		l.cfg.Log.Debug("cannot enter a network namespace", "namespace", ns.id, "pid", ns.pid, "err", err)
		ns.walled = true
		l.walled.Store(true)
	}
	return procNet{}.sockets(ctx, ns, all)
}

// container returns the id of the container that a namespace belongs to, or "".
func (f *spaces) container(id int64) string {
	ns := f.byID[id]
	if ns == nil {
		return ""
	}
	if ns.containerOf != ns.pid {
		group, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", ns.pid))
		ns.container, ns.containerOf = f.foreign(containerOf(group)), ns.pid
	}
	return ns.container
}

// foreign leaves out the container that we are in ourselves: it is the whole machine to those who ask.
func (f *spaces) foreign(id string) string {
	if id == f.self {
		return ""
	}
	return id
}

// linkOf returns the id of a process's network namespace.
func linkOf(pid string) (int64, error) {
	path := "/proc/" + pid + "/ns/net"
	var link [32]byte // "net:[4026531840]" fits
	n, err := unix.Readlink(path, link[:])
	if err != nil {
		return 0, &fs.PathError{Op: "readlink", Path: path, Err: err}
	}
	digits, _ := strings.CutPrefix(string(link[:n]), "net:[")
	id, err := strconv.ParseInt(strings.TrimSuffix(digits, "]"), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("cannot read the namespace %q: %w", link[:n], err)
	}
	return id, nil
}

// tableOf returns the inode of the table of TCP sockets that a process sees, which each network namespace has for itself.
func tableOf(pid string) (int64, error) {
	var st unix.Stat_t
	path := "/proc/" + pid + "/net/tcp"
	if err := unix.Stat(path, &st); err != nil {
		return 0, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return int64(st.Ino), nil
}

// processes returns the ids of those that can be seen, sorted.
func processes() []int {
	proc, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	names, _ := proc.Readdirnames(-1)
	proc.Close()
	pids := make([]int, 0, len(names))
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids
}
