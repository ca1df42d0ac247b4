package e2e

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// booted is a system of this machine's files, with a systemd of its own as its first process. What is changed there is gone with it; the network
// is the machine's.
type booted struct {
	*machine
	root  string // where its files are, for those outside
	pid   string // of its systemd
	ended chan struct{}
}

// boot copies programs to /usr/local/bin of the new system, lets prepare add to it, and starts it.
func boot(m *machine, prepare func(root string), programs ...string) *booted {
	m.t.Helper()
	b := &booted{machine: m, root: filepath.Join(m.tmp, "root")}
	layer := filepath.Join(m.tmp, "layer") // on a disk of memory: it may not lie in what it is laid over
	for _, dir := range []string{b.root, layer} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			m.t.Fatal(err)
		}
	}
	m.must("mount", "-t", "tmpfs", "berth-e2e", layer)
	unmount := func(dir string) {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			m.t.Errorf("%v: %s", err, out)
		}
	}
	m.t.Cleanup(func() { unmount(layer) })
	m.must("mkdir", filepath.Join(layer, "up"), filepath.Join(layer, "work"))
	m.must("mount", "-t", "overlay", "overlay", "-o", fmt.Sprintf("lowerdir=/,upperdir=%[1]s/up,workdir=%[1]s/work", layer), b.root)
	m.t.Cleanup(func() { unmount(b.root) })
	for _, program := range programs {
		m.must("cp", filepath.Join(bin, program), filepath.Join(b.root, "usr/local/bin", program))
	}
	prepare(b.root)
	b.powerOn()
	return b
}

// powerOn starts the system with the files that it has.
func (b *booted) powerOn() {
	m := b.machine
	m.t.Helper()
	var console bytes.Buffer
	// Nothing of what this machine starts at its boot is started, but for what all units need.
	cmd := m.command("systemd-nspawn", "--quiet", "--directory="+b.root, "--register=no", "--keep-unit", "--console=pipe", "--boot", "systemd.unit=basic.target")
	cmd.Stdout, cmd.Stderr = &console, &console
	stdin, err := cmd.StdinPipe() // it ends with its console
	if err != nil {
		m.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		m.t.Fatalf("cannot start systemd-nspawn (install systemd-container): %v", err)
	}
	ended := make(chan struct{})
	b.pid, b.ended = "", ended
	go func() { defer close(ended); cmd.Wait() }()
	m.t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM) // a poweroff
		select {
		case <-ended:
		case <-time.After(30 * time.Second):
			cmd.Process.Kill()
			<-ended
		}
		stdin.Close()
		if m.t.Failed() {
			m.t.Logf("the console of systemd:\n%s", &console)
		}
	})
	eventually(m.t, time.Minute, "systemd has started", func() bool {
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%[1]d/task/%[1]d/children", cmd.Process.Pid))
		for _, child := range strings.Fields(string(children)) {
			if name, _ := os.ReadFile("/proc/" + child + "/comm"); string(name) == "systemd\n" {
				b.pid = child
			}
		}
		if b.pid == "" {
			return false
		}
		out, _ := b.inside("systemctl", "is-active", "basic.target").Output()
		return string(out) == "active\n"
	})
}

// off waits until the power is off.
func (b *booted) off() {
	b.t.Helper()
	select {
	case <-b.ended:
	case <-time.After(time.Minute):
		b.t.Fatal("the system is not off within a minute")
	}
}

// cutPower ends everything in the system at once.
func (b *booted) cutPower() {
	b.t.Helper()
	if out, err := exec.Command("kill", "-KILL", b.pid).CombinedOutput(); err != nil { // with its first process a namespace ends
		b.t.Fatalf("%v: %s", err, out)
	}
	b.off()
}

// inside is a command in the new system.
func (b *booted) inside(argv ...string) *exec.Cmd {
	cmd := exec.Command("nsenter", append([]string{"--target", b.pid, "--mount", "--uts", "--ipc", "--pid", "--cgroup", "--"}, argv...)...)
	cmd.Env = []string{"PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"}
	return cmd
}

// do runs a command in the new system, which must end well.
func (b *booted) do(argv ...string) string {
	b.t.Helper()
	out, err := b.inside(argv...).CombinedOutput()
	if err != nil {
		b.t.Fatalf("%q: %v\n%s", argv, err, out)
	}
	return strings.TrimSpace(string(out))
}

// property is what systemd says of berthd's unit.
func (b *booted) property(name string) string {
	b.t.Helper()
	return b.do("systemctl", "show", "--value", "--property="+name, "berthd.service")
}

