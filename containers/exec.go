package containers

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"
)

const (
	// askTimeout is what an engine has to answer about a command.
	askTimeout = 10 * time.Second
	// endTimeout is how long after a command's last output its exit code is waited for: engines learn of it a little later.
	endTimeout = 10 * time.Second
	// sizeTimeout is how long a command's terminal may take to exist once it was started.
	sizeTimeout = 2 * time.Second
	askAgain    = 20 * time.Millisecond
)

// markVariable marks a command's process, so that nobody else's is signalled in its place.
const markVariable = "BERTH_EXEC"

// noDetachKeys is what engines are told to take for a wish to detach. There must be something, and their own choice begins with ^P, which they would
// hold back until the next key.
var noDetachKeys = strings.Repeat("ctrl-^,", 15) + "ctrl-^"

// Command is what to run in a container.
type Command struct {
	// Line is run by the user's shell there; empty means a login shell.
	Line string
	// User is a name or id there, with a group after a colon if need be. Empty means the user that a dev container names, else the container's.
	User string
	// Env is NAME=value, added to the container's own environment.
	Env []string
	// Terminal runs it in a terminal. Its size is Rows and Cols where the container has an stty; [Process.Resize] sets it everywhere. Without a terminal
	// the two outputs are kept apart.
	Terminal   bool
	Rows, Cols uint16
}

// loginShell runs in a container, by any POSIX shell that is there, and turns into the user's own. $1 is the command line. The user database is
// read in place: id(1) and others may be missing. The size of the terminal, $2 and $3, comes with it, as engines learn it only once the command runs.
const loginShell = `[ -z "$2" ] || stty rows "$2" cols "$3" 2>/dev/null
uid=
while read -r key value rest; do
	if [ "$key" = Uid: ]; then uid=$value; break; fi
done </proc/self/status
name= home= shell=
if [ -r /etc/passwd ]; then
	while IFS=: read -r n p u g c h s; do
		if [ "$u" = "$uid" ]; then name=$n home=$h shell=$s; break; fi
	done </etc/passwd
fi
[ -x "$shell" ] || shell=/bin/sh
[ -x "$shell" ] || shell=sh
[ -n "$HOME" ] || HOME=${home:-/}
export HOME SHELL="$shell"
[ -z "$name" ] || export USER="$name" LOGNAME="$name"
[ -n "$1" ] || exec "$shell" -l
exec "$shell" -c "$1"
`

// signalling runs in a container, to signal the command with the mark $1 where that cannot be done from outside. The command is the one whose parent is
// not in the container; what it started has the mark too.
const signalling = `for dir in /proc/[0-9]*; do
	if grep -q '^PPid:[[:space:]]*0$' "$dir/status" 2>/dev/null && tr '\000' '\n' <"$dir/environ" 2>/dev/null | grep -qxF "$1"; then
		kill -s "$2" "${dir#/proc/}"
	fi
done
`

// Process is a command that was started in a container.
type Process struct {
	engine    engine
	api       *client.Client
	limit     *allowance
	container string
	name      string // for people
	user      string
	id        string // of the exec
	mark      string // NAME=value
	terminal  bool
	stream    client.HijackedResponse
	heard     heard
}

// Start starts a command in the container with this id, on the engine at host. Its errors are for people.
func Start(ctx context.Context, host, id string, c Command) (*Process, error) {
	p := &Process{
		engine:    engine{name: "the container engine", host: host, tlsFromEnv: strings.HasPrefix(host, "tcp://") && host == os.Getenv("DOCKER_HOST")},
		container: id, name: id[:min(len(id), 12)], mark: markVariable + "=" + rand.Text(), terminal: c.Terminal,
		limit: new(allowance),
	}
	begin, done := context.WithTimeout(ctx, askTimeout)
	defer done()
	var err error
	if p.api, err = p.engine.connect(begin, executing, p.limit); err != nil {
		return nil, errors.New(p.engine.explain("ask", err, askTimeout))
	}
	if err := p.start(begin, c); err != nil {
		p.api.Close()
		return nil, err
	}
	return p, nil
}

