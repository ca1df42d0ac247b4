package ptyhost

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/berthd/berth/ptyhost/screen"
)

// A model that fails, as one that is not there does at any touch, costs the picture and nothing else.
func TestPictureSurvivesItsModel(t *testing.T) {
	view := screen.View{Rows: 5, Cols: 20}
	for name, use := range map[string]func(*picture){
		"write":    func(p *picture) { p.write([]byte("lost")) },
		"resize":   func(p *picture) { p.resize(Size{Rows: 5, Cols: 20}) },
		"snapshot": func(p *picture) { p.snapshot(view) },
	} {
		var log bytes.Buffer
		p := newPicture(Size{Rows: 5, Cols: 20}, 0, slog.New(slog.NewTextHandler(&log, nil)))
		p.model = nil
		use(p)
		if !strings.Contains(log.String(), "starts anew") {
			t.Errorf("%s: the failure was not told: %s", name, &log)
		}
		p.write([]byte("after"))
		if got := string(p.snapshot(view)); !strings.Contains(got, "after") || strings.Contains(got, "lost") {
			t.Errorf("%s: snapshot afterwards %q", name, got)
		}
	}
}
