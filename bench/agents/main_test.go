package main

import (
	"os"
	"testing"
	"time"
)

// TestAgents is the measurement with fewer agents and less time. It fails on what the long one fails on;
// figures are printed and not judged.
func TestAgents(t *testing.T) {
	for name, s := range map[string]settings{
		"berthd": {steady: 15 * time.Second},
		"stock":  {steady: time.Second, stock: true},
	} {
		t.Run(name, func(t *testing.T) {
			s.agents, s.down, s.within = 200, time.Second, time.Minute
			s.metadata, s.logs = 3*time.Second, 2*time.Second
			if err := run(t.Context(), s, os.Stdout); err != nil {
				t.Fatal(err)
			}
		})
	}
}
