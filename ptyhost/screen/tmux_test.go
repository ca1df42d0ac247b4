package screen

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// pane is a terminal that others wrote, of tmux, fed through a fifo.
type pane struct {
	t      *testing.T
	socket string
	feed   *os.File
	fed    int
}

func newPane(t *testing.T) *pane {
	t.Helper()
	dir, err := os.MkdirTemp("", "judge")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	j := &pane{t: t, socket: filepath.Join(dir, "tmux")}
	j.tmux("-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", "stty raw -echo -opost; exec cat "+fifo)
	// Told to end, the server may be gone before its client has heard so.
	t.Cleanup(func() { exec.Command("tmux", "-S", j.socket, "kill-server").Run() })
	j.tmux("set", "status", "off", ";", "set", "-g", "allow-passthrough", "off", ";", "resize-window", "-x", "80", "-y", "24")
	if j.feed, err = os.OpenFile(fifo, os.O_RDWR, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.feed.Close() })
	return j
}

func (p *pane) tmux(args ...string) string {
	p.t.Helper()
	cmd := exec.Command("tmux", append([]string{"-u", "-S", p.socket}, args...)...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C.UTF-8", "TERM=xterm-256color", "SHELL=/bin/sh", "HOME=/"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		p.t.Fatalf("tmux %s: %v\n%s", args, err, out)
	}
	return string(out)
}

// shows feeds a fresh terminal and returns what it shows: text with colours and attributes, and the state tmux tells.
func (p *pane) shows(data string) (screen, state string) {
	p.t.Helper()
	p.fed++
	mark := fmt.Sprintf("fed %d", p.fed)
	if _, err := fmt.Fprintf(p.feed, "\x18\x1b\\\x1b[?1049l\x1bc\x1b[?1000;1002;1003;1004;1005;1006;2004l%s\x18\x1b]2;%s\x07", data, mark); err != nil {
		p.t.Fatal(err)
	}
	const query = "#{pane_title}|#{cursor_x},#{cursor_y} alt=#{alternate_on} region=#{scroll_region_upper},#{scroll_region_lower} wrap=#{wrap_flag} " +
		"insert=#{insert_flag} cursor=#{cursor_flag} keys=#{keypad_cursor_flag}#{keypad_flag} mouse=#{mouse_any_flag}#{mouse_button_flag}" +
		"#{mouse_standard_flag}#{mouse_all_flag}#{mouse_sgr_flag} origin=#{origin_flag}"
	deadline := time.Now().Add(20 * time.Second)
	for {
		out := p.tmux("display-message", "-p", query, ";", "capture-pane", "-p", "-e")
		title, rest, _ := strings.Cut(out, "|")
		if title == mark {
			state, screen, _ := strings.Cut(rest, "\n")
			return visible(screen), state
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("tmux did not take in %q", mark)
		}
	}
}

// visible brings tmux's rendering of its cells into a form in which only what can be seen differs: tmux also tells blanks that were written at the
// end of a line from those that never were.
func visible(capture string) string {
	return dump(fed(Config{}, strings.ReplaceAll(strings.TrimSuffix(capture, "\n"), "\n", "\r\n")))
}

// judged lists the streams that tmux can judge: what it has no notion of, or a notion of its own, is left to the tests beside this one.
func judged(t *testing.T) []string {
	var names []string
	for name := range streams(t) {
		switch name {
		case "invalid", "strings": // tmux drops or shows broken bytes as it likes
		case "tabs", "edit", "rep": // its own rules for tab cells, halves of wide characters and REP at the edge
		case "cjk": // keeps wide characters half of which was overwritten
		case "emoji", "graphemes": // takes some joined emoji for one, by rules of its own
		case "charset": // keeps line drawing as letters with an attribute, where a snapshot has the lines
		case "keyboard": // other protocols' keys
		default:
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// TestJudge lets tmux compare a terminal that attached late, at random points, with one that saw everything; and the model with itself.
func TestJudge(t *testing.T) {
	if _, err := exec.LookPath("tmux"); err != nil {
		t.Fatal("tmux, the judge, is not installed; ./test.sh installs it")
	}
	j := newPane(t)
	all := streams(t)
	rng := rand.New(rand.NewPCG(3, 4))
	for _, name := range judged(t) {
		t.Run(name, func(t *testing.T) {
			j.t = t
			s := all[name]
			screen, state := j.shows(s)
			for range 4 {
				cut := rng.IntN(len(s) + 1)
				late, lateState := j.shows(string(fed(Config{}, s[:cut]).Snapshot(View{})) + s[cut:])
				if diff := cmp.Diff(screen, late); diff != "" {
					t.Errorf("cut at %d after %q, tmux sees (-stayed +late):\n%s", cut, s[max(0, cut-20):cut], diff)
				}
				if diff := cmp.Diff(state, lateState); diff != "" {
					t.Errorf("cut at %d, state (-stayed +late):\n%s", cut, diff)
				}
			}
			own := fed(Config{}, s)
			var text strings.Builder
			for y := range own.rows {
				text.WriteString(rowText(own, y) + "\n")
			}
			plain := j.tmux("capture-pane", "-p")
			var lines []string
			for _, line := range strings.SplitAfter(plain, "\n") {
				lines = append(lines, strings.TrimRight(line, " \n"))
			}
			want := strings.TrimRight(strings.Join(lines, "\n"), "\n")
			if diff := cmp.Diff(want, strings.TrimRight(text.String(), "\n")); diff != "" {
				t.Errorf("the screen (-tmux +model):\n%s", diff)
			}
		})
	}
}
