package usage

import (
	"maps"
	"os"
	"path/filepath"
	"testing"
)

const meminfo = "MemTotal:       16000 kB\nMemFree:        1000 kB\nMemAvailable:   12000 kB\n"

// The figures of a container of 4 MiB: 2 MiB are in use, half of them page cache.
var container = map[string]string{
	"memory.max": "4194304\n", "memory.current": "2097152\n", "memory.stat": "anon 7\ninactive_file 1048576\n",
}

// in returns files as they lie in dir.
func in(dir string, files map[string]string) map[string]string {
	out := map[string]string{}
	for name, text := range files {
		out[filepath.Join(dir, name)] = text
	}
	return out
}

func TestMemory(t *testing.T) {
	host := Amount{Used: 4000 << 10, Total: 16000 << 10}
	limited := Amount{Used: 1 << 20, Total: 4 << 20}
	self := func(text string) map[string]string { return map[string]string{"proc/self/cgroup": text} }
	tests := map[string]struct {
		files []map[string]string
		want  Amount
	}{
		"no control groups": {nil, host},
		"container":         {[]map[string]string{self("0::/\n"), in("sys/fs/cgroup", container)}, limited},
		"limit above":       {[]map[string]string{self("0::/a/b\n"), in("sys/fs/cgroup/a", container), in("sys/fs/cgroup/a/b", map[string]string{"memory.max": "max\n", "memory.current": "1\n"})}, limited},
		"tightest of two":   {[]map[string]string{self("0::/a/b\n"), in("sys/fs/cgroup/a/b", container), in("sys/fs/cgroup/a", map[string]string{"memory.max": "8388608\n", "memory.current": "1\n"})}, limited},
		"path of the host":  {[]map[string]string{self("0::/docker/1234\n"), in("sys/fs/cgroup", container)}, limited},
		"no limit":          {[]map[string]string{self("0::/a\n"), in("sys/fs/cgroup/a", map[string]string{"memory.max": "max\n", "memory.current": "1\n"})}, host},
		"limit past host":   {[]map[string]string{self("0::/a\n"), in("sys/fs/cgroup/a", map[string]string{"memory.max": "999999999999\n", "memory.current": "1\n"})}, host},
		"version 1": {[]map[string]string{self("4:cpu,cpuacct:/x\n3:memory:/x\n0::/y\n"), in("sys/fs/cgroup/memory/x", map[string]string{
			"memory.limit_in_bytes": "4194304\n", "memory.usage_in_bytes": "2097152\n", "memory.stat": "total_inactive_file 1048576\n",
		})}, limited},
		"version 1, none": {[]map[string]string{self("3:memory:/x\n"), in("sys/fs/cgroup/memory/x", map[string]string{
			"memory.limit_in_bytes": "9223372036854771712\n", "memory.usage_in_bytes": "1\n",
		})}, host},
		"path that leaves": {[]map[string]string{self("0::/../../x\n"), in("x", container)}, host},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			files := map[string]string{"proc/meminfo": meminfo}
			for _, f := range tt.files {
				maps.Copy(files, f)
			}
			for path, text := range files {
				path = filepath.Join(root, path)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			got, err := machine(root).memory()
			if err != nil || got != tt.want {
				t.Errorf("memory = %+v, %v, want %+v", got, err, tt.want)
			}
		})
	}
}

func TestMemoryThatNobodyTells(t *testing.T) {
	root := t.TempDir()
	if got, err := machine(root).memory(); err == nil {
		t.Errorf("memory = %+v without /proc", got)
	}
}

// TestThisMachine: the real kernel's figures make sense.
func TestThisMachine(t *testing.T) {
	memory, err := Memory()
	if err != nil {
		t.Fatal(err)
	}
	volume, err := Volume(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for name, a := range map[string]Amount{"memory": memory, "volume": volume} {
		if a.Used <= 0 || a.Used > a.Total {
			t.Errorf("%s: %+v", name, a)
		}
	}
	if _, err := Volume(filepath.Join(t.TempDir(), "missing")); err == nil {
		t.Error("a volume that is not there was measured")
	}
}
