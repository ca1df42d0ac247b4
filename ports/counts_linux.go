package ports

import (
	"bytes"
	"fmt"

	"golang.org/x/sys/unix"
)

// counts watches how many sockets of each kind a network namespace has, which the kernel tells in a few microseconds (/proc/PID/net/sockstat, and
// sockstat6). Its zero value has not looked.
type counts struct {
	fds      []int
	last, at []byte        // what was told the last time, and room for the next
	buf      [1 << 10]byte // more than six lines of five numbers
}

// changed reports whether they are others than the last time, or cannot be read.
func (c *counts) changed(pid int) bool {
	if c.fds == nil {
		for _, name := range []string{"sockstat", "sockstat6"} {
			fd, err := unix.Open(fmt.Sprintf("/proc/%d/net/%s", pid, name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err == unix.ENOENT && name == "sockstat6" { // no IPv6
				continue
			}
			if err != nil {
				c.close()
				return true
			}
			c.fds = append(c.fds, fd)
		}
	}
	c.last, c.at = c.at, c.last[:0]
	for _, fd := range c.fds {
		n, err := unix.Pread(fd, c.buf[:], 0)
		if err != nil {
			c.close()
			return true
		}
		c.at = inUse(c.buf[:n], c.at)
	}
	return !bytes.Equal(c.at, c.last)
}

func (c *counts) close() {
	for _, fd := range c.fds {
		unix.Close(fd)
	}
	*c = counts{}
}

// inUse appends the number of sockets in use of each kind to counts. The other numbers of such a table are of the whole machine, and change with traffic.
func inUse(table, counts []byte) []byte {
	for line := range bytes.Lines(table) {
		kind, numbers, ok := bytes.Cut(line, []byte(": inuse "))
		if !ok {
			continue
		}
		end := 0
		for end < len(numbers) && numbers[end] >= '0' && numbers[end] <= '9' {
			end++
		}
		counts = append(append(append(append(counts, kind...), ' '), numbers[:end]...), '\n')
	}
	return counts
}
