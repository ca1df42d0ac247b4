//go:build !linux

package main

import (
	"errors"
	"os"

	"github.com/spf13/cobra"
)

// childVerb has no meaning here: there is no berthd for other systems.
const childVerb = "berthd"

func arguments(argv []string) []string { return argv[1:] }

func runChild(_ []string, _, errOut *os.File) int {
	return finish(errNoAgent, errOut)
}

var errNoAgent = errors.New("cannot run an agent: berthd is for Linux only (docs/platforms.md)")

// upCommand says why there is no trying it here.
func (p *program) upCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "up",
		Short:             "Run everything on this machine, to try it (Linux only)",
		Example:           "  berth up",
		Args:              cobra.ArbitraryArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(*cobra.Command, []string) error { return errNoAgent },
	}
}
