//go:build linux

package main

import (
	"context"
	"os"
	"path/filepath"

	"github.com/berthd/berth/internal/berthd"
)

// childVerb makes this binary act as berthd, so that `berth up` needs no second one. It is no verb for people.
const childVerb = "berthd"

// arguments returns those of a process with the given argv. Called by berthd's name, as the sessions of
// `berth up` do, this binary is that.
func arguments(argv []string) []string {
	if filepath.Base(argv[0]) == childVerb {
		return append([]string{childVerb}, argv[1:]...)
	}
	return argv[1:]
}

func runChild(args []string, out, errOut *os.File) int {
	return berthd.Main(context.Background(), args, os.Environ(), os.Stdin, out, errOut)
}
