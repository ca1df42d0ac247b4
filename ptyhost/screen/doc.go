// Package screen models a terminal's screen, so that a viewer who comes late can be shown exactly what one who stayed sees.
//
// [Terminal.Write] feeds it a program's output; [Terminal.Snapshot] renders what is there as a stream of VT bytes that brings another terminal into
// the same state. See docs/terminals.md for what is modelled and how exact it is.
package screen
