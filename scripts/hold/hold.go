// Package hold runs one command in a process of its own, and keeps what it prints until somebody has taken it.
//
// The holder is the command's parent and reads its output. Whoever started it may be killed: the command does not notice. The next one attaches by the
// holder's socket and goes on where the last had come. [Start] starts a holder, whose whole life is [RunProcess]; [Attach] makes either connection
// a [Held], and [Held.Follow] takes what is printed. [Run] is a holder in this process.
//
// While nobody is attached the holder keeps up to 256 KiB of each stream, and the pipe behind it another mebibyte; then the command waits, as for any
// full pipe. All output goes to the command's log file too, at once. A holder that was left alone for its patience keeps nothing any more:
// the command goes on, into the log file, and the holder ends when nobody has its output open.
package hold

import (
	"encoding/json"
	"time"
)

// Streams are the two that a command prints on.
const (
	Stdout = iota
	Stderr
	streams
)

// Job is a command, and how it is held.
type Job struct {
	Path string
	Args []string // Args[0] is what the command is called
	Dir  string
	Env  []string // nil is none
	// Timeout ends the command and all that came of it; 0 is none.
	Timeout time.Duration
	// Grace is what a command has between its SIGHUP and SIGKILL.
	Grace time.Duration
	// Patience is how long the holder waits for somebody to attach.
	Patience time.Duration
	// Remove is a file to remove when the command has ended; empty is none.
	Remove string
	// Socket is where somebody may attach; empty is nowhere.
	Socket string
	// Tag is told to whoever attaches.
	Tag json.RawMessage
}

// State is what one who attaches finds.
type State struct {
	Tag json.RawMessage
	// Pid is the holder's.
	Pid int
	// Kept is the first byte of each stream that is still there.
	Kept [streams]uint64
	// Pipes are the inodes of the pipes that the command prints into.
	Pipes [streams]uint64
	// Started is when the command was.
	Started time.Time
	// Reported is what [Held.Reported] left.
	Reported bool
}

// Exit is how a command ended.
type Exit struct {
	Start, End time.Time
	// Code is the exit code, -1 if a signal ended it.
	Code int
	// TimedOut tells that it was ended for its timeout, HungUp that it was for any reason.
	TimedOut, HungUp bool
	// Failure says why it could not be started, empty if it could.
	Failure string
	// LogFailure says why a part of its output is not in its log file, empty if all is.
	LogFailure string
}