// wait waits until a property has a value.
func (b *booted) wait(limit time.Duration, name, want string) {
	b.t.Helper()
	got := ""
	defer func() {
		if b.t.Failed() {
			b.t.Logf("the last of %s was %q\n%s", name, got, b.do("journalctl", "--no-pager", "--lines=100"))
		}
	}()
	eventually(b.t, limit, name+" is "+want, func() bool {
		got = b.property(name)
		return strings.Contains(got, want)
	})
}

// clear takes away what this machine's own berthd keeps, what its root's shells read first, and paths more.
func (r *road) clear(root string, more ...string) {
	r.t.Helper()
	for _, path := range append(more, "var/lib/berthd", "root/.bashrc", "root/.bash_profile", "root/.bash_login", "root/.profile") {
		if err := os.RemoveAll(filepath.Join(root, path)); err != nil {
			r.t.Fatal(err)
		}
	}
}

// boot starts a system with berthd as a unit that is not started yet, and files beside it.
func (r *road) boot(files map[string]string) *booted {
	r.t.Helper()
	unit, err := os.ReadFile("../deploy/systemd/berthd.service")
	if err != nil {
		r.t.Fatal(err)
	}
	all := map[string]string{
		"etc/systemd/system/berthd.service": string(unit),
		"etc/berthd/berthd.env":             "BERTH_URL=" + r.url() + "\n",
		"etc/credstore/agent-token":         r.token + "\n",
	}
	maps.Copy(all, files)
	return boot(r.machine, func(root string) {
		r.clear(root)
		for path, text := range all {
			path = filepath.Join(root, path)
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				r.t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				r.t.Fatal(err)
			}
		}
	}, "berthd", "berthd-ptyhost")
}

// counter counts what it is asked.
const counter = "#!/bin/sh\nwhile read line; do n=$((n+1)); echo \"$line has count $n\"; done\n"

