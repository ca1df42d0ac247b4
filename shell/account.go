package shell

import (
	"strconv"

	"github.com/berthd/berth/account"
)

// fallbackShell is where POSIX systems keep a shell.
const fallbackShell = "/bin/sh"

// lookUp finds the user that this process runs as in the user database; env fills what it does not say.
// $SHELL counts only for a user without an entry: a shell left in the agent's environment by whoever
// started it is not this user's choice. A login shell that is not there, as in trimmed containers, is
// replaced.
func lookUp(passwd string, uid int, env environment) account.User {
	found, ok := entry(passwd, uid, env["USER"])
	if !ok {
		found = account.User{Name: env["USER"], Shell: env["SHELL"]}
	}
	if found.Name == "" {
		found.Name = strconv.Itoa(uid)
	}
	if env["HOME"] != "" {
		found.Home = env["HOME"]
	}
	if found.Home == "" {
		found.Home = "/"
	}
	if !isExecutable(found.Shell) {
		found.Shell = fallbackShell
	}
	return found
}

// entry finds a user by number. Several names may share one: preferred is taken if it is one of them,
// else the first.
func entry(passwd string, uid int, preferred string) (first account.User, found bool) {
	for u := range account.Entries(passwd) {
		if int(u.UID) != uid {
			continue
		}
		if u.Name == preferred {
			return u, true
		}
		if !found {
			first, found = u, true
		}
	}
	return first, found
}
