package usage

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestOOMKills(t *testing.T) {
	for name, tt := range map[string]struct {
		files map[string]string
		want  Kills
	}{
		"nothing": {nil, Kills{}},
		"version 1": {map[string]string{
			"proc/self/cgroup": "3:memory:/a/b\n0::/\n",
			"proc/vmstat":      "nr_free_pages 1\noom_kill 12\n",
			"sys/fs/cgroup/memory/a/b/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
			"sys/fs/cgroup/memory/a/memory.oom_control":   "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n",
		}, Kills{
			MachineKills: 12, "/sys/fs/cgroup/memory/a/b/memory.oom_control": 2, "/sys/fs/cgroup/memory/a/memory.oom_control": 5,
		}},
		"version 2, no count in the root": {map[string]string{
			"proc/self/cgroup":              "0::/a\n",
			"sys/fs/cgroup/a/memory.events": "low 0\noom 3\noom_kill 1\noom_group_kill 0\n",
		}, Kills{"/sys/fs/cgroup/a/memory.events": 1}},
		"no number": {map[string]string{"proc/vmstat": "oom_kill many\n"}, Kills{}},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			for path, text := range tt.files {
				path = filepath.Join(root, path)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff(tt.want, machine(root).oomKills()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestKillsSince(t *testing.T) {
	const own, around = "/sys/fs/cgroup/a/b/memory.events", "/sys/fs/cgroup/a/memory.events"
	before := Kills{own: 3, around: 7, MachineKills: 100}
	for name, tt := range map[string]struct {
		now  Kills
		want Rise
		rose bool
	}{
		"as before":      {before, Rise{}, false},
		"own group":      {Kills{own: 4, around: 8, MachineKills: 101}, Rise{own, 3, 4, true}, true},
		"group around":   {Kills{own: 3, around: 8, MachineKills: 101}, Rise{around, 7, 8, false}, true},
		"machine":        {Kills{own: 3, around: 7, MachineKills: 101}, Rise{MachineKills, 100, 101, false}, true},
		"made anew":      {Kills{own: 0, around: 8}, Rise{around, 7, 8, false}, true},
		"another group":  {Kills{"/sys/fs/cgroup/c/memory.events": 9}, Rise{}, false},
		"nothing to see": {Kills{}, Rise{}, false},
	} {
		if got, rose := tt.now.Since(before); got != tt.want || rose != tt.rose {
			t.Errorf("%s: %+v, %v", name, got, rose)
		}
	}
}

// FuzzOOMKill reads whatever a kernel may write.
func FuzzOOMKill(f *testing.F) {
	f.Add([]byte("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"))
	f.Add([]byte("oom_kill\noom_kill -\n"))
	f.Add([]byte("oom_kill 99999999999999999999\n"))
	f.Fuzz(func(t *testing.T, file []byte) {
		if n, ok := figure(file, "oom_kill"); !ok && n != 0 && n != 1<<63-1 && n != -1<<63 {
			t.Errorf("%d without a figure", n)
		}
	})
}
