package ptyhost

import (
	"errors"
	"fmt"
	"time"
)

var (
	// ErrNoSession is returned (wrapped) when a session is asked for that the host does not have and that the caller did not ask to create.
	ErrNoSession = errors.New("no such terminal session")

	// ErrStart is returned (wrapped) when the program of a new session could not be started. Its text is meant for the person at the terminal.
	ErrStart = errors.New("cannot start the terminal")

	// ErrBadName and ErrNameTaken are returned (wrapped) by [Client.Rename].
	ErrBadName   = errors.New("cannot use this name for a terminal")
	ErrNameTaken = errors.New("another terminal has this name")

	// ErrHostOld is returned (wrapped) when the host is of an older build that does not know what is asked of it.
	ErrHostOld = errors.New("the terminals belong to a process of an older berthd, which cannot do this; it is replaced when the workspace starts again")

	// ErrHostGone is returned (wrapped) by [Attachment.Wait] when the host ended before it could say how the program did.
	ErrHostGone = errors.New("the terminal host ended")
)

// Size is a terminal's size in character cells. Zero values become 24 rows and 80 columns; anything over [MaxRows] or [MaxCols] is cut.
type Size struct {
	Rows uint16 `json:"rows"`
	Cols uint16 `json:"cols"`
}

// Largest size a terminal is given. Two screens of this size take 64 MiB, and no display comes near it.
const (
	MaxRows = 1000
	MaxCols = 2000
)

func (s Size) String() string { return fmt.Sprintf("%dx%d", s.Cols, s.Rows) }

func (s Size) clamped() Size {
	if s.Rows == 0 || s.Cols == 0 {
		return Size{Rows: 24, Cols: 80}
	}
	return Size{Rows: min(s.Rows, MaxRows), Cols: min(s.Cols, MaxCols)}
}

// AttachRequest names the session to attach to and how.
type AttachRequest struct {
	// ID is the session's id (a UUID in any text form) or its name. Empty asks for a new session with a random id; Create must be set then.
	ID string `json:"id"`

	// Name is what the client calls the session, if it has a name for it besides the id: the session that has this name by now is meant, and only
	// if there is none, one that has the id and no name.
	Name string `json:"name,omitempty"`

	// Container refuses a session that runs elsewhere than in this container; "" takes any.
	Container string `json:"container,omitempty"`

	// Create says how to start the session if it does not exist. If it is nil, the session must exist, else [ErrNoSession].
	Create *CreateRequest `json:"create,omitempty"`

	// Size is the size of the viewer's window. The terminal takes it if nobody else is attached, or as soon as this viewer types.
	Size Size `json:"size"`

	// ReadOnly drops this viewer's input and sizes.
	ReadOnly bool `json:"read_only,omitempty"`

	// View names this attachment, so that another can continue it; at most 64 bytes, unique. After is the name of one that broke off after Got bytes
	// were read: its session is meant, whatever the names are by now, and the snapshot has the lines that scrolled since, not the whole scrollback. What the session does not know is as if it were empty.
	View  string `json:"view,omitempty"`
	After string `json:"after,omitempty"`
	Got   uint64 `json:"got,omitempty"`

	// Raw promises this viewer every byte from the attach on: if it falls behind, the program waits for it (as it would for a real terminal)
	// instead of the viewer being caught up by a snapshot. SSH sessions use it. Other viewers then see the program at that pace.
	Raw bool `json:"raw,omitempty"`
}

// CreateRequest says how to start the program of a new session.
type CreateRequest struct {
	// Name is what people call the session; it can be used in place of the id. Optional, unique, at most 128 bytes of printable characters.
	Name string `json:"name,omitempty"`

	// Container is told to those who list the session: where the program runs, if it enters a container.
	Container string `json:"container,omitempty"`

	// Kind is told to those who list the session: what opened it, a word between callers. Optional.
	Kind string `json:"kind,omitempty"`

	// Argv, Dir and Env start the program. They are used as they are: the host adds nothing else to Env, and looks nothing up in PATH unless Argv[0]
	// has no slash, and then in the PATH of Env.
	Argv []string `json:"argv"`
	Dir  string   `json:"dir,omitempty"`
	Env  []string `json:"env"`

	// TTYVariable, if set, is added to Env with the path of the terminal's device as its value.
	TTYVariable string `json:"tty_variable,omitempty"`

	// Modes are terminal modes numbered and valued as in an SSH pty-req (RFC 4254, section 8), set before the program starts.
	Modes map[uint8]uint32 `json:"modes,omitempty"`

	// Scrollback is how many lines that left the screen are kept, within [screen.DefaultBytes]; 0 means [screen.DefaultLines].
	Scrollback int `json:"scrollback,omitempty"`

	// IdleTimeout ends the session after this long without any viewer; zero means never. A session whose creator never came to attach, or left
	// before seeing output, is ended after 30 seconds if IdleTimeout is set.
	IdleTimeout time.Duration `json:"idle_timeout,omitempty"`

	// KillOnDetach ends the session when its last viewer leaves, as SSH does.
	KillOnDetach bool `json:"kill_on_detach,omitempty"`
}

// ExitStatus is how a program ended.
type ExitStatus struct {
	Code   int    `json:"code"`             // the exit code; 128+n if a signal ended it, as shells say it
	Signal string `json:"signal,omitempty"` // the signal that ended it, as in "KILL"; empty if it exited by itself
	Reason string `json:"reason,omitempty"` // why the host ended it, in words; empty if it ended by itself
}

// SessionInfo describes one session of a host. Its texts come from programs and are not clean.
type SessionInfo struct {
	ID         string      `json:"id"`
	Name       string      `json:"name,omitempty"`
	Title      string      `json:"title,omitempty"`     // what the program calls its window (OSC 0 or 2)
	Command    string      `json:"command,omitempty"`   // argv of the program, joined for people
	Running    string      `json:"running,omitempty"`   // the command in the foreground, cut at 1 KiB; in lists only
	Directory  string      `json:"directory,omitempty"` // where it is: OSC 7, else of the process in the foreground; in lists only
	Container  string      `json:"container,omitempty"`
	Kind       string      `json:"kind,omitempty"` // as the creator said
	PID        int         `json:"pid"`
	Created    time.Time   `json:"created"`
	LastActive time.Time   `json:"last_active"`      // last output or input
	LeftAt     time.Time   `json:"left_at,omitzero"` // when the last viewer left; zero while there are some
	EndsAt     time.Time   `json:"ends_at,omitzero"` // when it is ended if nobody attaches
	Viewers    int         `json:"viewers"`
	Bound      bool        `json:"bound,omitempty"` // it ends with its last viewer (KillOnDetach)
	Size       Size        `json:"size"`
	Exited     *ExitStatus `json:"exited,omitempty"` // set once the program ended, until someone was told
}
