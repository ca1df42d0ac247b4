package ptyhost

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/berthd/berth/internal/judge"
)

// pane is what xterm.js shows of all that a viewer got.
type pane struct {
	watcher *watcher
	size    Size
	term    *judge.Terminal
	fed     int
}

func (s *pane) part(j *judge.Judge, top, rows, cols int) string {
	if s.term == nil {
		s.term = j.New(judge.Options{Rows: int(s.size.Rows), Cols: int(s.size.Cols), Scrollback: 1000, Widths: judge.Unicode11})
	}
	out, _ := s.watcher.output()
	s.term.Write(out[s.fed:])
	s.fed = len(out)
	return s.term.Part(top, rows, cols)()
}

// TestWindows has viewers with windows of three sizes on one terminal, and lets one after the other have its size: every window shows the terminal
// as one of the right size would.
func TestWindows(t *testing.T) {
	c := startTestHost(t)
	j := judge.Start(t)
	id := uuid.NewString()
	script := `printf '\033[1;44mheading\033[m\r\n'; for i in $(seq 40); do echo "line $i is this long 漢字"; done; stty -echo; while read x; do echo "read $x"; printf '> '; done`
	sizes := []Size{{24, 80}, {10, 40}, {40, 120}}
	var viewers []*pane
	for _, size := range sizes {
		v := &pane{size: size, watcher: watch(t, attach(t, c, AttachRequest{ID: id, Create: shell(script), Size: size}))}
		v.watcher.expect(t, "line 40")
		viewers = append(viewers, v)
	}
	var diff string
	t.Cleanup(func() {
		if diff != "" {
			t.Logf("(-right size +window):\n%s", diff)
		}
	})
	for _, typist := range []int{1, 2, 0, 2} {
		size := sizes[typist]
		word := uuid.NewString()[:6]
		if _, err := viewers[typist].watcher.Write([]byte(word + "\r")); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the typist's size", func() bool { return listed(t, c, id).Size == size })
		for _, v := range viewers {
			v.watcher.expect(t, word)
			rows, cols := int(min(v.size.Rows, size.Rows)), int(min(v.size.Cols, size.Cols))
			eventually(t, "windows of "+v.size.String()+" on a terminal of "+size.String(), func() bool {
				// Who attaches now, read only, at the terminal's size is right; the rest is about that.
				late := attach(t, c, AttachRequest{ID: id, ReadOnly: true, Size: size})
				defer late.Close()
				w := &pane{size: size, watcher: watch(t, late)}
				w.watcher.expect(t, word)
				lines := strings.Split(w.part(j, 0, int(size.Rows), cols), "\n")
				var y, x int
				if _, err := fmt.Sscanf(lines[len(lines)-2], "cursor %d,%d", &y, &x); err != nil {
					t.Fatal(err)
				}
				top := max(0, y-rows+1)
				want, got := w.part(j, top, rows, cols), v.part(j, 0, rows, cols)
				diff = cmp.Diff(want, got)
				return diff == ""
			})
		}
	}
}
