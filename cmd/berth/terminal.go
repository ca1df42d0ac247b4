package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/term"
)

// windowSize is a terminal's size in characters.
type windowSize struct{ Rows, Cols uint16 }

// terminal is the person's own terminal in raw mode. Close gives it back as it was.
type terminal struct {
	in, out *os.File
	saved   *term.State
	signals chan os.Signal
	sizes   chan windowSize
	done    chan struct{}
	once    sync.Once
}

// openTerminal puts the terminal into raw mode.
func openTerminal(in, out *os.File) (*terminal, error) {
	saved, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return nil, fmt.Errorf("cannot use the terminal: %w", err)
	}
	t := &terminal{in: in, out: out, saved: saved,
		signals: make(chan os.Signal, 1), sizes: make(chan windowSize, 1), done: make(chan struct{})}
	signal.Notify(t.signals, syscall.SIGWINCH)
	go t.follow()
	return t, nil
}

// Size returns the present size, 24 by 80 if the terminal does not say.
func (t *terminal) Size() windowSize {
	cols, rows, err := term.GetSize(int(t.out.Fd()))
	if err != nil || cols <= 0 || rows <= 0 {
		return windowSize{Rows: 24, Cols: 80}
	}
	return windowSize{Rows: uint16(min(rows, 0xffff)), Cols: uint16(min(cols, 0xffff))}
}

// Resized yields the size after each change; sizes that nobody took are skipped.
func (t *terminal) Resized() <-chan windowSize { return t.sizes }

func (t *terminal) follow() {
	for {
		select {
		case <-t.done:
			return
		case <-t.signals:
		}
		select {
		case <-t.sizes:
		default:
		}
		t.sizes <- t.Size() // room for one, and only this goroutine fills it
	}
}

// Close restores the terminal; more than once does no harm.
func (t *terminal) Close() error {
	var err error
	t.once.Do(func() {
		signal.Stop(t.signals)
		close(t.done)
		err = term.Restore(int(t.in.Fd()), t.saved)
	})
	return err
}

// The sequences that bring a person's terminal back to what it was before programs changed it. What moves the cursor or not
// every terminal knows is sent only if its counterpart was seen: see [traces].
const (
	saveTitle = "\x1b[22;0t"
	// endSequence ends whatever sequence output broke off in.
	endSequence = "\x18\x1b\\"
	// undoModes switches off synchronized output, mouse reports, focus reports, bracketed paste, application keys, insert
	// mode, the scroll region, line drawing and colours, and on wrapping and the cursor.
	undoModes = "\x1b[?2026l\x1b[?9;1000;1001;1002;1003;1004;1005;1006;1015;1016;2004;1;66l\x1b>\x1b[4l\x1b7\x1b[r\x1b8\x1b(B\x1b)B\x0f\x1b[0m\x1b[?7;25h"
	// undoOrigin moves the cursor; from there it goes to the last line.
	undoOrigin = "\x1b[?6l\x1b[r\x1b[999;1H"
	leaveAlt   = "\x1b[?1049l"
	// restoreTitle takes back saveTitle.
	restoreTitle = "\x1b[23;0t"
)

// traces follows what output does to the terminal it goes to, as far as that must be undone only where it was done.
type traces struct {
	// switched, if set, is told of each switch between the screens.
	switched func(alt bool)

	tail     []byte // the end of what was seen, where a sequence may have been cut
	alt      bool   // the alternate screen is shown
	keyboard bool   // kitty keyboard flags were set
	cursor   bool   // the cursor's style was
	palette  bool   // colours were
	link     bool   // a hyperlink was begun
	origin   bool   // positions counted from the scroll region
	column   bool   // the last line has something on it
}

// trace matches what leaves a trace; maxTrace is the length of the longest that does so in practice: some modes set at once.
var trace = regexp.MustCompile(`\x1b(?:\[\?([0-9;]*)([hl])|\[[>=][0-9;]*(u)|\[[0-9]*( q)|\](?:4|1[0-2])(;)|\]8(;))`)

const maxTrace = 64

func (t *traces) see(output []byte) {
	if len(output) == 0 {
		return
	}
	t.column = output[len(output)-1] != '\n'
	data := output
	if len(t.tail) > 0 {
		data = append(t.tail, output...)
	}
	if bytes.IndexByte(data, 0x1b) < 0 { // most of a flood
		t.tail = nil
		return
	}
	alt := t.alt
	for _, m := range trace.FindAllSubmatch(data, -1) {
		switch {
		case m[2] != nil:
			set := m[2][0] == 'h'
			for mode := range bytes.SplitSeq(m[1], []byte(";")) {
				switch string(mode) {
				case "1049", "1047", "47":
					alt = set
				case "6":
					t.origin = t.origin || set
				}
			}
		case m[3] != nil:
			t.keyboard = true
		case m[4] != nil:
			t.cursor = true
		case m[5] != nil:
			t.palette = true
		case m[6] != nil:
			t.link = true
		}
	}
	if alt != t.alt {
		t.alt = alt
		if t.switched != nil {
			t.switched(alt)
		}
	}
	end := data[max(0, len(data)-maxTrace):]
	t.tail = nil
	if i := bytes.LastIndexByte(end, 0x1b); i >= 0 {
		t.tail = bytes.Clone(end[i:])
	}
}

