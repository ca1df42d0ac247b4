package ports

import (
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// maxCommand is how much of a command line is told. One can have megabytes; this much says what it is.
const maxCommand = 1024

// reader reads files of /proc by plain system calls, into one place. What Go's files cost beyond that is more than what the kernel takes.
type reader struct{ buf []byte }

// file returns the beginning of a file of a process's directory, or nothing. It holds until the next one is read.
func (r *reader) file(dir int, name string) []byte {
	if r.buf == nil {
		r.buf = make([]byte, maxArguments)
	}
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	for {
		n, err := unix.Read(fd, r.buf) // these files are made as a whole, so there is no more than that
		if err == unix.EINTR {
			continue
		}
		return r.buf[:max(n, 0)]
	}
}

// process reads what may be read of a process.
func (r *reader) process(pid int) *process {
	p := &process{read: time.Now()}
	// To find the process takes half the time of reading a file of it, so that is done once.
	dir, err := unix.Open("/proc/"+strconv.Itoa(pid), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return p
	}
	defer unix.Close(dir)
	p.name, p.ticks = parseStat(string(r.file(dir, "stat")))
	p.started = sinceBoot(p.ticks, bootTime())
	p.container = containerOf(r.file(dir, "cgroup"))
	line := r.file(dir, "cmdline")
	p.editor = editorOf(line)
	text := string(line[:min(len(line), maxCommand)])
	p.command = strings.ToValidUTF8(strings.TrimRight(strings.ReplaceAll(text, "\x00", " "), " "), "�")
	return p
}

// parseStat takes the name and the start time out of /proc/PID/stat (proc(5)). The name may hold anything, brackets and spaces included.
func parseStat(stat string) (name, ticks string) {
	_, rest, ok := strings.Cut(stat, "(")
	end := strings.LastIndexByte(rest, ')')
	if !ok || end < 0 {
		return "", ""
	}
	name = strings.ToValidUTF8(rest[:end], "�")
	const startTime = 22 - 3 // the third field is the first one after the name
	fields := strings.Fields(rest[end+1:])
	if len(fields) <= startTime {
		return name, ""
	}
	return name, fields[startTime]
}

// sinceBoot turns a start time in the kernel's ticks into a time; nil if it is none.
func sinceBoot(text string, boot time.Time) *time.Time {
	ticks, err := strconv.ParseInt(text, 10, 64)
	// The kernel counts in hundredths of a second on every architecture that Go runs on. A century of them is a broken line.
	if err != nil || boot.IsZero() || ticks < 0 || ticks > 100*100*365*24*3600 {
		return nil
	}
	// The boot time is only known to within a moment; without rounding two lists of one process would differ.
	t := boot.Add(time.Duration(ticks) * (time.Second / 100)).UTC().Round(time.Second)
	return &t
}

// bootTime is when the machine started, or zero.
func bootTime() time.Time {
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return time.Time{}
	}
	return time.Now().Add(-time.Duration(up.Nano()))
}
