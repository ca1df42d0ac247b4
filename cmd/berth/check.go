//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/crypto/ssh"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/wire"
)

const (
	// checkTimeout bounds the whole walk; it takes a few seconds on a slow machine.
	checkTimeout = 60 * time.Second
	// stageTimeout bounds one stage, so that one that hangs does not take the others' time.
	stageTimeout = 15 * time.Second
	// pollInterval is how often something is asked for that appears by itself.
	pollInterval = 50 * time.Millisecond
	// checkPayload is how much goes through SSH both ways: enough to fill every window on the way.
	checkPayload = 1 << 20
)

// stage is one line of `berth up --check`. Its function returns a remark for the line.
type stage struct {
	name string
	run  func(ctx context.Context) (remark string, err error)
}

// bounded runs the stage within its time.
func (s stage) bounded(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, stageTimeout, fmt.Errorf("it took longer than %v", stageTimeout))
	defer cancel()
	remark, err := s.run(ctx)
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	return remark, err
}

// walk is one check of a stack: the main job, as a person does it.
type walk struct {
	stack *stack
	mesh  *mesh
}

// check walks the main job once and tells of each stage. Its error is silent: the lines have said it.
func (p *program) check(ctx context.Context, place place) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, checkTimeout, fmt.Errorf("the check took longer than %v", checkTimeout))
	defer cancel()
	s, err := startStack(ctx, p.log(), place, ownHome)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	w := &walk{stack: s}
	defer func() {
		if w.mesh != nil {
			w.mesh.Close()
		}
	}()
	held := true
	for _, stage := range []stage{
		{"identity", func(ctx context.Context) (string, error) { return w.step(ctx, stepIdentity) }},
		{"exchange", func(ctx context.Context) (string, error) { return w.step(ctx, stepExchange) }},
		{"tailnet", w.tailnet},
		{"pty", w.pty},
		{"ssh", w.ssh},
		{"ports", w.ports},
		{"containers", w.containers},
		{"logs", w.logs},
		{"app-status", w.appStatus},
	} {
		start := time.Now()
		remark, err := stage.bounded(ctx)
		if errors.Is(ctx.Err(), context.Canceled) {
			return &exitError{exitInterrupted, nil}
		}
		word := "ok"
		if err != nil {
			held, word, remark = false, "FAIL", err.Error()
		}
		fmt.Fprintf(p.out, "%-4s  %-10s  %5d ms  %s\n", word, stage.name, time.Since(start).Milliseconds(), clean(remark))
	}
	if held {
		return nil
	}
	p.showLog(s)
	return &exitError{exitFailed, nil}
}

// step waits until the agent reports a step.
func (w *walk) step(ctx context.Context, name string) (string, error) {
	for {
		e, err := w.stack.next(ctx)
		switch {
		case err != nil:
			return "", err
		case e.Step == stepTrouble:
			return "", fmt.Errorf("%s; %s", e.Cause, e.Fix)
		case e.Step == name:
			return e.Detail, nil
		}
	}
}

// errNoMesh stands for a stage that could not begin.
var errNoMesh = errors.New("the agent was not reached over the tailnet")

// tailnet joins and waits until the agent has announced that it is ready.
func (w *walk) tailnet(ctx context.Context) (string, error) {
	if _, err := w.step(ctx, stepTailnet); err != nil {
		return "", err
	}
	m, way, err := w.stack.join(ctx)
	if err != nil {
		return "", err
	}
	w.mesh = m
	return way, nil
}

// pty opens a terminal, runs something in it, leaves it, takes it up again and finds the screen as it was.
func (w *walk) pty(ctx context.Context) (string, error) {
	if w.mesh == nil {
		return "", errNoMesh
	}
	id := sessionInit(localAgent, nonce(), "").ID
	for i, typed := range []string{"echo berth-$((6*7))\r", ""} {
		conn, err := w.mesh.dial(ctx, wire.PortPTY)
		if err != nil {
			return "", err
		}
		err = typeAndSee(ctx, conn, id, typed, "berth-42")
		if i == 1 {
			json.NewEncoder(conn).Encode(wire.PTYRequest{Data: "exit\r"})
		}
		conn.Close()
		if err != nil {
			return "", err
		}
	}
	return "left and taken up again", nil
}

// typeAndSee attaches to a terminal, types, and reads until it has seen the text.
func typeAndSee(ctx context.Context, conn net.Conn, id uuid.UUID, typed, see string) error {
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err := wire.WritePTYInit(conn, wire.PTYInit{ID: id, Height: 24, Width: 80}); err != nil {
		return err
	}
	if typed != "" {
		if err := json.NewEncoder(conn).Encode(wire.PTYRequest{Data: typed}); err != nil {
			return err
		}
	}
	var screen bytes.Buffer
	buf := make([]byte, 4<<10)
	for !bytes.Contains(screen.Bytes(), []byte(see)) {
		n, err := conn.Read(buf)
		screen.Write(buf[:n])
		if err != nil {
			return fmt.Errorf("cannot see %q on the terminal: %w; it shows %q", see, err, screen.String())
		}
	}
	return nil
}

