package berthd

import (
	"fmt"
	"maps"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/berthd/berth/agent"
	"github.com/berthd/berth/oom"
	"github.com/berthd/berth/shell"
)

// envInPlace tells a berthd that there was another in its process before it. It is not passed on.
const envInPlace = "BERTHD_IN_PLACE"

// errInPlace ends a run whose process goes on as the berthd that is installed by then: nobody may be there to start it
// again, and who is there need not.
var errInPlace = fmt.Errorf("%w in the same process", agent.ErrRestart)

// restartInPlace makes this process the program that lies where its own lay, called in the same way. It returns only if that
// fails; another start by whoever starts berthd may help.
func (p process) restartInPlace(whole []string) error {
	exe, err := os.Executable()
	if err == nil {
		env := maps.Clone(p.env)
		env[envInPlace] = "1"
		err = oom.Exec(func() error { return syscall.Exec(exe, append(selfCommand(whole), whole...), env.list()) })
	}
	fmt.Fprintf(p.stderr, "berthd: cannot start %s in this process: %v\n", exe, err)
	return errRestart
}

// adoptChildren waits for what the berthd before this one has started and left: the owner of the terminals, commands of sessions that are over.
func adoptChildren() {
	pid := strconv.Itoa(os.Getpid())
	children, err := os.ReadFile("/proc/self/task/" + pid + "/children") // of its first thread: after execve(2) there was no other
	if err != nil {
		return // they will be seen as defunct until this process ends
	}
	for _, child := range strings.Fields(string(children)) {
		if pid, err := strconv.Atoi(child); err == nil {
			go shell.Reap(pid)
		}
	}
}
