package sshd

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh"

	"github.com/berthd/berth/ptyhost"
)

type ptyPayload struct {
	Term             string
	Cols, Rows, W, H uint32
	Modes            string
}

func TestParsePTY(t *testing.T) {
	got, err := parsePTY(ssh.Marshal(ptyPayload{"xterm", 80, 1 << 20, 0, 0, "\x03\x00\x00\x00\x7f\x35\x00\x00\x00\x00\x00"}))
	if err != nil {
		t.Fatal(err)
	}
	want := &ptyRequest{term: "xterm", size: ptyhost.Size{Rows: 65535, Cols: 80}, modes: map[uint8]uint32{3: 127, 53: 0}}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(ptyRequest{})); diff != "" {
		t.Error(diff)
	}
	for name, p := range map[string][]byte{
		"NUL in the type": ssh.Marshal(ptyPayload{Term: "a\x00b"}),
		"long type":       ssh.Marshal(ptyPayload{Term: strings.Repeat("x", 257)}),
		"short":           []byte("\x00\x00\x00\x05xt"),
	} {
		if _, err := parsePTY(p); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestParseModes(t *testing.T) {
	for name, tt := range map[string]struct {
		in   string
		want map[uint8]uint32
	}{
		"empty":     {"", map[uint8]uint32{}},
		"ended":     {"\x01\x00\x00\x01\x00\x00\x02\x00\x00\x00\x01", map[uint8]uint32{1: 256}},
		"cut short": {"\x01\x00\x00\x00\x03\x02\x00", map[uint8]uint32{1: 3}},
		"undefined": {"\x01\x00\x00\x00\x03\xa0\x00\x00\x00\x01", map[uint8]uint32{1: 3}},
	} {
		if diff := cmp.Diff(tt.want, parseModes(tt.in)); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func FuzzParsePTY(f *testing.F) {
	f.Add(ssh.Marshal(ptyPayload{"xterm-256color", 80, 24, 640, 480, "\x01\x00\x00\x00\x03\x00"}))
	f.Add([]byte("\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, payload []byte) {
		p, err := parsePTY(payload)
		if err == nil && len(p.modes) >= firstUndefined {
			t.Errorf("%d modes", len(p.modes))
		}
		parseWindowChange(payload)
	})
}

func TestClientEnv(t *testing.T) {
	e := clientEnv{kind: SessionSSH}
	for _, tt := range []struct {
		name, value string
		want        bool
	}{
		{"LANG", "C.UTF-8", true},
		{"EMPTY", "", true},
		{"", "x", false},
		{"A=B", "x", false},
		{"A", "x\x00", false},
		{"LD_PRELOAD", "x", false},
		{"LD_LIBRARY_PATH", "x", false},
		{"DYLD_INSERT_LIBRARIES", "x", false},
		{"GLIBC_TUNABLES", "x", false},
		{"BIG", strings.Repeat("x", maxEnvBytes), false},
		{"CODER_SSH_SESSION_TYPE", "VSCODE", true},
		{"CODER_CONTAINER", "c", true},
		{"CODER_CONTAINER_USER", "u", true},
	} {
		if got := e.set(tt.name, tt.value); got != tt.want {
			t.Errorf("set(%s) = %v, want %v", tt.name, got, tt.want)
		}
	}
	if diff := cmp.Diff([]string{"LANG=C.UTF-8", "EMPTY="}, e.vars); diff != "" {
		t.Error(diff)
	}
	if e.kind != SessionVSCode || e.container != (Container{Name: "c", User: "u"}) {
		t.Errorf("type %s, container %q", e.kind, e.container)
	}
	for range maxEnvVars + 1 {
		e.set("N", "")
	}
	if len(e.vars) != maxEnvVars {
		t.Errorf("%d variables, want at most %d", len(e.vars), maxEnvVars)
	}
}

func TestSetVar(t *testing.T) {
	env := []string{"A=1", "TERM=x", "TERMINFO=y"}
	if diff := cmp.Diff([]string{"A=1", "TERMINFO=y", "TERM=z"}, setVar(env, "TERM", "z")); diff != "" {
		t.Error(diff)
	}
	if env[1] != "TERM=x" {
		t.Error("the caller's slice was changed")
	}
}
