package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// person sits at windows of a terminal, which tmux plays, each with a shell whose prompt is "$ ".
type person struct {
	*road
	t      *testing.T
	socket string
}

func (r *road) person(t *testing.T) *person {
	dir, err := os.MkdirTemp(r.tmp, "tmux")
	if err != nil {
		t.Fatal(err)
	}
	p := &person{road: r, t: t, socket: filepath.Join(dir, "s")}
	t.Cleanup(func() {
		r.machine.run(nil, "tmux", "-S", p.socket, "kill-server")
		os.RemoveAll(dir)
	})
	return p
}

func (p *person) tmux(args ...string) string {
	p.t.Helper()
	cmd := p.client()
	tmux := p.command("tmux", append([]string{"-S", p.socket, "-f", "/dev/null"}, args...)...)
	tmux.Env = append(cmd.Env, "PS1=$ ")
	out, err := tmux.CombinedOutput()
	if err != nil {
		p.t.Fatalf("tmux %q: %v\n%s", args, err, out)
	}
	return string(out)
}

func (p *person) open(window string, cols, rows int) {
	p.t.Helper()
	p.tmux("new-session", "-d", "-s", window, "-x", strconv.Itoa(cols), "-y", strconv.Itoa(rows), "bash", "--norc", "-i")
	p.tmux("set-option", "-s", "exit-empty", "off")
}

func (p *person) enter(window, line string) {
	p.t.Helper()
	p.tmux("send-keys", "-t", window, "-l", line)
	p.tmux("send-keys", "-t", window, "Enter")
}

func (p *person) screen(window string) string {
	p.t.Helper()
	return p.tmux("capture-pane", "-p", "-t", window)
}

func (p *person) shows(window, what string) {
	p.t.Helper()
	var last string
	defer func() {
		if p.t.Failed() {
			p.t.Logf("%s shows:\n%s", window, last)
		}
	}()
	eventually(p.t, 25*time.Second, fmt.Sprintf("%s shows %q", window, what), func() bool {
		last = p.screen(window)
		return strings.Contains(last, what)
	})
}

// flags are the states of a window that a program may leave behind.
func (p *person) flags(window string) string {
	p.t.Helper()
	return strings.TrimSpace(p.tmux("display-message", "-p", "-t", window,
		"alt=#{alternate_on} cursor=#{cursor_flag} mouse=#{mouse_any_flag} sgr=#{mouse_sgr_flag} keys=#{keypad_cursor_flag} pad=#{keypad_flag} insert=#{insert_flag} origin=#{origin_flag} wrap=#{wrap_flag} top=#{scroll_region_upper}"))
}

func (p *person) close(window string) {
	p.t.Helper()
	p.tmux("kill-session", "-t", window)
}

// viewerOf finds the process of `berth shell box SESSION`.
func (p *person) viewerOf(session string) int {
	p.t.Helper()
	for _, line := range p.processes() {
		if pid, command, _ := strings.Cut(line, " "); strings.HasSuffix(strings.TrimSpace(command), "shell box "+session) && !strings.Contains(command, "bash") {
			n, err := strconv.Atoi(pid)
			if err != nil {
				p.t.Fatal(err)
			}
			return n
		}
	}
	p.t.Fatalf("nobody watches %s:\n%s", session, strings.Join(p.processes(), "\n"))
	return 0
}

type listedTerminal struct {
	ID, Name, Title, Running string
	Viewers, Rows, Cols      int
}

func (p *person) sessions() map[string]listedTerminal {
	p.t.Helper()
	var all []listedTerminal
	if err := json.Unmarshal([]byte(p.berth("shell", "box", "--list", "--output", "json")), &all); err != nil {
		p.t.Fatal(err)
	}
	byName := map[string]listedTerminal{}
	for _, s := range all {
		byName[s.Name] = s
	}
	return byName
}

// prompt is that of shells on the agent.
const prompt = "box>"

