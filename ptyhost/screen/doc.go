// Package screen models a terminal's screen, so that a viewer who comes late can be shown exactly what one who stayed sees.
//
// [Terminal.Write] feeds it a program's output; [Terminal.Snapshot] renders what is there as the shortest stream of VT bytes that brings a fresh
// terminal into the same state.
package screen

// Terminal is the model of one terminal. It is not safe for concurrent use.
type Terminal struct{}
