// Package ptyhost owns every terminal of a workspace and its screen, in a process of its own, and lets clients attach, leave and come back.
//
// The process that serves people calls [Ensure] once, which finds the living host or starts one, and then [Client.Attach] for each terminal.
// The host itself is [RunProcess]: it listens on a Unix socket, owns every PTY, its child and its [screen.Terminal], and ends only when told to.
//
// An attachment is a snapshot of the screen, then live output, taken under one lock. A viewer that keeps up gets the program's bytes exactly;
// one that falls behind is caught up by a fresh snapshot instead of a backlog. See docs/terminals.md.
package ptyhost