// TestSystemd runs berthd as a unit of a real systemd: it tells how it is, its terminals live through whatever becomes of it but a stop, and a stop
// runs the stop scripts.
func TestSystemd(t *testing.T) {
	r := newRoad(t, `
agents:
  - name: box
    scripts:
      - {display_name: begin, run_on_start: true, script: "echo begun >>/var/tmp/scripts; cat /proc/self/oom_score_adj >/var/tmp/score"}
      - {display_name: end, run_on_stop: true, script: "sleep 1; echo ended >>/var/tmp/scripts"}
`)
	b := r.boot(map[string]string{
		"usr/local/bin/counter":                              counter,
		"etc/systemd/system/berthd.service.d/impatient.conf": "[Service]\nWatchdogSec=3s\nRestartSec=100ms\nOOMScoreAdjust=300\n",
	})

	b.do("chmod", "+x", "/usr/local/bin/counter")
	b.do("systemctl", "start", "berthd") // returns when it is ready
	b.wait(20*time.Second, "StatusText", "serving as box (direct)")
	if main := b.property("MainPID"); strings.Contains(b.do("cat", "/proc/"+main+"/cmdline"), r.token) {
		t.Error("the token is in berthd's command line")
	}

	// Five terminals, each with a program that counts what it is asked.
	count := func(i int, want string) {
		t.Helper()
		p := r.terminal("shell", "box", fmt.Sprintf("t%d", i), "--command", "counter")
		p.ask("this", want)
		p.cmd.Process.Kill()
	}
	all := func(step int) {
		t.Helper()
		for i := range 5 {
			count(i, fmt.Sprintf("this has count %d", step))
		}
	}
	all(1)

	// Whoever may not go below 0 can still go there from what the unit has.
	for _, name := range []string{"berthd", "berthd-ptyhost"} {
		if got := b.do("sh", "-c", "cat /proc/$(pgrep -xo "+name+")/oom_score_adj"); got != "0" && got != "-900" {
			t.Errorf("%s is as likely to be killed when memory is short as %s says", name, got)
		}
	}
	for what, got := range map[string]string{
		"a script": b.do("cat", "/var/tmp/score"), "a terminal": b.do("sh", "-c", "cat /proc/$(pgrep -xo counter)/oom_score_adj"),
		"a command": strings.TrimSpace(r.berth("ssh", "box", "cat /proc/self/oom_score_adj")),
	} {
		if got != "300" {
			t.Errorf("%s is as likely to be killed as %s says, want the unit's 300", what, got)
		}
	}

	restarts := func() string { return b.property("NRestarts") }
	for step, harm := range []struct {
		name string
		do   func(main string)
	}{
		{"kill -9", func(main string) { b.do("kill", "-KILL", main) }},
		{"frozen, until the watchdog ends it", func(main string) { b.do("kill", "-STOP", main) }},
		{"systemctl restart", func(string) { b.do("systemctl", "restart", "berthd") }},
	} {
		t.Log(harm.name)
		main, before := b.property("MainPID"), restarts()
		harm.do(main)
		eventually(t, 30*time.Second, "berthd was started again after "+harm.name, func() bool {
			now := b.property("MainPID")
			return now != main && now != "0"
		})
		b.wait(20*time.Second, "StatusText", "serving as box (direct)")
		t.Logf("restarts: %s, then %s", before, restarts())
		all(step + 2)
	}

	// An upgrade waits for the copy that is under way, and is no restart to systemd; so is the way back.
	_, archive, sum := r.pack("v9.9.1", r.release("v9.9.1"))
	r.must("cp", archive, filepath.Join(b.root, "var/tmp/next.tar.gz"))
	main, before := b.property("MainPID"), restarts()
	runs := func(version string) {
		t.Helper()
		if got := b.do("/proc/"+main+"/exe", "version"); !strings.HasPrefix(got, "berthd "+version) {
			t.Errorf("%s runs, want %s", got, version)
		}
		if pid, now := b.property("MainPID"), restarts(); pid != main || now != before {
			t.Errorf("process %s of systemd's %s, restarts %s after %s", pid, main, now, before)
		}
		b.wait(20*time.Second, "StatusText", "serving as box (direct)")
	}
	if out, err := b.inside("berthd", "upgrade", "--file", "/var/tmp/next.tar.gz", "--sha256", strings.Repeat("0", 64)).CombinedOutput(); err == nil || !strings.Contains(string(out), "it is damaged, or not what it should be, and nothing was changed") {
		t.Errorf("a corrupt archive: %v: %s", err, out)
	}
	copying := r.pipe("ssh", "box", "tee /var/tmp/copy")
	copying.ask("the first half", "the first half")
	forth := r.startCommand(b.inside("berthd", "upgrade", "--file", "/var/tmp/next.tar.gz", "--sha256", sum), "upgrade")
	forth.wait("to end (1 now)", 20*time.Second)
	copying.ask("the second half", "the second half")
	copying.in.Close()
	forth.wait("v9.9.1 serves", 20*time.Second)
	if got := b.do("cat", "/var/tmp/copy"); got != "the first half\nthe second half" {
		t.Errorf("copied %q", got)
	}
	runs("v9.9.1")
	all(5)
	b.do("berthd", "upgrade", "--previous")
	runs("v0.1.0")
	all(6)

	if got := b.do("cat", "/var/tmp/scripts"); got != "begun" {
		t.Errorf("scripts have run: %q, want one start and no stop", got)
	}
	if journal := b.do("journalctl", "--no-pager", "--unit=berthd"); !strings.Contains(journal, "Watchdog timeout") || strings.Contains(journal, r.token) {
		t.Errorf("the journal has no watchdog timeout, or it has the token:\n%s", journal)
	}

	b.do("systemctl", "stop", "berthd")
	if got := b.do("cat", "/var/tmp/scripts"); got != "begun\nended" {
		t.Errorf("scripts have run: %q, want the stop script too", got)
	}
	if got := b.property("Result"); got != "success" {
		t.Errorf("the result of a stop is %q", got)
	}
	eventually(t, 10*time.Second, "nothing of berthd is left", func() bool {
		out, _ := b.inside("pgrep", "--list-full", "berthd").Output()
		return len(out) == 0
	})

	// Stop scripts run when the server is gone, too.
	b.do("systemctl", "start", "berthd")
	b.wait(20*time.Second, "StatusText", "serving as box (direct)")
	r.server.kill()
	b.do("systemctl", "stop", "berthd")
	if got := b.do("cat", "/var/tmp/scripts"); got != "begun\nended\nbegun\nended" {
		t.Errorf("scripts have run: %q, want a start and a stop more", got)
	}

	// A server that is away keeps nobody waiting, and is told; nor is a credential needed.
	b.do("rm", "/etc/credstore/agent-token")
	b.do("sh", "-c", "echo BERTH_TOKEN_FILE=/etc/berthd/token >>/etc/berthd/berthd.env; echo "+r.token+" >/etc/berthd/token")
	b.do("systemctl", "start", "berthd")
	b.wait(20*time.Second, "StatusText", "nothing listens at")
	b.do("systemctl", "stop", "berthd")
}
