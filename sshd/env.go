package sshd

import (
	"slices"
	"strings"

	"github.com/berthd/berth/shell"
)

// Bounds on what a client may put into an environment: execve refuses a string of 128 KiB, and all of them together share 2 MiB with the arguments.
const (
	maxEnvVars  = 1024
	maxEnvBytes = 256 << 10
)

// clientEnv is the environment one session's client has sent.
type clientEnv struct {
	vars      []string // NAME=value
	bytes     int
	kind      SessionType
	container Container
}

// set takes one variable, or reports false if policy refuses it. Variables that steer the dynamic linker are always refused: they would run code in
// programs that the user did not choose to run. Those that are meant for this server are taken out.
func (e *clientEnv) set(name, value string) bool {
	switch {
	case name == "" || strings.ContainsAny(name, "=\x00") || strings.ContainsRune(value, 0):
		return false
	case shell.LoaderVariable(name):
		return false
	}
	switch name {
	case "BERTH_SSH_SESSION_TYPE", "CODER_SSH_SESSION_TYPE":
		e.kind = sessionType(value)
		return true
	case "CODER_CONTAINER":
		e.container.Name = value
		return true
	case "CODER_CONTAINER_USER":
		e.container.User = value
		return true
	}
	if len(e.vars) == maxEnvVars || e.bytes+len(name)+len(value) > maxEnvBytes {
		return false
	}
	e.bytes += len(name) + len(value)
	e.vars = append(e.vars, name+"="+value)
	return true
}

func sessionType(value string) SessionType {
	switch t := SessionType(strings.ToLower(value)); t {
	case "":
		return SessionSSH
	case SessionSSH, SessionVSCode, SessionJetBrains:
		return t
	default:
		return SessionOther
	}
}

// setVar returns env with name set to value, and to nothing else.
func setVar(env []string, name, value string) []string {
	env = slices.DeleteFunc(slices.Clone(env), func(v string) bool { return strings.HasPrefix(v, name+"=") })
	return append(env, name+"="+value)
}
