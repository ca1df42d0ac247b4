package ports

import (
	"bytes"
	"path"
	"regexp"
)

// What a hidden port belongs to.
const (
	Berthd    = "berthd"
	VSCode    = "VS Code"
	JetBrains = "JetBrains"
)

// maxArguments bounds how much of a command line is looked at to recognise a helper: a JetBrains IDE names hundreds of libraries before itself.
const maxArguments = 256 << 10

// jetBrainsMarks stand in the command lines of JetBrains programs that people connect to.
var jetBrainsMarks = [][]byte{[]byte("idea.vendor.name=JetBrains"), []byte("com.jetbrains.toolbox"), []byte("remote-dev-server")}

// editorServer is the directory that VS Code and its kin (Cursor, Windsurf, VSCodium and others) keep their server in, such as .vscode-server-insiders.
var editorServer = regexp.MustCompile(`/\.[a-z][a-z-]*-server(-insiders)?/`)

// editorOf tells which editor's helper a process is from its command line, as /proc/PID/cmdline has it; "" is none. It looks for what the editor starts
// to be connected to. What a person's extension listens on lives in another process of the editor, and is the person's.
func editorOf(cmdline []byte) string {
	for _, mark := range jetBrainsMarks {
		if bytes.Contains(cmdline, mark) {
			return JetBrains
		}
	}
	if !editorServer.Match(cmdline) {
		return ""
	}
	for i, arg := range bytes.Split(cmdline, []byte{0}) {
		switch {
		case path.Base(string(arg)) == "server-main.js": // the server itself, run by its own node
			return VSCode
		case i == 1 && string(arg) == "command-shell": // the launcher's control connection
			return VSCode
		}
	}
	return ""
}