// TestShell is a day of a person with berth shell on a real terminal.
func TestShell(t *testing.T) {
	r := newRoad(t, "agents:\n  - name: box\n")
	if err := os.WriteFile(filepath.Join(r.home, ".bash_profile"), []byte("PS1='"+prompt+" '\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.run()
	r.waitConnected(20 * time.Second)
	t.Run("sessions", func(t *testing.T) {
		for name, f := range map[string]func(*testing.T, *person){
			"exit code": shellExitCode, "another size": shellAnotherSize, "restored": shellRestored, "two viewers": shellTwoViewers, "names": shellNames,
			"blocked": shellBlocked,
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				f(t, r.person(t))
			})
		}
	})
	// The first takes time, the others disturb the agent.
	t.Run("ctrl-c", func(t *testing.T) { shellCtrlC(t, r.person(t)) })
	t.Run("network", func(t *testing.T) { shellNetwork(t, r.person(t)) })
	t.Run("host killed", func(t *testing.T) { shellHostKilled(t, r.person(t)) })
}

func shellExitCode(t *testing.T, p *person) {
	p.open("w", 100, 30)
	p.enter("w", `stty -a | cksum >c; berth shell box code; echo "code $?"; stty -a | cksum >d; cmp c d && echo same`)
	p.shows("w", prompt)
	p.enter("w", "exec sh -c 'echo gone; exit 7'")
	p.shows("w", "code 7\n")
	p.shows("w", "same\n")
	if screen := p.screen("w"); strings.Contains(screen, "berth:") || !strings.Contains(screen, "gone\ncode 7\n") {
		t.Errorf("the end is not plain:\n%s", screen)
	}
	p.enter("w", `clear; berth shell box code --read-only; echo "code $?"`)
	p.shows("w", "code 255\n")
	if screen := p.screen("w"); strings.Count(screen, "there is no terminal code") != 1 {
		t.Errorf("a session that ended:\n%s", screen)
	}
}

func shellAnotherSize(t *testing.T, p *person) {
	p.open("w", 100, 30)
	p.enter("w", "berth shell box size")
	p.shows("w", prompt)
	p.enter("w", "clear; seq 1 60; printf '%095d\\n' 7")
	p.shows("w", strings.Repeat("0", 94)+"7")
	p.tmux("send-keys", "-t", "w", "Enter", "~.")
	p.shows("w", "left it running; take it up again with: berth shell box size")
	p.close("w")
	p.open("w", 60, 20)
	p.enter("w", "clear; berth shell box size")
	p.shows("w", strings.Repeat("0", 60)+"\n"+strings.Repeat("0", 34)+"7\n")
	p.shows("w", "60\n")
	p.enter("w", "stty size")
	p.shows("w", "20 60\n")
	if history := p.tmux("capture-pane", "-p", "-S", "-", "-t", "w"); !strings.Contains(history, "\n9\n10\n11\n") {
		t.Errorf("the scrollback did not come along:\n%s", history)
	}
	p.tmux("resize-window", "-t", "w", "-x", "90", "-y", "25")
	p.enter("w", "clear; stty size")
	p.shows("w", "25 90\n")
	p.enter("w", "exit")
}

func shellRestored(t *testing.T, p *person) {
	p.open("w", 100, 30)
	p.shows("w", "$")
	p.enter("w", "stty -a | cksum >a")
	before := p.flags("w")
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT, syscall.SIGKILL} {
		session := fmt.Sprintf("kill%d", sig)
		p.enter("w", fmt.Sprintf(`clear; berth shell box %s; echo "code $?"`, session))
		p.shows("w", prompt)
		p.enter("w", "vim -u NONE -i NONE -n -c 'set mouse=a nocompatible'")
		p.shows("w", "VIM - Vi IMproved")
		eventually(t, 10*time.Second, "vim changed the window", func() bool {
			return strings.Contains(p.flags("w"), "alt=1") && strings.Contains(p.flags("w"), "mouse=1")
		})
		if err := syscall.Kill(p.viewerOf(session), sig); err != nil {
			t.Fatal(err)
		}
		if sig != syscall.SIGKILL { // then the shell beneath may say so before the guard is done, on the screen that is left
			p.shows("w", fmt.Sprintf("code %d\n", 128+int(sig)))
		}
		eventually(t, 5*time.Second, fmt.Sprintf("the window is as before %v: %s", sig, before), func() bool { return p.flags("w") == before })
		p.enter("w", `clear; stty -a | cksum >b; cmp a b && echo "same"`)
		p.shows("w", "same\n")
		if running := p.sessions()[session].Running; !strings.HasPrefix(running, "vim") {
			t.Errorf("after %v the session runs %q", sig, running)
		}
		p.berth("shell", "box", session, "--close")
	}
}

