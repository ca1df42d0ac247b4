package agent

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/berthd/berth/ptyhost"
)

// typed records what is fed to a terminal, in order.
type typed struct{ got []string }

func (t *typed) Write(p []byte) (int, error) {
	t.got = append(t.got, string(p))
	return len(p), nil
}

func (t *typed) Resize(s ptyhost.Size) error {
	t.got = append(t.got, fmt.Sprintf("resize %v", s))
	return nil
}

func TestFeed(t *testing.T) {
	tests := map[string]struct {
		in   string
		want []string
		fail bool
	}{
		"data then size": {`{"data":"ls\r","height":30,"width":100}`, []string{"ls\r", "resize 100x30"}, false},
		"half a size":    {`{"height":30}{"width":100}`, nil, false},
		"run together":   {`{"data":"a"}{"data":"b"}`, []string{"a", "b"}, false},
		"not json":       {`{"data":"a"}nonsense`, []string{"a"}, true},
		"cut off":        {`{"data":"a"}{"da`, []string{"a"}, true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			var got typed
			err := feed(&got, strings.NewReader(tt.in))
			if (err != nil) != tt.fail {
				t.Errorf("feed = %v, want failure %v", err, tt.fail)
			}
			if diff := cmp.Diff(tt.want, got.got); diff != "" {
				t.Errorf("fed (-want +got):\n%s", diff)
			}
		})
	}
}

func FuzzFeed(f *testing.F) {
	f.Add([]byte(`{"data":"ls\r","height":30,"width":100}`))
	f.Add([]byte(`{"height":65536}`))
	f.Fuzz(func(t *testing.T, in []byte) {
		var got typed
		if err := feed(&got, bytes.NewReader(in)); err == nil && len(in) > 0 && len(got.got) > len(in) {
			t.Errorf("%d bytes made %d actions", len(in), len(got.got))
		}
	})
}

func TestTerminalEnv(t *testing.T) {
	tests := map[string]struct {
		env  map[string]string
		want []string
	}{
		"none":          {nil, []string{"TERM=xterm-256color", "LC_CTYPE=C.UTF-8"}},
		"utf-8 by lang": {map[string]string{"LANG": "de_DE.UTF-8"}, []string{"TERM=xterm-256color"}},
		"spelt utf8":    {map[string]string{"LANG": "de_DE.utf8"}, []string{"TERM=xterm-256color"}},
		"ctype wins":    {map[string]string{"LC_CTYPE": "C", "LANG": "de_DE.UTF-8"}, []string{"TERM=xterm-256color", "LC_CTYPE=C.UTF-8"}},
		"all is kept":   {map[string]string{"LC_ALL": "C"}, []string{"TERM=xterm-256color"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got := terminalEnv(func(name string) string { return tt.env[name] })
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("environment (-want +got):\n%s", diff)
			}
		})
	}
}
