package ptyhost

import (
	"log/slog"
	"runtime/debug"

	"github.com/berthd/berth/ptyhost/screen"
)

// picture is a session's model of the screen. The model reads whatever programs print; should
// it fail on something, this session's picture starts anew, and no other terminal is touched.
type picture struct {
	model      *screen.Terminal
	size       Size
	scrollback int // lines; 0 is the model's default
	log        *slog.Logger
}

func newPicture(size Size, scrollback int, log *slog.Logger) *picture {
	p := &picture{size: size, scrollback: scrollback, log: log}
	p.renew()
	return p
}

func (p *picture) renew() {
	p.model = screen.New(screen.Config{Rows: int(p.size.Rows), Cols: int(p.size.Cols), Lines: p.scrollback})
}

// mend is deferred around every use of the model.
func (p *picture) mend() {
	if r := recover(); r != nil {
		p.log.Error("the screen's model failed; it starts anew, please report this", "panic", r, "stack", string(debug.Stack()))
		p.renew()
	}
}

// write takes in a program's output.
func (p *picture) write(b []byte) {
	defer p.mend()
	p.model.Write(b)
}

// resize gives the screen another size.
func (p *picture) resize(size Size) {
	defer p.mend()
	p.size = size
	p.model.Resize(int(size.Rows), int(size.Cols))
}

// snapshot returns what shows the screen to a viewer; nothing if the model fails.
func (p *picture) snapshot(v screen.View) []byte {
	defer p.mend()
	return p.model.Snapshot(v)
}

// lines counts the lines that ever left the screen; title and directory are what the program said they are.
func (p *picture) lines() uint64     { return p.model.Lines() }
func (p *picture) title() string     { return p.model.Title() }
func (p *picture) directory() string { return p.model.Directory() }
