package berthd

import (
	"context"
	"fmt"
	"os"
	"testing"

	"github.com/berthd/berth/internal/testhome"
)

// envSelf makes the test binary be berthd, so that tests run it as a process of its own.
const envSelf = "BERTHD_TEST_SELF"

func TestMain(m *testing.M) {
	if os.Getenv(envSelf) != "" {
		os.Exit(Main(context.Background(), os.Args[1:], os.Environ(), os.Stdin, os.Stdout, os.Stderr))
	}
	if cloud := os.Getenv(envFakeCloud); cloud != "" {
		if err := fakeCloud(cloud); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if host := os.Getenv(envClinic); host != "" {
		if err := serveClinic(host); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	testhome.Main(m)
}
