package berthd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// machine is what the kernel tells of itself, and of the control group that this process sees as its
// root: in a container, the container's own.
type machine struct{ proc, cgroup fs.FS }

// unlimited is above what a version 1 control group has for "no limit".
const unlimited = float64(1 << 62)

// read returns the content of the first of files that is there.
func read(from fs.FS, files ...string) (string, error) {
	var err error
	for _, file := range files {
		var body []byte
		if body, err = fs.ReadFile(from, file); err == nil {
			return string(bytes.TrimSpace(body)), nil
		}
	}
	return "", err
}

// field returns the number beside a word in lines of "word number".
func field(body, word string) (float64, bool) {
	for line := range strings.Lines(body) {
		words := strings.Fields(line)
		if len(words) >= 2 && strings.TrimSuffix(words[0], ":") == word {
			v, err := strconv.ParseFloat(words[1], 64)
			return v, err == nil
		}
	}
	return 0, false
}

// inContainer tells whether the control group that we see has an account of its own. The root of a
// machine has none.
func (m machine) inContainer() bool {
	for _, file := range []string{"memory.current", "memory/memory.usage_in_bytes"} {
		if _, err := fs.Stat(m.cgroup, file); err == nil {
			limit, _ := read(m.cgroup, "memory.max", "memory/memory.limit_in_bytes")
			return file == "memory.current" || parseLimit(limit) != nil
		}
	}
	return false
}

// parseLimit reads a limit of a control group; nil is none.
func parseLimit(text string) *float64 {
	v, err := strconv.ParseFloat(text, 64)
	if err != nil || v <= 0 || v >= unlimited { // version 2 says "max"
		return nil
	}
	return &v
}

// cpu measures the processor time that is used, in cores.
func (m machine) cpu(ctx context.Context, host bool) (amount, error) {
	measure, total := m.hostSeconds, new(float64)
	*total = float64(runtime.NumCPU())
	if !host && m.inContainer() {
		measure, total = m.groupSeconds, m.quota()
	}
	before, err := measure()
	if err != nil {
		return amount{}, fmt.Errorf("cannot read the processor's use: %w", err)
	}
	began := time.Now()
	select {
	case <-ctx.Done():
		return amount{}, ctx.Err()
	case <-time.After(cpuSample):
	}
	after, err := measure()
	if err != nil {
		return amount{}, fmt.Errorf("cannot read the processor's use: %w", err)
	}
	return amount{Used: math.Max(0, (after-before)/time.Since(began).Seconds()), Total: total, Unit: "cores"}, nil
}

// ticks is how many of /proc/stat's units make a second; Linux has 100 for programs, whatever its own.
const ticks = 100

// hostSeconds returns how long the machine's processors have worked.
func (m machine) hostSeconds() (float64, error) {
	body, err := read(m.proc, "stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := strings.Cut(body, "\n")
	words := strings.Fields(line)
	if len(words) < 9 || words[0] != "cpu" {
		return 0, errors.New("/proc/stat is not as expected")
	}
	var busy float64
	for i, word := range words[1:9] { // user nice system idle iowait irq softirq steal
		v, err := strconv.ParseFloat(word, 64)
		if err != nil {
			return 0, errors.New("/proc/stat is not as expected")
		}
		if i != 3 && i != 4 {
			busy += v
		}
	}
	return busy / ticks, nil
}

// groupSeconds returns how long the control group's processes have worked.
func (m machine) groupSeconds() (float64, error) {
	if body, err := read(m.cgroup, "cpu.stat"); err == nil {
		if v, ok := field(body, "usage_usec"); ok {
			return v / 1e6, nil
		}
	}
	body, err := read(m.cgroup, "cpuacct/cpuacct.usage", "cpu,cpuacct/cpuacct.usage", "cpu/cpuacct.usage")
	if err != nil {
		return 0, err
	}
	v, err := strconv.ParseFloat(body, 64)
	return v / 1e9, err
}

// quota returns how many cores the control group may use; nil is no limit.
func (m machine) quota() *float64 {
	if body, err := read(m.cgroup, "cpu.max"); err == nil {
		allowed, period, _ := strings.Cut(body, " ")
		return divide(allowed, period)
	}
	allowed, _ := read(m.cgroup, "cpu/cpu.cfs_quota_us", "cpu,cpuacct/cpu.cfs_quota_us")
	period, _ := read(m.cgroup, "cpu/cpu.cfs_period_us", "cpu,cpuacct/cpu.cfs_period_us")
	return divide(allowed, period)
}

func divide(allowed, period string) *float64 {
	a, p := parseLimit(allowed), parseLimit(period)
	if a == nil || p == nil {
		return nil
	}
	cores := *a / *p
	return &cores
}

// memory tells how much memory is used, without what the kernel would give back at once.
func (m machine) memory(host bool) (amount, error) {
	if !host && m.inContainer() {
		return m.groupMemory()
	}
	body, err := read(m.proc, "meminfo")
	if err != nil {
		return amount{}, fmt.Errorf("cannot read the memory's use: %w", err)
	}
	total, known := field(body, "MemTotal")
	available, ok := field(body, "MemAvailable")
	if !known || !ok {
		return amount{}, errors.New("cannot read the memory's use: /proc/meminfo is not as expected")
	}
	total, available = total*1024, available*1024
	return amount{Used: total - available, Total: &total, Unit: "B"}, nil
}

func (m machine) groupMemory() (amount, error) {
	body, err := read(m.cgroup, "memory.current", "memory/memory.usage_in_bytes")
	if err != nil {
		return amount{}, fmt.Errorf("cannot read the memory's use: %w", err)
	}
	used, err := strconv.ParseFloat(body, 64)
	if err != nil {
		return amount{}, errors.New("cannot read the memory's use: the control group's is no number")
	}
	stat, _ := read(m.cgroup, "memory.stat", "memory/memory.stat")
	for _, name := range []string{"inactive_file", "total_inactive_file"} {
		if cache, ok := field(stat, name); ok && cache <= used {
			used -= cache
			break
		}
	}
	limit, _ := read(m.cgroup, "memory.max", "memory/memory.limit_in_bytes")
	return amount{Used: used, Total: parseLimit(limit), Unit: "B"}, nil
}

// diskUsage tells how much of the file system that holds path is used.
func diskUsage(path string) (amount, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return amount{}, fmt.Errorf("cannot read the use of the disk at %s: %w", path, err)
	}
	size := float64(st.Bsize)
	total := float64(st.Blocks) * size
	return amount{Used: total - float64(st.Bfree)*size, Total: &total, Unit: "B"}, nil
}
