package screen

// intern numbers values that are too large or too rare to sit in a cell. Number 0 is the zero value.
type intern[T comparable] struct {
	values []T
	index  map[T]int
	free   []int
	limit  int
	frozen bool // when full, add nothing rather than free what mark cannot see
}

func (n *intern[T]) at(i int) T {
	if i == 0 || i >= len(n.values) {
		var zero T
		return zero
	}
	return n.values[i]
}

// add returns v's number. When all numbers are taken it frees those that mark does not call used on; if none is left it returns 0.
func (n *intern[T]) add(v T, mark func(used func(int))) int {
	var zero T
	if v == zero {
		return 0
	}
	if i, ok := n.index[v]; ok {
		return i
	}
	if n.index == nil {
		n.index = make(map[T]int)
		n.values = make([]T, 1)
	}
	if len(n.values) >= n.limit && len(n.free) == 0 && !n.frozen {
		n.collect(mark)
	}
	i := len(n.values)
	switch {
	case len(n.free) > 0:
		i = n.free[len(n.free)-1]
		n.free = n.free[:len(n.free)-1]
		n.values[i] = v
	case i < n.limit:
		n.values = append(n.values, v)
	default:
		return 0
	}
	n.index[v] = i
	return i
}

func (n *intern[T]) collect(mark func(used func(int))) {
	var zero T
	live := make([]bool, len(n.values))
	mark(func(i int) { live[i] = true })
	for i := 1; i < len(live); i++ {
		if !live[i] {
			delete(n.index, n.values[i])
			n.values[i] = zero
			n.free = append(n.free, i)
		}
	}
}
