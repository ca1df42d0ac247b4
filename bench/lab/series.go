package lab

import (
	"fmt"
	"io"
	"slices"
	"time"
)

// Series is what was measured of one way to do something.
type Series struct {
	Name   string
	Values []float64
}

// Add adds what one round measured.
func (s *Series) Add(v float64) { s.Values = append(s.Values, v) }

func (s *Series) sorted() []float64 { return slices.Sorted(slices.Values(s.Values)) }

// Median returns the value in the middle, or zero.
func (s *Series) Median() float64 {
	v := s.sorted()
	if len(v) == 0 {
		return 0
	}
	return v[len(v)/2]
}

// Quantile returns the value below which a part q of all lies, or zero.
func (s *Series) Quantile(q float64) float64 {
	v := s.sorted()
	if len(v) == 0 {
		return 0
	}
	return v[min(int(q*float64(len(v))), len(v)-1)]
}

// Row prints one line; peer, measured in the same rounds, may be nil. The ratio is the median of the rounds' ratios, as what else a
// machine does changes from round to round.
func Row(out io.Writer, what string, s *Series, unit string, peer *Series) {
	v := s.sorted()
	ratio := ""
	if peer != nil {
		var ratios Series
		for i := range s.Values {
			ratios.Add(s.Values[i] / peer.Values[i])
		}
		ratio = fmt.Sprintf("%.2f of %s", ratios.Median(), peer.Name)
	}
	fmt.Fprintf(out, "%s\t%s\t%.3g %s\t%.3g-%.3g\t%s\t\n", what, s.Name, s.Median(), unit, v[0], v[len(v)-1], ratio)
}

// Milliseconds is d as what rows show.
func Milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
