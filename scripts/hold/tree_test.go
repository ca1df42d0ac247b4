package hold

import "testing"

func TestParseStat(t *testing.T) {
	for stat, want := range map[string]process{
		"42 (a (b) c) S 1 40 39 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 9876 1 2": {pid: 42, parent: 1, session: 39, started: "9876"},
		"42 (dead) Z 1 40 39 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 9876 1 2":    {},
		"42 (short) S 1 40 39": {},
		"42 S 1":               {},
		"x (y) S 1 40 39 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 9876 1 2": {},
		"": {},
	} {
		if got, ok := parseStat(stat); got != want || ok != (want.pid > 0) {
			t.Errorf("%q: %+v, %v", stat, got, ok)
		}
	}
}
