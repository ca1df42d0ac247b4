// Command berthd-ptyhost owns the terminals of a workspace. It is `berthd ptyhost` in a program of its own that
// holds nothing else, and so takes a fraction of the memory. Whoever has it beside berthd has it used; berthd
// starts it by itself.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"

	"github.com/berthd/berth/ptyhost"
)

func main() {
	if len(os.Args) != 3 || os.Args[1] != "--socket" {
		fmt.Fprintln(os.Stderr, "berthd-ptyhost owns the terminals of a workspace. berthd starts it by itself, if it lies beside it.")
		os.Exit(64) // EX_USAGE
	}
	if err := ptyhost.RunProcess(context.Background(), os.Args[2], slog.New(slog.NewTextHandler(os.Stderr, nil))); err != nil {
		fmt.Fprintf(os.Stderr, "berthd-ptyhost: %v\n", err)
		os.Exit(1)
	}
}
