package hold

import (
	"os"

	"golang.org/x/sys/unix"
)

// pipeRoom is how much a script may print while we are kept from reading, on a machine that is busy, before it has to
// wait; what everybody may ask Linux for.
const pipeRoom = 1 << 20

// widen gives a pipe that room, if the system lets it have so much.
func widen(pipe *os.File) {
	raw, err := pipe.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeRoom) })
}