// undo returns what brings the terminal back, with the cursor at the start of a line.
func (t *traces) undo() string {
	s := endSequence
	pop := ""
	if t.keyboard {
		pop = "\x1b[<99u" // each screen has a stack of flags
	}
	s += pop
	if t.alt {
		s += leaveAlt + pop
	}
	if t.palette {
		s += "\x1b]104\x1b\\\x1b]110\x1b\\\x1b]111\x1b\\\x1b]112\x1b\\"
	}
	if t.link {
		s += "\x1b]8;;\x1b\\"
	}
	if t.cursor {
		s += "\x1b[0 q"
	}
	if t.origin {
		s += undoOrigin
	}
	s += undoModes + restoreTitle
	if t.column || t.alt {
		s += "\r\n"
	}
	return s
}

// guard is a process that puts a terminal right should ours end without doing so: killed, or by a fault. No handler of a
// signal can do that. The zero guard does nothing.
type guard struct {
	cmd *exec.Cmd
	in  *os.File
}

// guardScript reads words until "done". If they end without it, it restores the modes $1 of the terminal, which is its standard output,
// and writes $2 to leave the alternate screen, if the last word about it says so, and $3.
const guardScript = `trap '' HUP INT QUIT TERM TSTP TTOU
alt=
while read -r word; do
	case $word in
	done) exit ;;
	alt) alt=$2 ;;
	main) alt= ;;
	esac
done
stty "$1" <&1
printf '%s' "$alt$3"`

// startGuard starts a guard over a terminal that is not in raw mode yet. A machine without stty has none.
func startGuard(out *os.File, modes string) *guard {
	r, w, err := os.Pipe()
	if err != nil {
		return &guard{}
	}
	defer r.Close()
	cmd := exec.Command("/bin/sh", "-c", guardScript, "berth-guard", modes, leaveAlt, endSequence+undoModes+restoreTitle+"\r\n")
	cmd.Stdin, cmd.Stdout = r, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // what kills our group does not kill it
	if modes == "" || cmd.Start() != nil {
		w.Close()
		return &guard{}
	}
	return &guard{cmd, w}
}

// switched tells the guard which screen is shown.
func (g *guard) switched(alt bool) {
	if g.in != nil {
		fmt.Fprintln(g.in, map[bool]string{true: "alt", false: "main"}[alt])
	}
}

// dismiss ends a guard that has nothing left to do.
func (g *guard) dismiss() {
	if g.in != nil {
		fmt.Fprintln(g.in, "done")
		g.in.Close()
		g.cmd.Wait()
	}
}

// modesOf returns a terminal's modes in the form that stty takes back, or nothing.
func modesOf(in *os.File) string {
	cmd := exec.Command("stty", "-g")
	cmd.Stdin = in
	out, err := cmd.Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}

// errLeave says that the person typed ~. at the start of a line.
var errLeave = errors.New("left")

// escapes finds "~." in what a person types. The tilde counts only after Enter or at the very start;
// ~~ sends one tilde.
type escapes struct {
	typed bool // something other than Enter was typed last
	tilde bool // a tilde is held back
}

// feed returns what to send of the input, and whether the person leaves. The result may be longer than
// the input by a tilde held back.
func (e *escapes) feed(in []byte) (send []byte, leave bool) {
	for _, c := range in {
		if e.tilde {
			e.tilde = false
			switch c {
			case '.':
				return send, true
			case '~':
				send = append(send, '~')
				e.typed = true
				continue
			}
			send = append(send, '~')
			e.typed = true
		}
		if c == '~' && !e.typed {
			e.tilde = true
			continue
		}
		e.typed = c != '\r' && c != '\n'
		send = append(send, c)
	}
	return send, false
}

// inputSize is how much typed or pasted input is read at once.
const inputSize = 32 << 10

// copyInput copies what is typed until its end, an error, or ~. (errLeave).
func copyInput(w io.Writer, r io.Reader) error {
	var e escapes
	buf := make([]byte, inputSize)
	for {
		n, err := r.Read(buf)
		send, leave := e.feed(buf[:n])
		if len(send) > 0 {
			if _, err := w.Write(send); err != nil {
				return err
			}
		}
		switch {
		case leave:
			return errLeave
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}
