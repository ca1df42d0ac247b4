// Package build tells which commit a program was made from: [Commit] and [Date].
package build

import "runtime/debug"

// The release command sets these, by -ldflags "-X github.com/berthd/berth/internal/build.commit=…".
var commit, date string

// Commit returns the commit's hash, or "unknown" outside of a repository.
func Commit() string { return either(commit, "vcs.revision") }

// Date returns when the commit was made, as RFC 3339 has it, or "unknown".
func Date() string { return either(date, "vcs.time") }

// either returns what the release set, or what the Go tool noted.
func either(set, key string) string {
	if set != "" {
		return set
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == key {
				return s.Value
			}
		}
	}
	return "unknown"
}
