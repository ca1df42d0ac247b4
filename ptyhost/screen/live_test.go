package screen

import (
	"compress/gzip"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/creack/pty"
)

var record = flag.Bool("record", false, "replace the recorded streams in testdata/streams by what the programs print now")

// scenario is a program and what a person types into it, a line of keys at a time, each when the program has nothing more to show.
type scenario struct {
	name string
	argv []string
	keys []string
}

func scenarios() []scenario {
	shell := []string{"bash", "--norc", "--noprofile"}
	return []scenario{
		{"vim", []string{"vim", "-u", "NONE", "-i", "NONE", "-N", "+set termguicolors number mouse=a title list | set ft=go | syntax on | colorscheme desert", "code.go.txt"}, []string{
			"\x06", "\x06", "/func\r", "n", "cwfunktion\x1b", "o// größer 漢字 🙂\x1b", ":split wide.txt\r", "\x06", "V5jd", "u", ":set wrap!\r", "G", ":vsplit\r",
			"ggO" + strings.Repeat("long ", 40) + "\x1b", ":set hlsearch\r", "/e\r", "\x17w", "\x02", ":!echo outside; echo of vim\r", "\r", ":qa!\r"}},
		// In a namespace of its own it shows its own processes and nobody else's.
		{"htop", []string{"unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do (sleep 9$i; :) & done; htop -d 3"}, []string{"t", "H", "M", "P", "\x1bOB", "\x1bOB", "u", "\x1b", "/ht\r", "\x1b", "S", "\x1b", "I", "q"}},
		{"less", []string{"less", "-R", "wide.txt"}, []string{" ", "/漢\r", "n", "G", "b", "-S\r", "\x1b[C", "\x1b[C", "g", "jjjkk", "q"}},
		{"man", []string{"man", "-l", "page.1"}, []string{" ", " ", "/option\r", "n", "N", "G", "b", "q"}},
		{"tmux", []string{"tmux", "-S", "socket", "-f", "tmux.conf", "new-session"}, []string{
			"", "", "seq 100; cat wide.txt\r", "\x02%", "ls --color=always; tput setaf 3; echo 漢字 🙂\r", "\x02\"", "seq 1 3000\r", "\x02o", "\x02z", "cat -v code.go.txt\r", "\x02z", "\x02[", "\x1b[5~\x1b[5~", "q",
			"\x02:", "resize-pane -L 10\r", "\x02c", "echo second\r", "\x02p", "\x02:", "kill-server\r"}},
		{"truecolor", []string{"bash", "truecolor.sh"}, []string{"", "x"}},
		{"emoji", []string{"bash", "-c", "cat emoji.txt; cat -A emoji.txt; cat emoji.txt emoji.txt"}, nil},
		{"graphemes", []string{"bash", "-c", `printf '\033[?2027h'; cat emoji.txt emoji.txt`}, nil},
		{"cjk", []string{"bash", "-c", "cat cjk.txt cjk.txt"}, nil},
		{"bash", shell, []string{"PS1='$ '; clear\r", "echo one two\r", "seq 30\r", "echo a long line that is wrapped by the terminal at eighty columns because it is longer than that\x01\x05\x1bb\x1bb\x15",
			"printf '\\e[1;31mred\\e[m'; echo; ls --color\r", "\x12ec\x07", "echo 漢字かな 🙂 é é\x02\x02\x02\x7f\r", "cat wide.txt\r", "printf '\\e[?2004l\\e[5;10r'; seq 20; printf '\\e[r'\r", "exit\r"}},
		{"build", []string{"bash", "build.sh"}, nil},
	}
}

// run plays a scenario on a PTY in a directory of its own and returns all that the program printed. It may be called from any goroutine.
func (s scenario) run(t *testing.T) []byte {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS("testdata/programs")); err != nil {
		t.Error(err)
	}
	cmd := exec.Command(s.argv[0], s.argv[1:]...)
	cmd.Dir = dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "TERM=xterm-256color", "COLORTERM=truecolor", "LC_ALL=C.UTF-8", "SHELL=/bin/bash", "HISTFILE=", "MANPAGER=less -R", "LESS="}
	master, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 24, Cols: 80})
	if err != nil {
		t.Errorf("%v: %v; ./test.sh installs what is missing", s.argv, err)
		return nil
	}
	defer master.Close()
	var mu sync.Mutex
	var out []byte
	last := time.Now()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buf := make([]byte, 64<<10)
		for {
			n, err := master.Read(buf)
			mu.Lock()
			out, last = append(out, buf[:n]...), time.Now()
			mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	// A program is waited for while it prints, but not for ever: htop prints always.
	const quiet, patience = 100 * time.Millisecond, 700 * time.Millisecond
	seen := 0 // bytes printed before the last keys
	for _, keys := range s.keys {
		for began := time.Now(); ; time.Sleep(quiet / 10) {
			mu.Lock()
			settled := len(out) > seen && time.Since(last) > quiet
			mu.Unlock()
			if settled && keys != "" || time.Since(began) > patience {
				break
			}
		}
		if keys == "" { // a pause; writing nothing would look like the end of input
			continue
		}
		mu.Lock()
		seen = len(out)
		mu.Unlock()
		if _, err := io.WriteString(master, keys); err != nil {
			break
		}
	}
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		cmd.Process.Kill()
		<-ended
		t.Errorf("%s did not end when told to", s.name)
	}
	if s.name == "tmux" { // its server is no child of ours
		kill := exec.Command("tmux", "-S", "socket", "kill-server")
		kill.Dir = dir
		kill.Run()
	}
	if err := cmd.Wait(); err != nil && s.name != "tmux" && s.name != "bash" {
		t.Errorf("%s: %v\n%s", s.name, err, out[max(0, len(out)-500):])
	}
	return out
}

// TestRecord replaces the recorded streams, when asked to.
func TestRecord(t *testing.T) {
	if !*record {
		t.Skip("records only with -record")
	}
	for _, s := range scenarios() {
		out := s.run(t)
		f, err := os.Create(filepath.Join("testdata/streams", s.name+".gz"))
		if err != nil {
			t.Fatal(err)
		}
		z, err := gzip.NewWriterLevel(f, gzip.BestCompression)
		if err != nil {
			t.Fatal(err)
		}
		z.Write(out)
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d bytes", s.name, len(out))
	}
}

// recorded returns the streams in testdata.
func recorded(tb testing.TB) map[string]string {
	tb.Helper()
	files, err := filepath.Glob("testdata/streams/*.gz")
	if err != nil {
		tb.Fatal(err)
	}
	all := map[string]string{}
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			tb.Fatal(err)
		}
		z, err := gzip.NewReader(f)
		if err != nil {
			tb.Fatal(err)
		}
		data, err := io.ReadAll(z)
		if err != nil {
			tb.Fatal(err)
		}
		f.Close()
		all[strings.TrimSuffix(filepath.Base(name), ".gz")] = string(data)
	}
	if len(all) < len(scenarios()) {
		tb.Fatalf("only %d recorded streams", len(all))
	}
	return all
}

// sequence is what `seq 1 n` prints on a terminal.
func sequence(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "%d\r\n", i+1)
	}
	return b.String()
}
