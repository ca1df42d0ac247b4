package shell

import (
	"maps"
	"slices"
	"strings"

	"github.com/berthd/berth/account"
)

// defaultPath is what a login gets where the agent was started without any PATH.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// serviceVariables are a service manager's word to the agent process alone: a child that spoke to
// the same socket would be taken for the agent.
var serviceVariables = map[string]bool{
	"NOTIFY_SOCKET": true, "WATCHDOG_USEC": true, "WATCHDOG_PID": true,
	"LISTEN_PID": true, "LISTEN_FDS": true, "LISTEN_FDNAMES": true, "LISTEN_PIDFDID": true,
	"CREDENTIALS_DIRECTORY": true, "INVOCATION_ID": true, "JOURNAL_STREAM": true,
}

// clientVariables steer the SSH server and are not for the command; see agent-services.md §2.2 of
// the protocol.
var clientVariables = map[string]bool{
	"CODER_SSH_SESSION_TYPE": true, "CODER_CONTAINER": true, "CODER_CONTAINER_USER": true,
}

// LoaderVariable tells whether the dynamic loader or the C library of any system that berthd runs on
// obeys a variable: it makes them run or read what it names, before the program that the person asked
// for has begun. No client may set one.
func LoaderVariable(name string) bool {
	for _, prefix := range []string{"LD_", "DYLD_", "_RLD"} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	switch name {
	case "GCONV_PATH", "GLIBC_TUNABLES", "LOCPATH", "MALLOC_TRACE":
		return true
	}
	return false
}

// clientMaySet tells whether a client's variable reaches the command.
func clientMaySet(name string) bool {
	return !LoaderVariable(name) && !clientVariables[name] && !serviceVariables[name]
}

// ownVariable tells whether a variable of this process is about its own user, and would lead another one
// to places that are not theirs.
func ownVariable(name, _ string) bool {
	switch name {
	case "HOME", "MAIL", "PWD", "OLDPWD", "XAUTHORITY", "SSH_AUTH_SOCK", "DBUS_SESSION_BUS_ADDRESS":
		return true
	}
	return strings.HasPrefix(name, "XDG_") || strings.HasPrefix(name, "SUDO_")
}

// environment maps names to values.
type environment map[string]string

// add sets name, unless exec could not carry it.
func (e environment) add(name, value string) {
	if validVariable(name, value) {
		e[name] = value
	}
}

// addBoth sets the name that stock programs look for and berth's own beside it.
func (e environment) addBoth(name, value string) {
	e.add("CODER_"+name, value)
	e.add("BERTH_"+name, value)
}

// addAll adds NAME=value pairs whose name passes; later ones win.
func (e environment) addAll(pairs []string, pass func(name string) bool) {
	for _, pair := range pairs {
		if name, value, ok := strings.Cut(pair, "="); ok && pass(name) {
			e.add(name, value)
		}
	}
}

// become makes the environment of a process what one of another user starts from.
func (e environment) become(u *account.User) {
	maps.DeleteFunc(e, ownVariable)
	e.add("HOME", u.Home)
}

func (e environment) merge(other environment)   { maps.Copy(e, other) }
func (e environment) clone() environment        { return maps.Clone(e) }
func (e environment) lookup(name string) string { return e[name] }
func validVariable(name, value string) bool {
	return name != "" && !strings.ContainsAny(name, "=\x00") && !strings.ContainsRune(value, 0)
}

// list returns the sorted NAME=value pairs.
func (e environment) list() []string {
	pairs := make([]string, 0, len(e))
	for name, value := range e {
		pairs = append(pairs, name+"="+value)
	}
	slices.Sort(pairs)
	return pairs
}

// Quote makes s one word of a POSIX shell.
func Quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
