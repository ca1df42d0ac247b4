package agent

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"storj.io/drpc/drpcconn"
	"storj.io/drpc/drpcerr"
	"storj.io/drpc/drpcmux"
	"storj.io/drpc/drpcserver"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// inBubble returns a client of a service over real dRPC frames on one pipe, for calls that follow each
// other. Unlike a whole link it keeps to the time of the bubble it is made in.
func inBubble(t *testing.T, service agentpb.DRPCAgentServer) agentpb.DRPCAgentClient {
	t.Helper()
	mux := drpcmux.New()
	if err := agentpb.DRPCRegisterAgent(mux, service); err != nil {
		t.Fatal(err)
	}
	near, far := net.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = drpcserver.New(mux).ServeOne(ctx, far)
	}()
	conn := drpcconn.New(near)
	t.Cleanup(func() { conn.Close(); cancel(); <-done })
	return agentpb.NewDRPCAgentClient(conn)
}

// scripted answers each call of one kind as it was told to.
type scripted struct {
	agentpb.DRPCAgentUnimplementedServer
	banners []any // an error, or what is announced
	stats   func() (*durationpb.Duration, error)
}

func (s *scripted) GetAnnouncementBanners(context.Context, *agentpb.GetAnnouncementBannersRequest) (*agentpb.GetAnnouncementBannersResponse, error) {
	next := s.banners[0]
	s.banners = s.banners[1:]
	if err, ok := next.(error); ok {
		return nil, err
	}
	return &agentpb.GetAnnouncementBannersResponse{AnnouncementBanners: []*agentpb.BannerConfig{
		{Message: "not enabled"}, {Enabled: true, Message: next.(string)},
	}}, nil
}

func (s *scripted) UpdateStats(context.Context, *agentpb.UpdateStatsRequest) (*agentpb.UpdateStatsResponse, error) {
	interval, err := s.stats()
	return &agentpb.UpdateStatsResponse{ReportInterval: interval}, err
}

// TestBannersAreRefreshed: every two minutes; what cannot be heard anew stays, and ends nothing.
func TestBannersAreRefreshed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		away := errors.New("database is away")
		api := inBubble(t, &scripted{banners: []any{away, "one", away, "two"}})
		a := &agent{log: slog.New(slog.DiscardHandler)}
		ctx, cancel := context.WithTimeout(t.Context(), 7*time.Minute)
		defer cancel()
		done := make(chan error, 1)
		go func() { done <- a.refreshBanners(ctx, api, wire.CurrentVersion) }()
		time.Sleep(time.Minute)
		for i, want := range [][]string{nil, {"one"}, {"one"}, {"two"}} {
			var got []string
			if b := a.banners.Load(); b != nil {
				got = *b
			}
			if !slices.Equal(got, want) {
				t.Errorf("after %d minutes: %q, want %q", 2*i+1, got, want)
			}
			if i < 3 {
				time.Sleep(bannerInterval)
			}
		}
		if err := <-done; !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

func TestStatsInterval(t *testing.T) {
	tests := map[string]struct {
		answer *durationpb.Duration
		want   time.Duration
	}{
		"as told":  {durationpb.New(30 * time.Second), 30 * time.Second},
		"none":     {nil, defaultStatsInterval},
		"zero":     {durationpb.New(0), defaultStatsInterval},
		"negative": {durationpb.New(-time.Second), defaultStatsInterval},
		"absurd":   {durationpb.New(1), minStatsInterval},
		"forever":  {&durationpb.Duration{Seconds: 1 << 62}, 1<<63 - 1},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			api := inBubble(t, &scripted{stats: func() (*durationpb.Duration, error) { return tt.answer, nil }})
			if got, err := sendStats(t.Context(), api, nil); err != nil || got != tt.want {
				t.Errorf("%v, %v, want %v", got, err, tt.want)
			}
		})
	}
}

// TestInsist: a call that fails is made again, less and less often, until it succeeds or there is no use.
func TestInsist(t *testing.T) {
	tests := map[string]struct {
		end  error // what follows the failures
		want bool
	}{
		"success": {nil, true},
		"absent":  {drpcerr.WithCode(errors.New("Unimplemented"), wire.CodeUnimplemented), false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var calls []time.Time
				api := inBubble(t, &scripted{stats: func() (*durationpb.Duration, error) {
					if calls = append(calls, time.Now()); len(calls) <= 20 {
						return nil, errors.New("database is away")
					}
					return nil, tt.end
				}})
				a := &agent{log: slog.New(slog.DiscardHandler)}
				got := a.insist(t.Context(), "ask", func(ctx context.Context) error {
					_, err := sendStats(ctx, api, nil)
					return err
				})
				if got != tt.want || len(calls) != 21 {
					t.Errorf("insist = %v after %d calls", got, len(calls))
				}
				for i := range calls[1:] {
					if gap := calls[i+1].Sub(calls[i]); gap <= 0 || gap > 11*time.Second {
						t.Errorf("call %d came %v after the one before", i+1, gap)
					}
				}
			})
		})
	}
}

// TestInsistGivesUpOnSilence: a call without an answer has its limit, and another follows.
func TestInsistGivesUpOnSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &agent{log: slog.New(slog.DiscardHandler)}
		calls := 0
		began := time.Now()
		got := a.insist(t.Context(), "ask", func(ctx context.Context) error {
			if calls++; calls > 1 {
				return nil
			}
			<-ctx.Done()
			return ctx.Err()
		})
		if took := time.Since(began); !got || calls != 2 || took < callTimeout || took > callTimeout+time.Second {
			t.Errorf("insist = %v after %d calls and %v", got, calls, took)
		}
	})
}
