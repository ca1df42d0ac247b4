package shell

import (
	"bufio"
	"os"
	"strconv"
	"strings"
)

// account is the user that this process runs as.
type account struct{ name, home, shell string }

// fallbackShell is where POSIX systems keep a shell.
const fallbackShell = "/bin/sh"

// lookUp finds uid in the user database; env fills what it does not say. $SHELL counts only for a
// user without an entry: a shell left in the agent's environment by whoever started it is not this
// user's choice. A login shell that is not there, as in trimmed containers, is replaced.
func lookUp(passwd string, uid int, env environment) account {
	found, ok := entry(passwd, uid, env["USER"])
	if !ok {
		found = account{name: env["USER"], shell: env["SHELL"]}
	}
	if found.name == "" {
		found.name = strconv.Itoa(uid)
	}
	if env["HOME"] != "" {
		found.home = env["HOME"]
	}
	if found.home == "" {
		found.home = "/"
	}
	if !isExecutable(found.shell) {
		found.shell = fallbackShell
	}
	return found
}

// entry reads a file of passwd(5). Several names may share a uid: preferred is taken if it is one
// of them, else the first.
func entry(path string, uid int, preferred string) (account, bool) {
	file, err := os.Open(path)
	if err != nil {
		return account{}, false
	}
	defer file.Close()
	var first account
	var found bool
	for lines := bufio.NewScanner(file); lines.Scan(); {
		field := strings.Split(lines.Text(), ":")
		if len(field) != 7 || field[2] != strconv.Itoa(uid) {
			continue
		}
		a := account{name: field[0], home: field[5], shell: field[6]}
		if a.name == preferred {
			return a, true
		}
		if !found {
			first, found = a, true
		}
	}
	return first, found
}
