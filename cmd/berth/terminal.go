package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
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

// undoModes switches off what a full-screen program may have left on: mouse reports, bracketed paste,
// application keys, a hidden cursor, colours. The alternate screen is left by [altScreen.leave].
const undoModes = "\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?1004l\x1b[?2004l\x1b[?1l\x1b>\x1b[?25h\x1b[0m"

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

// altScreen follows whether a terminal shows its alternate screen, by the output that goes to it.
// Leaving that screen also moves the cursor, so it must not be done for good measure.
type altScreen struct {
	tail  []byte // the end of what was seen, where a sequence may have been cut
	shown bool
}

var altSwitch = regexp.MustCompile(`\x1b\[\?(?:1049|1047|47)([hl])`)

// maxAltSwitch is the length of the longest of these sequences.
const maxAltSwitch = len("\x1b[?1049h")

func (a *altScreen) see(output []byte) {
	data := append(a.tail, output...)
	if all := altSwitch.FindAllSubmatch(data, -1); len(all) > 0 {
		a.shown = all[len(all)-1][1][0] == 'h'
	}
	a.tail = append([]byte(nil), data[max(0, len(data)-maxAltSwitch+1):]...)
}

// leave returns what brings the normal screen back, if it is not shown.
func (a *altScreen) leave() string {
	if a.shown {
		return "\x1b[?1049l"
	}
	return ""
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
