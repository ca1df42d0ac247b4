// Package judge runs terminals that others wrote, so that tests can hold our model of a screen against them: those of xterm.js, the terminal
// of browsers and of VS Code, in one process of node that serves all of a test's terminals.
package judge

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// Widths names how a terminal counts columns.
type Widths string

const (
	Unicode6  Widths = "6"            // per code point, by tables of 2010: what xterm.js does if not told otherwise
	Unicode11 Widths = "11"           // per code point, by tables of 2018: what VS Code does
	Graphemes Widths = "15-graphemes" // per grapheme cluster, by tables of 2022
)

// Judge is the process. Its methods and those of its terminals are not safe for concurrent use.
type Judge struct {
	tb      testing.TB
	in      *bufio.Writer
	waiting chan chan string
	last    uint32
}

// Start starts a judge that ends with the test.
func Start(tb testing.TB) *Judge {
	tb.Helper()
	dir, err := home()
	if err != nil {
		tb.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "node_modules")); err != nil {
		tb.Fatalf("xterm.js, the judge, is not installed; ./test.sh installs it (%v)", err)
	}
	cmd := exec.Command("node", "judge.js")
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		tb.Fatalf("cannot start the judge: %v", err)
	}
	// Deep enough that questions never wait for answers: the largest batch of the tests is 4,000.
	j := &Judge{tb: tb, in: bufio.NewWriterSize(in, 1<<16), waiting: make(chan chan string, 1<<14)}
	var wg sync.WaitGroup
	wg.Go(func() { j.answers(bufio.NewReader(out)) })
	tb.Cleanup(func() {
		close(j.waiting)
		in.Close()
		wg.Wait()
		if err := cmd.Wait(); err != nil {
			tb.Errorf("the judge: %v", err)
		}
	})
	return j
}

// home is where the judge's program and packages are; tests run in their package's directory.
func home() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		at := filepath.Join(dir, "internal/judge/testdata/xterm")
		if _, err := os.Stat(at); err == nil {
			return at, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("cannot find internal/judge above the working directory")
		}
		dir = filepath.Dir(dir)
	}
}

// answers gives every question its answer. After the process's end every answer is empty.
func (j *Judge) answers(r io.Reader) {
	var err error
	for answer := range j.waiting {
		var size uint32
		var body []byte
		if err == nil {
			err = binary.Read(r, binary.BigEndian, &size)
		}
		if err == nil {
			body = make([]byte, size)
			_, err = io.ReadFull(r, body)
		}
		answer <- string(body)
	}
}

func (j *Judge) send(op byte, id uint32, payload []byte) {
	head := binary.BigEndian.AppendUint32([]byte{op}, id)
	head = binary.BigEndian.AppendUint32(head, uint32(len(payload)))
	j.in.Write(head)
	if _, err := j.in.Write(payload); err != nil {
		j.tb.Fatalf("the judge is gone: %v", err)
	}
}

func (j *Judge) ask(op byte, id uint32, payload []byte) func() string {
	j.send(op, id, payload)
	answer := make(chan string, 1)
	j.waiting <- answer
	return func() string {
		j.in.Flush()
		text := <-answer
		if text == "" {
			j.tb.Fatal("the judge died")
		}
		return text
	}
}

// Terminal is a terminal of xterm.js.
type Terminal struct {
	judge *Judge
	id    uint32
}

// Options says what a terminal is like.
type Options struct {
	Rows       int    `json:"rows"`
	Cols       int    `json:"cols"`
	Scrollback int    `json:"scrollback"` // lines kept beyond the screen
	Widths     Widths `json:"unicode"`
	// ReflowCursorLine makes a resize wrap the line that the cursor is on anew, too, as tmux and others do. The cursor's column stays.
	ReflowCursorLine bool `json:"reflowCursorLine"`
}

// New makes a terminal.
func (j *Judge) New(o Options) *Terminal {
	j.last++
	j.send('n', j.last, j.marshal(o))
	return &Terminal{j, j.last}
}

func (j *Judge) marshal(v any) []byte {
	payload, err := json.Marshal(v)
	if err != nil {
		j.tb.Fatal(err)
	}
	return payload
}

// Write feeds the terminal.
func (t *Terminal) Write(p []byte) { t.judge.send('w', t.id, p) }

// Resize gives the terminal another size.
func (t *Terminal) Resize(rows, cols int) {
	t.judge.send('r', t.id, t.judge.marshal(map[string]int{"rows": rows, "cols": cols}))
}

// State is what a terminal shows and remembers at one moment, as digests.
type State struct {
	Facts      string // cursor, pen, modes, titles, colours, character sets, tab stops
	Cells      string // of the screen, and of the main one if the alternate one is shown
	Scrollback string
}

// State asks for the terminal's state. The answer is of the moment of the question, and waited for only when it is taken.
func (t *Terminal) State() func() State {
	answer := t.judge.ask('s', t.id, nil)
	return func() (s State) {
		if _, err := fmt.Sscan(answer(), &s.Facts, &s.Cells, &s.Scrollback); err != nil {
			t.judge.tb.Fatalf("the judge's answer makes no sense: %v", err)
		}
		return s
	}
}

// Dump asks for the same, to be read.
func (t *Terminal) Dump() func() string { return t.judge.ask('d', t.id, nil) }

// Part asks for rows of the screen from top on, cut to cols columns, with the cursor relative to them.
func (t *Terminal) Part(top, rows, cols int) func() string {
	return t.judge.ask('p', t.id, t.judge.marshal(map[string]int{"top": top, "rows": rows, "cols": cols}))
}

// Lines asks for the scrollback's text, wrapped lines put together.
func (t *Terminal) Lines() func() string { return t.judge.ask('l', t.id, nil) }

// Close forgets the terminal.
func (t *Terminal) Close() { t.judge.send('x', t.id, nil) }