// ssh sends data through a command and back, and checks both the data and the exit code.
func (w *walk) ssh(ctx context.Context) (string, error) {
	data := make([]byte, checkPayload)
	rand.Read(data)
	var out bytes.Buffer
	err := w.exec(ctx, "cat; exit 7", bytes.NewReader(data), &out)
	var exit *ssh.ExitError
	switch {
	case !errors.As(err, &exit):
		return "", fmt.Errorf("the command should have exited with 7, but: %v", err)
	case exit.ExitStatus() != 7:
		return "", fmt.Errorf("the command exited with %d instead of 7", exit.ExitStatus())
	case !bytes.Equal(out.Bytes(), data):
		want, got := sha256.Sum256(data), sha256.Sum256(out.Bytes())
		return "", fmt.Errorf("%d bytes came back (sha256 %s) of %d sent (%s)", out.Len(), hex.EncodeToString(got[:8]), len(data), hex.EncodeToString(want[:8]))
	}
	return "1 MiB there and back, exit code 7", nil
}

// exec runs a command over SSH, with its standard error in the error.
func (w *walk) exec(ctx context.Context, command string, in io.Reader, out io.Writer) error {
	if w.mesh == nil {
		return errNoMesh
	}
	c, err := dialSSH(ctx, w.mesh)
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	session, err := c.NewSession()
	if err != nil {
		return err
	}
	defer session.Close()
	var complaint bytes.Buffer
	session.Stdin, session.Stdout, session.Stderr = in, out, &complaint
	if err := session.Run(command); err != nil {
		if complaint.Len() > 0 {
			return fmt.Errorf("%w: %s", err, strings.TrimSpace(complaint.String()))
		}
		return err
	}
	return nil
}

// ports listens on a port of this machine, which is the agent's too, and waits for it to be listed.
func (w *walk) ports(ctx context.Context) (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	want := uint16(l.Addr().(*net.TCPAddr).Port)
	err = poll(ctx, fmt.Sprintf("port %d is not listed", want), func() (bool, error) {
		found, err := w.stack.server.ListeningPorts(ctx, w.stack.agent.ID, false)
		return slices.ContainsFunc(found.Ports, func(p wire.ListeningPort) bool { return p.Port == want }), err
	})
	return fmt.Sprintf("port %d found", want), err
}

// containers lists them, which holds too where there is no engine.
func (w *walk) containers(ctx context.Context) (string, error) {
	found, err := w.stack.server.Containers(ctx, w.stack.agent.ID)
	if err != nil {
		return "", client.Explain(err)
	}
	if len(found.Engines) == 0 {
		return "no container engine", nil
	}
	return fmt.Sprintf("%d listed by %s", len(found.Containers), strings.Join(found.Engines, ", ")), nil
}

// logs waits for the last line of the start script.
func (w *walk) logs(ctx context.Context) (string, error) {
	count := 0
	for entry, err := range w.stack.server.FollowLogs(ctx, w.stack.agent.ID, 0, true) {
		if err != nil {
			return "", client.Explain(err)
		}
		if count++; strings.Contains(entry.Output, startLine) {
			return fmt.Sprintf("%d lines, the start script's last among them", count), nil
		}
	}
	return "", errors.New("the log ended before the start script's last line")
}

// appStatus reports a status from within the workspace, as a program there does, and waits for the
// server to show it.
func (w *walk) appStatus(ctx context.Context) (string, error) {
	binary, err := os.Executable()
	if err != nil {
		return "", err
	}
	message := "checking " + nonce()
	report := []string{binary, childVerb, "report", "--app", localApp, "--state", "working", "--message", message}
	for i, word := range report {
		report[i] = shellQuote(word)
	}
	if err := w.exec(ctx, strings.Join(report, " "), nil, io.Discard); err != nil {
		return "", fmt.Errorf("cannot report from the workspace: %w", err)
	}
	err = poll(ctx, "the status does not appear", func() (bool, error) {
		a, err := w.stack.server.Agent(ctx, w.stack.agent.ID)
		return showsStatus(a, message), err
	})
	return "reported in the workspace, seen at the server", err
}

func showsStatus(a wire.Agent, message string) bool {
	for _, app := range a.Apps {
		if slices.ContainsFunc(app.Statuses, func(s wire.AppStatus) bool { return app.Slug == localApp && s.Message == message }) {
			return true
		}
	}
	return false
}

// poll asks until the answer is yes. Errors may pass, so the last one is told only when ctx ends.
func poll(ctx context.Context, missing string, ask func() (bool, error)) error {
	last := errors.New(missing)
	for {
		ok, err := ask()
		if ok && err == nil {
			return nil
		}
		if err != nil && ctx.Err() == nil {
			last = client.Explain(err)
		}
		select {
		case <-ctx.Done():
			return last
		case <-time.After(pollInterval):
		}
	}
}
