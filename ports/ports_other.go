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

func (nothing) sockets(_ context.Context, _ *namespace, all []socket) ([]socket, error) {
	return all, nil
}

type procNet struct{ nothing }

func bestSource(*slog.Logger) source { return nothing{} }

type namespace struct{ id int64 }

type count struct{}

type spaces struct {
	own   namespace
	full  bool
	count count
}

// peek is never called: there are no others.
func (l *Lister) peek(_ context.Context, _ *namespace, _ bool, _ time.Time, all []socket) []socket {
	return all
}

func (f *spaces) ours() *namespace            { return &f.own }
func (*spaces) others(time.Time) []*namespace { return nil }
func (*spaces) container(int64) string        { return "" }
func (*spaces) foreign(id string) string      { return id }
func (*spaces) release()                      {}

type owners struct{ lost bool }

func (*owners) resolve(context.Context, []socket, bool, count, time.Time) bool { return false }
func (*owners) pid(int) int                                                    { return 0 }
func (*owners) user(uint32) string                                             { return "" }
func (*owners) process(int) *process                                           { return new(process) }
