// Package testhome keeps the tests that start shells away from the profile of whoever runs them.
//
// A package whose tests start login shells calls [Main] from its TestMain; one whose TestMain has
// more to do calls [Use].
package testhome

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"
)

// Main runs the tests of m in a home directory of their own and exits. A leaked goroutine is a failure.
func Main(m *testing.M) {
	remove := Use()
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		remove()
		os.Exit(code)
	}))
}

// Use makes a new, empty home directory this process's and its children's. Nothing that a person
// keeps in .profile or .bashrc can then change what a test sees, nor how long it takes. It panics
// where no directory can be made.
func Use() (remove func()) {
	dir, err := os.MkdirTemp("", "home")
	if err != nil {
		panic(err)
	}
	if err := os.Setenv("HOME", dir); err != nil {
		panic(err)
	}
	return func() {
		if err := os.RemoveAll(dir); err != nil {
			fmt.Fprintf(os.Stderr, "a test left %s behind: %v\n", dir, err)
		}
	}
}
