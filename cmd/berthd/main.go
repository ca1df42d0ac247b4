// Command berthd is the workspace agent.
package main

import (
	"context"
	"os"

	"github.com/berthd/berth/internal/berthd"
)

func main() {
	os.Exit(berthd.Main(context.Background(), os.Args[1:], os.Environ(), os.Stdin, os.Stdout, os.Stderr))
}
