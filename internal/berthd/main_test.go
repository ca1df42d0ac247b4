package berthd

import (
	"context"
	"os"
	"testing"

	"go.uber.org/goleak"
)

// envSelf makes the test binary be berthd, so that tests run it as a process of its own.
const envSelf = "BERTHD_TEST_SELF"

func TestMain(m *testing.M) {
	if os.Getenv(envSelf) != "" {
		os.Exit(Main(context.Background(), os.Args[1:], os.Environ(), os.Stdin, os.Stdout, os.Stderr))
	}
	goleak.VerifyTestMain(m)
}
