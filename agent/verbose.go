package agent

import (
	"context"
	"log/slog"
	"sync/atomic"
)

// verbose is a log handler that lets everything through while on is set.
type verbose struct {
	slog.Handler
	on *atomic.Bool
}

// Enabled implements slog.Handler.
func (v verbose) Enabled(ctx context.Context, level slog.Level) bool {
	return v.on.Load() || v.Handler.Enabled(ctx, level)
}

// WithAttrs implements slog.Handler.
func (v verbose) WithAttrs(attrs []slog.Attr) slog.Handler {
	return verbose{v.Handler.WithAttrs(attrs), v.on}
}

// WithGroup implements slog.Handler.
func (v verbose) WithGroup(name string) slog.Handler { return verbose{v.Handler.WithGroup(name), v.on} }
