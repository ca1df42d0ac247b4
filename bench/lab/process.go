package lab

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// Resident returns the resident memory of a process in MB.
func Resident(pid int) (float64, error) { return memory(pid, "VmRSS:") }

// Anonymous returns the part of it that is no file's, in MB.
func Anonymous(pid int) (float64, error) { return memory(pid, "RssAnon:") }

// Peak returns the most memory that was resident since the process began, or since [ForgetPeak], in MB.
func Peak(pid int) (float64, error) { return memory(pid, "VmHWM:") }

// ForgetPeak lets the peak begin anew.
func ForgetPeak(pid int) error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0)
}

func memory(pid int, field string) (float64, error) {
	body, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(body)) {
		var kib float64
		if _, err := fmt.Sscanf(line, field+" %f kB", &kib); err == nil {
			return kib * 1024 / 1e6, nil
		}
	}
	return 0, fmt.Errorf("process %d has no %s", pid, field)
}

// Processor returns the processor time that a process has used.
func Processor(pid int) (time.Duration, error) {
	body, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field is the name in parentheses, which may hold spaces; utime and stime are 12 and 13 after it.
	fields := strings.Fields(string(body[bytes.LastIndexByte(body, ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("cannot read the processor time of process %d", pid)
	}
	var used time.Duration
	for _, f := range fields[11:13] {
		ticks, err := strconv.Atoi(f)
		if err != nil {
			return 0, err
		}
		used += time.Duration(ticks) * 10 * time.Millisecond // the kernel counts in ticks of 10 ms
	}
	return used, nil
}
