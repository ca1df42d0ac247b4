package main

import (
	"os"
	"testing"
)

// TestContainers is the measurement with little of everything. It fails on what the long one fails on; figures are printed and not judged.
func TestContainers(t *testing.T) {
	t.Setenv("DOCKER_HOST", "") // set by the measurement
	if err := run(t.Context(), quickly(), os.Stdout); err != nil {
		t.Fatal(err)
	}
}