func (p *Process) start(ctx context.Context, c Command) error {
	found, err := p.api.ContainerInspect(ctx, p.container, client.ContainerInspectOptions{})
	if err != nil {
		return p.explain(err)
	}
	is := found.Container
	if n := strings.TrimPrefix(is.Name, "/"); n != "" {
		p.name = n
	}
	if err := enterable(is.State); err != nil {
		return fmt.Errorf("cannot run in container %q: %w", p.name, err)
	}
	p.user = c.User
	if p.user == "" && is.Config != nil {
		p.user = devcontainerUser(is.Config.Labels)
	}
	argv := []string{"sh", "-c", loginShell, "sh", c.Line}
	if c.Terminal && c.Rows > 0 && c.Cols > 0 {
		argv = append(argv, strconv.Itoa(int(c.Rows)), strconv.Itoa(int(c.Cols)))
	}
	options := client.ExecCreateOptions{
		User: p.user, Env: append(slices.Clone(c.Env), p.mark), Cmd: argv,
		AttachStdin: true, AttachStdout: true, AttachStderr: true, TTY: c.Terminal, DetachKeys: noDetachKeys,
	}
	made, err := p.api.ExecCreate(ctx, p.container, options)
	if err != nil {
		return p.explain(err)
	}
	p.id = made.ID
	// The command's own stream is as long as it likes to be.
	unlimited, err := p.engine.connect(ctx, executing, nil)
	if err != nil {
		return p.explain(err)
	}
	defer unlimited.Close()
	attached, err := unlimited.ExecAttach(ctx, p.id, client.ExecAttachOptions{TTY: c.Terminal})
	switch {
	case err != nil && p.user != "" && strings.Contains(err.Error(), "received 500"): // the library keeps no more of Podman's words
		return fmt.Errorf("cannot run in container %q: the engine does not start it; has the container a user %q?", p.name, p.user)
	case err != nil:
		return p.explain(err)
	}
	p.stream = attached.HijackedResponse
	return nil
}

// enterable says why nothing can be run in a container.
func enterable(s *container.State) error {
	switch {
	case s == nil:
		return errors.New("its engine does not tell its state")
	case s.Paused:
		return errors.New("it is paused (docker unpause, or podman unpause, wakes it)")
	case !s.Running:
		return fmt.Errorf("it is not running, its state is %q (docker start, or podman start, starts it)", string(s.Status))
	}
	return nil
}

// devcontainerUser is the user that a dev container's metadata names for people, "" if none does. Of several the last counts.
func devcontainerUser(labels map[string]string) string {
	var parts []struct{ RemoteUser string }
	if json.Unmarshal([]byte(labels["devcontainer.metadata"]), &parts) != nil {
		return "" // a label of somebody else's making
	}
	for _, part := range slices.Backward(parts) {
		if part.RemoteUser != "" {
			return part.RemoteUser
		}
	}
	return ""
}

// explain puts an engine's refusal into words.
func (p *Process) explain(err error) error {
	switch {
	case errdefs.IsNotFound(err):
		return fmt.Errorf("cannot run in container %q: there is no such container any more", p.name)
	case errdefs.IsPermissionDenied(err), errdefs.IsUnauthorized(err):
		return fmt.Errorf("cannot run in container %q: the engine refuses it: %s", p.name, inert(err.Error()))
	}
	return errors.New(p.engine.explain(fmt.Sprintf("run in container %q by", p.name), err, askTimeout))
}

// Write sends input.
func (p *Process) Write(b []byte) (int, error) { return p.stream.Conn.Write(b) }

// CloseWrite ends the input. A terminal's has no end: engines would take it for a wish to leave.
func (p *Process) CloseWrite() error {
	if p.terminal {
		return nil
	}
	return p.stream.CloseWrite()
}

// Copy copies what the command writes until it is done with that. In a terminal all of it goes to stdout. The error is for people.
func (p *Process) Copy(stdout, stderr io.Writer) error {
	stdout, stderr = io.MultiWriter(&p.heard, stdout), io.MultiWriter(&p.heard, stderr)
	var err error
	if p.terminal {
		_, err = io.Copy(stdout, p.stream.Reader)
	} else {
		_, err = stdcopy.StdCopy(stdout, stderr, p.stream.Reader)
	}
	if err != nil {
		return fmt.Errorf("the container engine has cut the command off: %s", inert(err.Error()))
	}
	return nil
}

// heard keeps the beginning of what was written, where engines say why they did not start a command.
type heard struct{ words []byte }

func (h *heard) Write(b []byte) (int, error) {
	const enough = 512
	h.words = append(h.words, b[:min(len(b), enough-len(h.words))]...)
	return len(b), nil
}

// Resize sets the size of the command's terminal. It waits for a terminal that is still being made, for 2 s at most, which is also how long it takes to
// fail when the command is over: call it beside Copy.
func (p *Process) Resize(ctx context.Context, rows, cols uint16) error {
	ctx, cancel := context.WithTimeout(ctx, sizeTimeout)
	defer cancel()
	for {
		_, err := p.api.ExecResize(ctx, p.id, client.ExecResizeOptions{Height: uint(rows), Width: uint(cols)})
		if err == nil {
			return nil
		}
		select {
		case <-time.After(askAgain):
		case <-ctx.Done():
			return fmt.Errorf("cannot set the size of the terminal in container %q: %w", p.name, err)
		}
	}
}