func shellTwoViewers(t *testing.T, p *person) {
	p.open("w", 100, 30)
	p.open("small", 60, 20)
	p.open("watcher", 80, 24)
	p.enter("w", "berth shell box two")
	p.shows("w", prompt)
	p.enter("small", "berth shell box two")
	p.enter("watcher", "clear; berth shell box two --read-only")
	eventually(t, 20*time.Second, "three watch", func() bool { return p.sessions()["two"].Viewers == 3 })
	p.enter("w", "clear; stty size")
	p.shows("w", "30 100\n")
	p.shows("small", "30 100\n")
	p.enter("small", "clear; stty size")
	p.shows("small", "20 60\n")
	p.shows("w", "20 60\n")
	p.shows("watcher", "20 60\n")
	p.enter("watcher", "echo not mine")
	p.enter("small", "echo done-$((40+2))")
	p.shows("watcher", "done-42\n")
	if screen := p.screen("watcher"); strings.Contains(screen, "not mine") {
		t.Errorf("a watcher typed:\n%s", screen)
	}
	p.tmux("send-keys", "-t", "watcher", "C-c")
	p.shows("watcher", "left it running")
	p.close("small") // the window is closed
	// On a busy machine the goodbye may come too late; then the agent finds out by itself, after 45 s.
	eventually(t, time.Minute, "one watches, at its size", func() bool {
		s := p.sessions()["two"]
		return s.Viewers == 1 && s.Rows == 30 && s.Cols == 100
	})
	p.enter("w", "exit")
}

func shellNames(t *testing.T, p *person) {
	p.open("w", 100, 30)
	p.enter("w", `berth shell box first; echo "code $?"`)
	p.shows("w", prompt)
	p.enter("w", `printf '\033]2;evil\001\302\233 title\007'; sleep 1000`)
	eventually(t, 10*time.Second, "it is listed", func() bool { return p.sessions()["first"].Running == "sleep 1000" })
	id := p.sessions()["first"].ID
	if list := p.berth("shell", "box", "--list"); strings.ContainsAny(list, "\x1b\x01\u009b") || !strings.Contains(list, "first") || !strings.Contains(list, "100x30") || !strings.Contains(list, "sleep 1000") {
		t.Errorf("the list:\n%q", list)
	}
	p.berth("shell", "box", "first", "--rename", "second one")
	if now := p.sessions(); now["second one"].ID != id || now["first"].ID != "" {
		t.Errorf("after renaming: %+v", now)
	}
	for args, want := range map[string]string{
		"first --close":    "cannot close session first of box: there is no such session; berth shell box --list shows those there are",
		"first --rename x": "there is no such session",
		id + " --rename ":  "",
	} {
		out, err := p.client(append([]string{"shell", "box"}, strings.Split(args, " ")...)...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) || strings.Count(string(out), "\n") != 1 {
			t.Errorf("%s: %v, %s", args, err, out)
		}
	}
	// The name is free; who has it is another.
	p.open("x", 80, 24)
	p.enter("x", "berth shell box first")
	p.shows("x", prompt)
	if now := p.sessions(); now["first"].ID == id || now["second one"].ID != id {
		t.Errorf("the old name leads to %+v", now)
	}
	p.enter("x", "exit")
	p.berth("shell", "box", "second one", "--close")
	p.shows("w", "the session ended: closed on request")
	p.shows("w", "code 129\n")
}

// shellBlocked pastes into a program that does not read: ~. leaves all the same.
func shellBlocked(t *testing.T, p *person) {
	p.open("stuck", 100, 30)
	p.enter("stuck", "berth shell box stuck")
	p.shows("stuck", prompt)
	p.enter("stuck", "clear; stty raw -echo; echo ready-$((40+2)); sleep 1000")
	p.shows("stuck", "ready-42")
	paste := filepath.Join(filepath.Dir(p.socket), "paste")
	if err := os.WriteFile(paste, []byte(strings.Repeat("p", 3<<20)), 0o600); err != nil { // more than the connection holds
		t.Fatal(err)
	}
	p.tmux("load-buffer", paste)
	p.tmux("paste-buffer", "-t", "stuck")
	p.tmux("send-keys", "-t", "stuck", "Enter", "~.")
	p.shows("stuck", "left it running; take it up again with: berth shell box stuck")
	if running := p.sessions()["stuck"].Running; running != "sleep 1000" {
		t.Errorf("the session runs %q", running)
	}
	p.berth("shell", "box", "stuck", "--close")
}

