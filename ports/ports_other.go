//go:build !linux

package ports

import (
	"context"
	"log/slog"
	"time"
)

// nothing is the source of systems whose sockets this package cannot read.
type nothing struct{}

func (nothing) String() string { return "nothing" }

func (nothing) sockets(context.Context) ([]socket, error) { return nil, nil }

func bestSource(*slog.Logger) source { return nothing{} }

type owners struct{}

func (owners) resolve(context.Context, []socket) {}
func (owners) pid(s socket) int                  { return s.pid }
func (owners) user(uint32) string                { return "" }
func (owners) process(int) process               { return process{} }

type process struct {
	name, command, helper string
	started               *time.Time
}
