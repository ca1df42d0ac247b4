package e2e

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// up starts berth up with flags and waits until it is ready.
func (m *machine) up(flags ...string) *daemon {
	m.t.Helper()
	d := m.start("berth", nil, append([]string{"up"}, flags...)...)
	d.wait("berth ssh demo", 30*time.Second)
	return d
}

var checkLine = regexp.MustCompile(`(?m)^ok\s+(\S+).*\d+ ms`)

// The main job in one command, which leaves nothing behind.
func TestUpCheck(t *testing.T) {
	for _, cloud := range []string{"aws", "azure", "google"} {
		t.Run(cloud, func(t *testing.T) {
			m := newMachine(t)
			wantAllStages(t, m.must("berth", "up", "--check", "--cloud", cloud))
			m.nothingLeft()
		})
	}
}

func TestUpInNoCloud(t *testing.T) {
	out, errOut, code := newMachine(t).run(nil, "berth", "up", "--check", "--cloud", "heaven")
	if code != 2 || !strings.Contains(errOut, "aws, azure, google") {
		t.Errorf("exit code %d: %s%s", code, out, errOut)
	}
}

// The same with the metadata service where it really is. The agent is told nothing of it.
func TestUpCheckAtTheRealAddress(t *testing.T) {
	for _, cloud := range []string{"aws", "azure", "google"} {
		t.Run(cloud, func(t *testing.T) {
			m := newMachine(t)
			const address = "169.254.169.254"
			space := fmt.Sprintf("be%d%s", os.Getpid(), cloud)
			m.must("ip", "netns", "add", space)
			t.Cleanup(func() {
				if out, err := exec.Command("ip", "netns", "delete", space).CombinedOutput(); err != nil {
					t.Errorf("cannot delete the namespace: %v: %s", err, out)
				}
			})
			m.must("ip", "netns", "exec", space, "ip", "link", "set", "lo", "up")
			m.must("ip", "netns", "exec", space, "ip", "addr", "add", address+"/32", "dev", "lo")
			wantAllStages(t, m.must("ip", "netns", "exec", space, "berth", "up", "--check", "--cloud", cloud, "--metadata", address+":80"))
			m.nothingLeft()
		})
	}
}

func wantAllStages(t *testing.T, out string) {
	t.Helper()
	var stages []string
	for _, match := range checkLine.FindAllStringSubmatch(out, -1) {
		stages = append(stages, match[1])
	}
	want := "identity exchange tailnet pty ssh ports containers logs app-status"
	if got := strings.Join(stages, " "); got != want {
		t.Errorf("stages ok: %q, want %q:\n%s", got, want, out)
	}
}

func (m *machine) nothingLeft() {
	m.t.Helper()
	eventually(m.t, 5*time.Second, "every process gone", func() bool { return len(m.processes()) == 0 })
	for _, dir := range []string{m.tmp, m.home} {
		for _, f := range files(m.t, dir) {
			if info, err := os.Stat(filepath.Join(dir, f)); err == nil && !info.IsDir() {
				m.t.Errorf("left behind: %s", filepath.Join(dir, f))
			}
		}
	}
	if left := files(m.t, m.tmp); len(left) > 0 {
		m.t.Errorf("left in the temporary folder: %v", left)
	}
}

func TestUpAndInterrupt(t *testing.T) {
	m := newMachine(t)
	d := m.up()
	for _, stage := range []string{"identity fetched", "token exchanged", "tailnet joined", "ready"} {
		if !strings.Contains(d.output(), stage) {
			t.Errorf("up does not say %q:\n%s", stage, d.output())
		}
	}

	t.Run("exit code", func(t *testing.T) {
		if _, errOut, code := m.run(nil, "berth", "ssh", "demo", "--", "sh", "-c", "exit 7"); code != 7 {
			t.Errorf("exit code %d, want 7: %s", code, errOut)
		}
		if _, _, code := m.run(nil, "berth", "ssh", "demo", "--", "no-such-command"); code != 127 {
			t.Errorf("exit code %d, want 127", code)
		}
	})
	t.Run("50 MB keep their sum", func(t *testing.T) {
		data := make([]byte, 50<<20)
		rand.Read(data)
		sum := sha256.Sum256(data)
		out, errOut, code := m.run(bytes.NewReader(data), "berth", "ssh", "demo", "--", "sha256sum")
		if want := hex.EncodeToString(sum[:]); code != 0 || !strings.HasPrefix(out, want) {
			t.Errorf("exit %d, sum %q, want %s: %s", code, out, want, errOut)
		}
		out, errOut, code = m.run(bytes.NewReader(data), "berth", "ssh", "demo", "--", "cat")
		if code != 0 || sha256.Sum256([]byte(out)) != sum {
			t.Errorf("echoed back: exit %d, %d bytes: %s", code, len(out), errOut)
		}
	})
	t.Run("OpenSSH", m.openssh)
	t.Run("shell comes back", m.shellComesBack)
	t.Run("lists", func(t *testing.T) {
		if out := m.must("berth", "status", "demo"); !strings.Contains(out, "connected") || !strings.Contains(out, "ready") {
			t.Errorf("status:\n%s", out)
		}
		if out := m.must("berth", "agent", "list", "--output", "json"); !strings.Contains(out, `"demo"`) {
			t.Errorf("agent list:\n%s", out)
		}
		m.must("berth", "ports", "demo")
		m.must("berth", "containers", "demo")
		m.must("berth", "logs", "demo")
		m.must("berth", "ping", "demo")
		if _, errOut, code := m.run(nil, "berth", "ssh", "nobody", "--", "true"); code == 0 || !strings.Contains(errOut, "demo") {
			t.Errorf("an unknown name exits %d and says %q, which does not name what there is", code, errOut)
		}
	})

	if code := d.stop(os.Interrupt, 15*time.Second); code != 0 && code != 130 {
		t.Errorf("Ctrl-C: exit code %d", code)
	}
	// What config-ssh wrote is the user's own; it goes with the user's word.
	m.must("berth", "config-ssh", "--remove")
	os.RemoveAll(filepath.Join(m.home, ".ssh"))
	os.Remove(filepath.Join(m.home, ".viminfo"))
	os.Remove(filepath.Join(m.home, ".bash_history"))
	m.nothingLeft()
}

