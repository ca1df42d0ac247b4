package screen

import (
	"fmt"
	"runtime"
	"testing"
)

// BenchmarkMemory reports what a terminal holds: new, and with a full scrollback of short lines.
func BenchmarkMemory(b *testing.B) {
	for _, lines := range []int{0, 11_000} {
		b.Run(fmt.Sprintf("lines=%d", lines), func(b *testing.B) {
			var before, after runtime.MemStats
			for b.Loop() {
				runtime.GC()
				runtime.ReadMemStats(&before)
				t := New(Config{})
				for i := range lines {
					fmt.Fprintf(t, "%d line\r\n", i)
				}
				runtime.GC()
				runtime.ReadMemStats(&after)
				runtime.KeepAlive(t)
			}
			b.ReportMetric(float64(after.HeapAlloc)-float64(before.HeapAlloc), "B/terminal")
		})
	}
}
