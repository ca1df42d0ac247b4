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

// maxCommandLine bounds what is told of a command line: as much as a list shows.
const maxCommandLine = 1 << 10

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
	line, err := io.ReadAll(io.LimitReader(f, maxCommandLine))
	if err != nil {
		return ""
	}
	line = bytes.ReplaceAll(bytes.TrimRight(line, "\x00"), []byte{0}, []byte{' '})
	return strings.ToValidUTF8(string(line), "\uFFFD")
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
	return strings.ToValidUTF8(dir, "\uFFFD")
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
	return strings.ToValidUTF8(u.Path, "\uFFFD")
}
