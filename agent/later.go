package agent

import "context"

// later is a value that comes once.
type later[T any] struct {
	come  chan struct{}
	value T
}

func newLater[T any]() *later[T] { return &later[T]{come: make(chan struct{})} }

// set gives the value. It is called once.
func (l *later[T]) set(v T) {
	l.value = v
	close(l.come)
}

// now returns the value if it has come already.
func (l *later[T]) now() (T, bool) {
	select {
	case <-l.come:
		return l.value, true
	default:
		var none T
		return none, false
	}
}

// wait returns the value when it has come; false if ctx is done first.
func (l *later[T]) wait(ctx context.Context) (T, bool) {
	select {
	case <-l.come:
		return l.value, true
	case <-ctx.Done():
		var none T
		return none, false
	}
}