// shellCtrlC interrupts yes over all of it: the prompt is back at once, as the best of some tries shows on a busy machine.
func shellCtrlC(t *testing.T, p *person) {
	p.open("w", 100, 30)
	p.enter("w", "berth shell box flood")
	p.shows("w", prompt)
	best := time.Hour
	for i := range 5 {
		line := fmt.Sprintf("fox %d", i)
		p.enter("w", "clear; yes '"+line+"'")
		p.shows("w", line+"\n"+line+"\n"+line+"\n")
		typed := time.Now()
		p.tmux("send-keys", "-t", "w", "C-c")
		for !strings.HasSuffix(strings.TrimSpace(p.screen("w")), prompt) {
			if time.Since(typed) > 20*time.Second {
				t.Fatalf("no prompt:\n%s", p.screen("w"))
			}
		}
		best = min(best, time.Since(typed))
	}
	t.Logf("yes was interrupted within %v at best", best)
	limit := 2 * time.Second // on a busy machine
	if long {
		limit = 150 * time.Millisecond // 100 ms, and what two commands of tmux take
	}
	if best > limit {
		t.Errorf("Ctrl-C took %v at best, want %v", best, limit)
	}
	p.enter("w", "exit")
}

// shellNetwork stops the agent's process for longer than a connection is waited for, then kills it: each time one line says so,
// and the screen is back without it.
func shellNetwork(t *testing.T, p *person) {
	p.open("w", 100, 30)
	p.enter("w", "berth shell box net")
	p.shows("w", prompt)
	p.enter("w", "clear; vim -u NONE -i NONE -n")
	p.shows("w", "VIM - Vi IMproved")
	p.tmux("send-keys", "-t", "w", "i", "precious words", "Escape")
	p.shows("w", "precious words")
	before := p.screen("w")
	const lost = "berth: the connection to box is lost; trying again (~. leaves)"
	back := func(what string, limit time.Duration) {
		t.Helper()
		begun := time.Now()
		eventually(t, limit, "the screen is as it was after "+what, func() bool { return p.screen("w") == before })
		t.Logf("back %v after %s", time.Since(begun).Round(10*time.Millisecond), what)
	}
	p.agent.cmd.Process.Signal(syscall.SIGSTOP)
	p.shows("w", lost)
	if screen := p.screen("w"); strings.Count(screen, "berth:") != 1 || !strings.Contains(screen, "precious words") || !strings.HasSuffix(strings.TrimRight(screen, "\n "), "leaves)") {
		t.Errorf("the notice disturbs the screen:\n%s", screen)
	}
	p.agent.cmd.Process.Signal(syscall.SIGCONT)
	back("the network came back", 20*time.Second)

	p.agent.cmd.Process.Kill()
	<-p.agent.done
	p.run()
	p.agent.wait("ready", 20*time.Second)
	eventually(t, 30*time.Second, "it is attached again", func() bool { return p.sessions()["net"].Viewers == 1 })
	back("the agent was killed and started again", 30*time.Second)
	p.tmux("send-keys", "-t", "w", "o", "and more", "Escape")
	p.shows("w", "and more")
	p.tmux("send-keys", "-t", "w", ":qa!", "Enter")
	p.enter("w", "exit")
}

func shellHostKilled(t *testing.T, p *person) {
	p.open("w", 100, 30)
	p.enter("w", `clear; berth shell box lost; echo "code $?"`)
	p.shows("w", prompt)
	for _, line := range p.processes() {
		if pid, command, _ := strings.Cut(line, " "); strings.Contains(command, "ptyhost") && strings.Contains(command, p.home) {
			n, err := strconv.Atoi(pid)
			if err != nil {
				t.Fatal(err)
			}
			syscall.Kill(n, syscall.SIGKILL)
		}
	}
	p.shows("w", "berth: the session ended: the process that owns the terminals was killed\ncode 255\n")
}
