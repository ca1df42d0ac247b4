package usage

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// Cores is how much processor time is used, and how much there is; in processors.
type Cores struct{ Used, Total float64 }

// sample is over how long processor time is measured: short enough for a prompt, and twenty times the
// kernel's own unit.
const sample = 200 * time.Millisecond

// CPU measures the processor time that is used within the tightest quota around this process, or, if
// there is none, on the machine. It takes a moment; the error is ctx's if that ended first.
func CPU(ctx context.Context) (Cores, error) {
	if dir, quota, ok := machine("/").limitedCPU(); ok {
		return measure(ctx, func() (float64, error) { return groupSeconds(dir) }, quota)
	}
	return HostCPU(ctx)
}

// HostCPU measures the processor time that is used on the whole machine.
func HostCPU(ctx context.Context) (Cores, error) {
	return measure(ctx, machine("/").hostSeconds, float64(runtime.NumCPU()))
}

func measure(ctx context.Context, seconds func() (float64, error), total float64) (Cores, error) {
	before, err := seconds()
	if err != nil {
		return Cores{}, fmt.Errorf("cannot tell how much of the processor is in use: %w", err)
	}
	began := time.Now()
	select {
	case <-ctx.Done():
		return Cores{}, ctx.Err()
	case <-time.After(sample):
	}
	after, err := seconds()
	if err != nil {
		return Cores{}, fmt.Errorf("cannot tell how much of the processor is in use: %w", err)
	}
	return Cores{Used: math.Max(0, (after-before)/time.Since(began).Seconds()), Total: total}, nil
}

// ticks is how many of /proc/stat's units make a second; Linux has 100 for programs, whatever its own.
const ticks = 100

// hostSeconds returns how long the machine's processors have worked since it started.
func (m machine) hostSeconds() (float64, error) {
	file, err := os.ReadFile(filepath.Join(string(m), "proc/stat"))
	if err != nil {
		return 0, err
	}
	line, _, _ := strings.Cut(string(file), "\n")
	field := strings.Fields(line)
	if len(field) < 9 || field[0] != "cpu" {
		return 0, errors.New("/proc/stat does not say")
	}
	var busy float64
	for i, text := range field[1:9] { // user nice system idle iowait irq softirq steal
		v, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return 0, errors.New("/proc/stat does not say")
		}
		if i != 3 && i != 4 {
			busy += v
		}
	}
	return busy / ticks, nil
}

// limitedCPU returns the control group around this process with the tightest quota, and that; false if
// there is none.
func (m machine) limitedCPU() (tightest string, quota float64, found bool) {
	h, group, ok := m.group("cpu")
	if !ok {
		return "", 0, false
	}
	mount := filepath.Join(string(m), h.mount)
	for dir := filepath.Join(mount, group); ; dir = filepath.Dir(dir) {
		if q, ok := quotaOf(dir); ok && (!found || q < quota) {
			tightest, quota, found = dir, q, true
		}
		if len(dir) <= len(mount) {
			return tightest, quota, found
		}
	}
}

// quotaOf returns how many processors a group may use; false if it has no limit.
func quotaOf(dir string) (float64, bool) {
	if file, err := os.ReadFile(filepath.Join(dir, "cpu.max")); err == nil {
		var allowed, period float64
		if _, err := fmt.Sscan(string(file), &allowed, &period); err != nil || period <= 0 { // "max" is none
			return 0, false
		}
		return allowed / period, true
	}
	allowed, ok := number(filepath.Join(dir, "cpu.cfs_quota_us"))
	period, ok2 := number(filepath.Join(dir, "cpu.cfs_period_us"))
	if !ok || !ok2 || allowed <= 0 || period <= 0 { // -1 is none
		return 0, false
	}
	return float64(allowed) / float64(period), true
}

// groupSeconds returns how long the processes of a group have worked.
func groupSeconds(dir string) (float64, error) {
	if file, err := os.ReadFile(filepath.Join(dir, "cpu.stat")); err == nil {
		if v, ok := figure(file, "usage_usec"); ok {
			return float64(v) / 1e6, nil
		}
	}
	if v, ok := number(filepath.Join(dir, "cpuacct.usage")); ok { // mounted together with cpu, as systemd does
		return float64(v) / 1e9, nil
	}
	return 0, errors.New("its control group does not say")
}
