// Command berthd is the workspace agent: it proves which machine it is, joins the mesh, and serves
// terminals, SSH, ports and containers there. Its command line is in package internal/berthd.
package main

import (
	"context"
	"os"

	"github.com/berthd/berth/internal/berthd"
)

func main() {
	os.Exit(berthd.Main(context.Background(), os.Args[1:], os.Environ(), os.Stdin, os.Stdout, os.Stderr))
}
