package berthd

import (
	"fmt"
	"runtime"

	"github.com/berthd/berth/internal/build"
	"github.com/berthd/berth/wire"
)

// version is set at build time with -ldflags "-X github.com/berthd/berth/internal/berthd.version=v1.2.3".
// It must be a semantic version with a leading "v": servers refuse others.
var version = "v0.1.0-devel"

// version prints which berthd this is. Start scripts made for the stock agent look for the word
// Coder in the first line, to tell a binary from a login page that was saved as one.
func (p process) version() {
	fmt.Fprintf(p.stdout, "berthd %s (Coder agent API v%s)\n", version, wire.CurrentVersion)
	fmt.Fprintf(p.stdout, "commit %s of %s, %s, %s/%s\n", build.Commit(), build.Date(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
