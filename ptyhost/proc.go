package ptyhost

import (
	"bytes"
	"fmt"
	"io"
	"net/url"
	"os"
	"path"
	"strings"
)

// maxShown bounds each text that describes a session, in bytes: more than a list shows, and little enough that
// hundreds of sessions fit a frame however their programs call themselves.
const maxShown = 1 << 10

// shown is a text as lists have it: cut, and characters throughout.
func shown(text string) string {
	return strings.ToValidUTF8(text[:min(len(text), maxShown)], "\uFFFD")
}

// commandLine is what the leader of a process group was started with, empty if that cannot be read.
func commandLine(pgrp int) string {
	if pgrp <= 0 {
		return ""
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/cmdline", pgrp))
	if err != nil {
		return ""
	}
	defer f.Close()
	line, err := io.ReadAll(io.LimitReader(f, maxShown))
	if err != nil {
		return ""
	}
	return string(bytes.ReplaceAll(bytes.TrimRight(line, "\x00"), []byte{0}, []byte{' '}))
}

// workingDirectory is where the leader of a process group is, empty if that cannot be read.
func workingDirectory(pgrp int) string {
	if pgrp <= 0 {
		return ""
	}
	dir, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pgrp))
	if err != nil {
		return ""
	}
	return dir
}

// localDirectory is the path in what a program sent as OSC 7, empty if that is no directory of this machine.
func localDirectory(osc7 string) string {
	u, err := url.Parse(osc7)
	if err != nil || u.Scheme != "file" || !path.IsAbs(u.Path) {
		return ""
	}
	if here, err := os.Hostname(); u.Host != "" && u.Host != "localhost" && (err != nil || u.Host != here) {
		return "" // ssh to elsewhere
	}
	return u.Path
}