func (m *machine) openssh(t *testing.T) {
	m.must("berth", "config-ssh", "--yes")
	config := filepath.Join(m.home, ".ssh", "config")
	ssh := []string{"-F", config, "-o", "BatchMode=yes"}
	out, errOut, code := m.run(strings.NewReader("through\n"), "ssh", append(ssh, "demo.berth", "cat; exit 3")...)
	if code != 3 || out != "through\n" {
		t.Errorf("ssh: exit %d, %q: %s", code, out, errOut)
	}
	data := make([]byte, 5<<20)
	rand.Read(data)
	from, to, back := filepath.Join(m.home, "from"), filepath.Join(m.home, "to"), filepath.Join(m.home, "back")
	defer func() {
		for _, f := range []string{from, to, back} {
			os.Remove(f)
		}
	}()
	if err := os.WriteFile(from, data, 0o600); err != nil {
		t.Fatal(err)
	}
	m.must("scp", append(ssh, from, "demo.berth:"+to)...)
	m.must("scp", append(ssh, "-O", "demo.berth:"+to, back)...)
	if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, data) {
		t.Errorf("scp both ways: %d bytes, %v", len(got), err)
	}
}

// shellComesBack opens vim in a terminal, leaves by ~. and by a closed window, and finds the same
// screen each time. tmux plays the person's terminal.
func (m *machine) shellComesBack(t *testing.T) {
	socket := filepath.Join(m.tmp, "tmux")
	tmux := func(args ...string) string {
		t.Helper()
		return m.must("tmux", append([]string{"-S", socket, "-f", "/dev/null"}, args...)...)
	}
	defer func() {
		m.run(nil, "tmux", "-S", socket, "kill-server")
		os.Remove(socket)
	}()
	screen := func() string { return tmux("capture-pane", "-p", "-t", "w") }
	shows := func(what string) {
		t.Helper()
		var last string
		eventually(t, 15*time.Second, "the screen shows "+what, func() bool {
			last = screen()
			return strings.Contains(last, what)
		})
	}
	berth := filepath.Join(bin, "berth")
	tmux("new-session", "-d", "-s", "w", "-x", "100", "-y", "30", "env", "PS1=$ ", berth, "shell", "demo", "work")
	tmux("set-option", "-s", "exit-empty", "off") // else the next session may meet a server that is about to end
	eventually(t, 15*time.Second, "a prompt", func() bool { return strings.TrimSpace(screen()) != "" })
	tmux("send-keys", "-t", "w", "vim -u NONE -i NONE -n", "Enter")
	shows("VIM - Vi IMproved")
	tmux("send-keys", "-t", "w", "i", "precious words", "Escape")
	shows("precious words")
	before := screen()

	tmux("kill-session", "-t", "w") // the window is closed
	tmux("new-session", "-d", "-s", "w", "-x", "100", "-y", "30", berth, "shell", "demo", "work")
	shows("precious words")
	eventually(t, 5*time.Second, "the screen as it was", func() bool { return screen() == before })

	// Leaving by hand: the escape is known only after a newline.
	tmux("set-option", "-t", "w", "remain-on-exit", "on")
	tmux("send-keys", "-t", "w", "Enter", "~.")
	eventually(t, 10*time.Second, "berth shell ended", func() bool {
		return strings.TrimSpace(tmux("display-message", "-p", "-t", "w", "#{pane_dead}")) == "1"
	})
	tmux("kill-session", "-t", "w")
	tmux("new-session", "-d", "-s", "w", "-x", "100", "-y", "30", berth, "shell", "demo", "work")
	shows("precious words")
	tmux("send-keys", "-t", "w", "Escape", ":q!", "Enter")
	tmux("send-keys", "-t", "w", "exit", "Enter")
}

// A second interrupt, or one while starting, must not leave anything either.
func TestUpInterruptedEarly(t *testing.T) {
	m := newMachine(t)
	d := m.start("berth", nil, "up")
	d.wait("control server", 10*time.Second)
	d.stop(syscall.SIGTERM, 15*time.Second)
	m.nothingLeft()
}
