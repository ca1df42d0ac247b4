// Command berthd-ptyhost owns the terminals of a workspace, or holds one of its scripts. It is `berthd ptyhost` and
// `berthd hold-script` in a program of its own that has nothing else, and so takes a fraction of the memory. Whoever has
// it beside berthd has it used; berthd starts it by itself.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"

	"github.com/berthd/berth/ptyhost"
	"github.com/berthd/berth/scripts/hold"
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == "--script" {
		exit(hold.RunProcess())
	}
	if len(os.Args) != 3 || os.Args[1] != "--socket" {
		fmt.Fprintln(os.Stderr, "berthd-ptyhost owns the terminals of a workspace and holds its scripts. berthd starts it by itself, if it lies beside it.")
		os.Exit(64) // EX_USAGE
	}
	exit(ptyhost.RunProcess(context.Background(), os.Args[2], slog.New(slog.NewTextHandler(os.Stderr, nil))))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintf(os.Stderr, "berthd-ptyhost: %v\n", err)
		os.Exit(1)
	}
	os.Exit(0)
}
