package ptyhost

import (
	"context"
	"errors"
)

// Client reaches the host behind one socket. It holds no connection: every attachment and call dials its own, so it is safe for concurrent use
// and survives the host being replaced.
type Client struct {
	socket string
}

// Dial returns a client of the host that listens on socket. It does not connect yet.
func Dial(socket string) *Client { return &Client{socket: socket} }

// Attach attaches to a session, creating it first if asked to. ctx covers the handshake only.
func (c *Client) Attach(ctx context.Context, req AttachRequest) (*Attachment, error) {
	return nil, errors.New("cannot attach: not built yet")
}

// List returns the host's sessions, oldest first.
func (c *Client) List(ctx context.Context) ([]SessionInfo, error) {
	return nil, errors.New("cannot list: not built yet")
}

// Kill sends a signal ("TERM", "KILL", "HUP"...) to the foreground program of a session; "" hangs the session up and ends it.
func (c *Client) Kill(ctx context.Context, id, signal string) error {
	return errors.New("cannot kill: not built yet")
}

// Shutdown ends every session and then the host. It returns when the host has let go of its socket.
func (c *Client) Shutdown(ctx context.Context) error {
	return errors.New("cannot shut down: not built yet")
}

// Ensure finds the living host behind socket, or starts one by calling start and waits until it answers.
func Ensure(ctx context.Context, socket string, start func() error) (*Client, error) {
	return nil, errors.New("cannot ensure: not built yet")
}

// Attachment is one viewer of a session: reads give a snapshot of the screen and then live output, writes are typed into the terminal.
// Read, Write and the other methods may be called concurrently with each other.
type Attachment struct{}

// Info describes the session as it was at the attach.
func (a *Attachment) Info() SessionInfo { return SessionInfo{} }

// Created reports whether this attach started the session.
func (a *Attachment) Created() bool { return false }

// Read reads the snapshot and then output. It returns io.EOF once the program has ended and every byte it wrote was read.
func (a *Attachment) Read(p []byte) (int, error) { return 0, errors.New("not built yet") }

// Write types p into the terminal. It blocks while the program does not read and the terminal's input buffer is full.
func (a *Attachment) Write(p []byte) (int, error) { return 0, errors.New("not built yet") }

// Resize says that the viewer's window has a new size.
func (a *Attachment) Resize(size Size) error { return errors.New("not built yet") }

// Signal sends a signal, named as in SSH ("INT", "TERM", "KILL"...), to the session's foreground process group.
func (a *Attachment) Signal(name string) error { return errors.New("not built yet") }

// Wait waits for the program to end. It returns [ErrHostGone] if the host went away first and net.ErrClosed after Close.
// The output must be read meanwhile: a program whose Raw viewer does not read never ends.
func (a *Attachment) Wait() (ExitStatus, error) { return ExitStatus{}, errors.New("not built yet") }

// Close detaches. The session goes on, unless it was created with KillOnDetach and this was its last viewer.
func (a *Attachment) Close() error { return nil }