// Wait returns the exit code once the command has ended; call it after Copy.
func (p *Process) Wait(ctx context.Context) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, endTimeout)
	defer cancel()
	for {
		is, err := p.inspect(ctx)
		switch {
		case err != nil:
			return 0, fmt.Errorf("cannot tell how the command in container %q ended: %s", p.name, inert(err.Error()))
		case !is.Running:
			return is.ExitCode, p.neverRan(is)
		}
		select {
		case <-time.After(askAgain):
		case <-ctx.Done():
			return 0, fmt.Errorf("cannot tell how the command in container %q ended: it closed its output and goes on", p.name)
		}
	}
}

// execState is what an engine tells of a command.
type execState struct {
	Running  bool
	ExitCode int
	Pid      int
}

// inspect asks for the command's state. It goes past the client library, which does not understand Podman here: version 0.6.2 takes DetachKeys for base64,
// as Docker has it, where Podman 4.3 has the keys' names.
func (p *Process) inspect(ctx context.Context) (execState, error) {
	path := p.engine.base() + "/v" + p.api.ClientVersion() + "/exec/" + p.id + "/json"
	if !permits(executing, p.engine.base(), http.MethodGet, path) {
		return execState{}, fmt.Errorf("the engine gave the command an id that is none: %q", p.id)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+client.DummyHost+path, nil)
	if err != nil {
		return execState{}, err
	}
	dial := p.api.Dialer()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) }, DisableKeepAlives: true}
	p.limit.renew()
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return execState{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return execState{}, fmt.Errorf("the engine answered %s", resp.Status)
	}
	var is execState
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&is); err != nil {
		return execState{}, fmt.Errorf("the engine's answer cannot be read: %w", err)
	}
	return is, nil
}

// Exit codes of shells and engines for what could not be run.
const (
	exitNotExecutable = 126
	exitNotFound      = 127
)

// neverRan says why a command was not even started, which engines tell among its output only: it seems to have run and failed.
func (p *Process) neverRan(is execState) error {
	if is.Pid != 0 || is.ExitCode != exitNotFound && is.ExitCode != exitNotExecutable {
		return nil
	}
	switch {
	case bytes.Contains(p.heard.words, []byte("unable to find user")), bytes.Contains(p.heard.words, []byte("no matching entries in passwd file")):
		return fmt.Errorf("cannot run in container %q: it has no user %q", p.name, p.user)
	case bytes.Contains(p.heard.words, []byte("OCI runtime")):
		return fmt.Errorf("cannot run in container %q: it has no shell that can be run (there is no sh in its PATH)", p.name)
	}
	return nil
}

// Signal sends the command a signal. An error says that it may not have got it.
func (p *Process) Signal(ctx context.Context, sig syscall.Signal) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	is, err := p.inspect(ctx)
	if err != nil {
		return p.explain(err)
	}
	if !is.Running {
		return nil
	}
	if is.Pid > 0 && p.engine.local() && signalMarked(is.Pid, p.mark, sig) {
		return nil
	}
	return p.signalInside(ctx, sig)
}

// signalMarked signals a process of this machine if it bears the mark. Whether it does cannot be seen by every user, nor is every process that an engine
// counts one of this machine.
func signalMarked(pid int, mark string, sig syscall.Signal) bool {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	env, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
	if err != nil || !slices.ContainsFunc(bytes.Split(env, []byte{0}), func(v []byte) bool { return string(v) == mark }) {
		return false
	}
	return unix.PidfdSendSignal(fd, sig, nil, 0) == nil
}

// signalInside has the container's own shell signal the command.
func (p *Process) signalInside(ctx context.Context, sig syscall.Signal) error {
	name := strings.TrimPrefix(unix.SignalName(sig), "SIG")
	made, err := p.api.ExecCreate(ctx, p.container, client.ExecCreateOptions{User: p.user, Cmd: []string{"sh", "-c", signalling, "sh", p.mark, name}})
	if err != nil {
		return p.explain(err)
	}
	if _, err := p.api.ExecStart(ctx, made.ID, client.ExecStartOptions{Detach: true}); err != nil {
		return p.explain(err)
	}
	return nil
}

// Close lets go of the command, which goes on by itself.
func (p *Process) Close() error { return errors.Join(p.stream.Conn.Close(), p.api.Close()) }
