package usage

import (
	"cmp"
	"os"
	"path/filepath"
	"slices"
)

// Kills counts the processes that the kernel's OOM killer ended, since each counter began. A key names the file that
// says so: the event file of each control group around this process, and [MachineKills] for all of the machine.
type Kills map[string]int64

// MachineKills is the key of the counter that the whole machine has, all its containers included.
const MachineKills = "/proc/vmstat"

// Processes returns how many processes and threads the tightest control group around this process has and may have; false if there is no limit.
func Processes() (Amount, bool) { return machine("/").processes() }

func (m machine) processes() (tightest Amount, found bool) {
	h, group, ok := m.group("pids")
	if !ok {
		return Amount{}, false
	}
	mount := filepath.Join(string(m), h.mount)
	for dir := filepath.Join(mount, group); ; dir = filepath.Dir(dir) {
		limit, ok := number(filepath.Join(dir, "pids.max"))
		current, ok2 := number(filepath.Join(dir, "pids.current"))
		if ok && ok2 && (!found || limit-current < tightest.Total-tightest.Used) {
			tightest, found = Amount{Used: current, Total: limit}, true
		}
		if len(dir) <= len(mount) {
			return tightest, found
		}
	}
}

// OOMKills reads the counters that there are.
func OOMKills() Kills { return machine("/").oomKills() }

func (m machine) oomKills() Kills {
	kills := Kills{}
	if n, ok := oomKill(filepath.Join(string(m), MachineKills)); ok {
		kills[MachineKills] = n
	}
	h, group, ok := m.group("memory")
	if !ok {
		return kills
	}
	mount := "/" + h.mount
	for dir := filepath.Join(mount, group); ; dir = filepath.Dir(dir) {
		file := filepath.Join(dir, h.events)
		if n, ok := oomKill(filepath.Join(string(m), file)); ok {
			kills[file] = n
		}
		if len(dir) <= len(mount) {
			return kills
		}
	}
}

func oomKill(path string) (int64, bool) {
	file, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	return figure(file, "oom_kill")
}

// Rise is a counter that went up.
type Rise struct {
	File     string
	From, To int64
	// Own tells that it counts this process's own control group, and none around it.
	Own bool
}

// Since compares with earlier counts. It returns the rise that is nearest to this process, the machine's last; false if
// there is none. A group that was made anew meanwhile counts from 0.
func (k Kills) Since(before Kills) (Rise, bool) {
	files := make([]string, 0, len(k))
	for file := range k {
		files = append(files, file)
	}
	slices.SortFunc(files, func(a, b string) int { return cmp.Compare(len(b), len(a)) })
	if i := slices.Index(files, MachineKills); i >= 0 {
		files = append(slices.Delete(files, i, i+1), MachineKills)
	}
	for i, file := range files {
		from, known := before[file]
		if k[file] < from {
			from = 0
		}
		if known && k[file] > from {
			return Rise{File: file, From: from, To: k[file], Own: i == 0 && file != MachineKills}, true
		}
	}
	return Rise{}, false
}
