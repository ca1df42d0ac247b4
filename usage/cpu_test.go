package usage

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"testing"
)

func TestLimitedCPU(t *testing.T) {
	self := func(text string) map[string]string { return map[string]string{"proc/self/cgroup": text} }
	unified := map[string]string{"cpu.max": "150000 100000\n", "cpu.stat": "usage_usec 5000000\nuser_usec 1\n"}
	legacy := map[string]string{"cpu.cfs_quota_us": "150000\n", "cpu.cfs_period_us": "100000\n", "cpuacct.usage": "5000000000\n"}
	for name, tt := range map[string]struct {
		files []map[string]string
		quota float64
	}{
		"no control groups": {nil, 0},
		"unified":           {[]map[string]string{self("0::/\n"), in("sys/fs/cgroup", unified)}, 1.5},
		"tightest of two":   {[]map[string]string{self("0::/a/b\n"), in("sys/fs/cgroup/a", unified), in("sys/fs/cgroup/a/b", map[string]string{"cpu.max": "400000 100000\n"})}, 1.5},
		"no limit":          {[]map[string]string{self("0::/\n"), in("sys/fs/cgroup", map[string]string{"cpu.max": "max 100000\n"})}, 0},
		"legacy":            {[]map[string]string{self("4:cpu,cpuacct:/x\n2:memory:/y\n"), in("sys/fs/cgroup/cpu/x", legacy)}, 1.5},
		"legacy, no limit":  {[]map[string]string{self("4:cpu,cpuacct:/\n"), in("sys/fs/cgroup/cpu", map[string]string{"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"})}, 0},
		"nonsense":          {[]map[string]string{self("0::/\n"), in("sys/fs/cgroup", map[string]string{"cpu.max": "\n"})}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			all := map[string]string{}
			for _, files := range tt.files {
				maps.Copy(all, files)
			}
			write(t, root, all)
			dir, quota, ok := machine(root).limitedCPU()
			if ok != (tt.quota != 0) || quota != tt.quota {
				t.Fatalf("quota %v, %v; want %v", quota, ok, tt.quota)
			}
			if !ok {
				return
			}
			if seconds, err := groupSeconds(dir); err != nil || seconds != 5 {
				t.Errorf("seconds %v, %v", seconds, err)
			}
		})
	}
}

func write(t *testing.T, root string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestHostSeconds(t *testing.T) {
	for text, want := range map[string]float64{"cpu  100 0 200 5000 40 0 60 0 7 0\ncpu0 1\n": 3.6, "cpu 1\n": -1, "intr 1 2 3 4 5 6 7 8 9\n": -1, "cpu a b c d e f g h i\n": -1} {
		root := t.TempDir()
		write(t, root, map[string]string{"proc/stat": text})
		if got, err := machine(root).hostSeconds(); err != nil && want != -1 || err == nil && got != want {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
}

// TestCPU measures this machine while it works.
func TestCPU(t *testing.T) {
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
		}
	}()
	host, err := HostCPU(t.Context())
	own, err2 := CPU(t.Context())
	close(stop)
	<-done
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	if host.Used <= 0 || host.Total < 1 || own.Used <= 0 || own.Total <= 0 {
		t.Errorf("host %+v, own %+v", host, own)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := HostCPU(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want that it was cancelled", err)
	}
}
