package e2e

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestSSHCutOff: an OpenSSH session whose way to the agent vanished, without a word on the mesh, is told of at the next login and taken up by
// berth shell, also when berthd was killed in between.
func TestSSHCutOff(t *testing.T) {
	s := newOpenSSH(t)
	cmd := s.program(t, "ssh", "-tt", "box.berth", "stty -echo; echo ready; read x; echo got-$x; exec sleep 1000")
	begin(t, cmd)
	if out := s.berth("shell", "box", "--list"); strings.Contains(out, "ssh-") {
		t.Errorf("listed while it is in use:\n%s", out)
	}

	// The mesh is in the ProxyCommand: when that is killed, nobody is left to end the stream.
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	proxy, err := strconv.Atoi(strings.TrimSpace(string(children)))
	if err != nil {
		t.Fatalf("ssh has the children %q", children)
	}
	if err := syscall.Kill(proxy, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()

	row := regexp.MustCompile(`(?m)^(ssh-[a-z2-7]{6}) .*ssh, cut off `)
	var name string
	listed := func() bool {
		found := row.FindStringSubmatch(s.berth("shell", "box", "--list"))
		if found != nil {
			name = found[1]
		}
		return found != nil
	}
	eventually(t, 20*time.Second, "it is listed", listed)
	told := s.ssh(t, "exit\n", "-tt", "box.berth")
	if want := "is still running; take it up again with: berth shell box " + name + "\r\n"; !strings.Contains(told.Out, want) {
		t.Errorf("the next login was told %q, want %q", told.Out, want)
	}

	s.agent.cmd.Process.Kill()
	<-s.agent.done
	s.run()
	s.agent.wait("ready", 20*time.Second)
	eventually(t, 20*time.Second, "it is listed by the next berthd", listed)
	shell := s.terminal("shell", "box", name)
	fmt.Fprintln(shell.in, "words")
	waitFor(t, shell, "got-words")
}
