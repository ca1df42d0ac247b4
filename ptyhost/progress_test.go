package ptyhost

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestLastToLeaveAreRemembered: a viewer whose tries to come back get nowhere, each an attachment that leaves, still goes on where it was.
func TestLastToLeaveAreRemembered(t *testing.T) {
	s := &session{}
	var want []string
	for i := range 5 * maxLeft {
		name := fmt.Sprintf("viewer %03d", i)
		s.remember(&viewer{session: s, name: name})
		want = append(want, name)
	}
	if diff := cmp.Diff(want[len(want)-maxLeft:], slices.Sorted(maps.Keys(s.left))); diff != "" {
		t.Errorf("remembered (-want +got):\n%s", diff)
	}
}
