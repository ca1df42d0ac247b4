package client

import (
	"testing"
	"time"
)

func TestBackoff(t *testing.T) {
	b := NewPace().quick
	for _, ceiling := range []time.Duration{100, 200, 400, 800, 1600, 3200, 6400, 10000, 10000} {
		ceiling *= time.Millisecond
		if d := b.next(); d <= 0 || d > ceiling {
			t.Errorf("a delay of %v with a ceiling of %v", d, ceiling)
		}
	}
	b.reset()
	if d := b.next(); d > b.min {
		t.Errorf("a delay of %v after a reset", d)
	}
}

// TestPace: a machine that boots before its build is done is in soon after it is; who has to wait for a
// person is not in a hurry.
func TestPace(t *testing.T) {
	for kind, most := range map[Kind]time.Duration{
		KindUnreachable: 10 * time.Second,
		KindEarly:       10 * time.Second,
		KindRefused:     20 * time.Second,
		KindUnknown:     20 * time.Second,
		KindOften:       time.Minute,
		KindAmbiguous:   2 * time.Minute,
	} {
		p := NewPace()
		for range 20 {
			if wait := p.After(&Problem{Kind: kind}); wait <= 0 || wait > most+time.Millisecond {
				t.Errorf("%s: waits %v, want at most %v", kind, wait, most)
			}
		}
		if got := p.of(kind).ceiling; got != most {
			t.Errorf("%s: waits up to %v, want %v", kind, got, most)
		}
	}
	p := NewPace()
	p.Known = true
	if p.of(KindAmbiguous) != p.refused {
		t.Error("a machine that was linked before waits long for its new build")
	}
}

// A thousand agents that failed as often as each other come back all over the time they have, no tenth
// of it with much more than its share.
func TestBackoffSpreads(t *testing.T) {
	var tenths [10]int
	for range 1000 {
		b := NewPace().quick
		var d time.Duration
		for range 8 {
			d = b.next()
		}
		tenths[min(9, int(d*10/b.max))]++
	}
	for i, n := range tenths {
		// 100 expected; 50 away is more than five standard deviations.
		if n < 50 || n > 150 {
			t.Errorf("tenth %d of the time has %d of 1000 agents: %v", i, n, tenths)
		}
	}
}
