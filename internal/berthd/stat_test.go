package berthd

import (
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
)

func files(content map[string]string) fstest.MapFS {
	m := fstest.MapFS{}
	for name, body := range content {
		m[name] = &fstest.MapFile{Data: []byte(body)}
	}
	return m
}

func number(v float64) *float64 { return &v }

// As the kernels write them: version 2 in a container, version 1 in a container, the root of a machine.
var (
	groupV2 = map[string]string{
		"memory.current": "600000\n", "memory.max": "1000000\n", "memory.stat": "anon 1\ninactive_file 100000\n",
		"cpu.stat": "usage_usec 5000000\nuser_usec 1\n", "cpu.max": "150000 100000\n",
	}
	groupV1 = map[string]string{
		"memory/memory.usage_in_bytes": "600000\n", "memory/memory.limit_in_bytes": "1000000\n", "memory/memory.stat": "cache 9\ntotal_inactive_file 100000\n",
		"cpuacct/cpuacct.usage": "5000000000\n", "cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n",
	}
	proc = map[string]string{
		"stat":    "cpu  100 0 200 5000 40 0 60 0 7 0\ncpu0 1 2 3\n",
		"meminfo": "MemTotal:       2000 kB\nMemFree:  10 kB\nMemAvailable:    500 kB\n",
	}
)

func TestMachine(t *testing.T) {
	host := amount{Used: 1500 * 1024, Total: number(2000 * 1024), Unit: "B"}
	group := amount{Used: 500000, Total: number(1000000), Unit: "B"}
	with := func(group map[string]string, name, value string) map[string]string {
		changed := map[string]string{}
		for k, v := range group {
			changed[k] = v
		}
		changed[name] = value
		return changed
	}
	for name, tt := range map[string]struct {
		cgroup  map[string]string
		memory  amount
		quota   *float64
		seconds float64
	}{
		"version 2":           {groupV2, group, number(1.5), 5},
		"version 1":           {groupV1, group, number(1.5), 5},
		"version 2, no limit": {with(with(groupV2, "memory.max", "max\n"), "cpu.max", "max 100000\n"), amount{Used: 500000, Unit: "B"}, nil, 5},
		"version 1, no limit": {with(with(groupV1, "memory/memory.limit_in_bytes", "9223372036854771712\n"), "cpu/cpu.cfs_quota_us", "-1\n"), host, nil, 5},
		"a machine":           {map[string]string{"cpu.stat": "usage_usec 5000000\n"}, host, nil, 5},
	} {
		t.Run(name, func(t *testing.T) {
			m := machine{proc: files(proc), cgroup: files(tt.cgroup)}
			got, err := m.memory(false)
			if diff := cmp.Diff(tt.memory, got); err != nil || diff != "" {
				t.Errorf("memory %v (-want +got):\n%s", err, diff)
			}
			if got, err := m.memory(true); err != nil || !cmp.Equal(host, got) {
				t.Errorf("host memory %+v, %v", got, err)
			}
			if diff := cmp.Diff(tt.quota, m.quota()); diff != "" {
				t.Errorf("quota (-want +got):\n%s", diff)
			}
			if got, err := m.groupSeconds(); err != nil || got != tt.seconds {
				t.Errorf("seconds %v, %v", got, err)
			}
			if got, err := m.hostSeconds(); err != nil || got != 3.6 {
				t.Errorf("host seconds %v, %v", got, err)
			}
		})
	}
}

func TestAmountText(t *testing.T) {
	for _, tt := range []struct {
		amount amount
		prefix string
		want   string
	}{
		{amount{Used: 1.2, Total: number(4), Unit: "cores"}, "", "1.2/4 cores (30%)"},
		{amount{Used: 5.6 * (1 << 30), Total: number(16 << 30), Unit: "B"}, "Gi", "5.6/16 GiB (35%)"},
		{amount{Used: 0.04, Unit: "cores"}, "", "0 cores"},
		{amount{Used: 3 << 20, Total: number(0), Unit: "B"}, "Mi", "3/0 MiB"},
	} {
		if got := tt.amount.text(tt.prefix); got != tt.want {
			t.Errorf("%q, want %q", got, tt.want)
		}
	}
}

// TestStatVerb measures this machine.
func TestStatVerb(t *testing.T) {
	env := []string{envSelf + "=1", "HOME=/"}
	for args, want := range map[string]string{
		"cpu":                         `^[\d.]+(/[\d.]+)? cores( \(\d+%\))?\n$`,
		"cpu --host":                  `^[\d.]+/\d+ cores \(\d+%\)\n$`,
		"mem":                         `^[\d.]+(/[\d.]+)? GiB( \(\d+%\))?\n$`,
		"mem --host --prefix Mi":      `^[1-9][\d.]*/[\d.]+ MiB \(\d+%\)\n$`,
		"disk":                        `^[\d.]+/[\d.]+ GiB \(\d+%\)\n$`,
		"disk --path /proc":           `^0/0 GiB\n$`,
		"disk --path / --output json": `^\{"total":\d+(e\+\d+)?,"unit":"B","used":[\d.e+]+\}\n$`,
		"":                            `(?s)^host processor .*\nhost memory .*\nhome disk .*`,
	} {
		code, stdout, stderr := command(t, env, os.Args[0], append([]string{"stat"}, strings.Fields(args)...)...)
		if code != 0 || !regexp.MustCompile(want).MatchString(stdout) {
			t.Errorf("stat %s: %d %q %q, want %s", args, code, stdout, stderr, want)
		}
	}
	var all map[string]amount
	if _, stdout, _ := command(t, env, os.Args[0], "stat", "--output", "json"); json.Unmarshal([]byte(stdout), &all) != nil || all["host_memory"].Used == 0 {
		t.Errorf("stat as JSON: %s", stdout)
	}
	for args, want := range map[string]int{"gpu": 64, "cpu --prefix Gi": 64, "mem --prefix Xi": 64, "disk --path /no/such": 1, "--output yaml": 64, "cpu extra": 64} {
		if code, _, stderr := command(t, env, os.Args[0], append([]string{"stat"}, strings.Fields(args)...)...); code != want || stderr == "" {
			t.Errorf("stat %s: %d %q, want %d", args, code, stderr, want)
		}
	}
}
