package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"os"
	"strings"
	"sync"
)

// debugServer shows the agent from inside to this machine.
type debugServer struct {
	what, address string
	handler       http.Handler
	// anywhere tells that it may listen on addresses that others reach.
	anywhere bool
	log      *slog.Logger
}

// debugServers returns those that have an address.
func debugServers(d Debug, a *api, log *slog.Logger) []*debugServer {
	debug := http.NewServeMux()
	a.routeDebug(debug)
	debug.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "404 not found", http.StatusNotFound) })
	profiles := http.NewServeMux()
	profiles.HandleFunc("/debug/pprof/", pprof.Index)
	profiles.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	profiles.HandleFunc("/debug/pprof/profile", pprof.Profile)
	profiles.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	profiles.HandleFunc("/debug/pprof/trace", pprof.Trace)
	var servers []*debugServer
	for _, s := range []*debugServer{
		{what: "pprof", address: d.Pprof, handler: profiles},
		{what: "prometheus", address: d.Prometheus, handler: http.HandlerFunc(a.prometheus), anywhere: true},
		{what: "debug", address: d.Status, handler: debug},
	} {
		if s.address != "" {
			s.log = log.With("part", s.what, "address", s.address)
			servers = append(servers, s)
		}
	}
	return servers
}

// runDebug serves the debug addresses until ctx is done. One that cannot be had costs nothing but
// itself.
func (a *agent) runDebug(ctx context.Context) error {
	var all sync.WaitGroup
	defer all.Wait()
	for _, s := range a.debug {
		l, err := s.listen(ctx)
		if err != nil {
			s.log.Warn("cannot serve this address", "error", err)
			continue
		}
		all.Go(func() { s.serve(ctx, l) })
	}
	<-ctx.Done()
	return nil
}

// listen listens on a TCP address, or with "unix:" before it on a socket for this user alone.
func (s *debugServer) listen(ctx context.Context) (net.Listener, error) {
	if path, ok := strings.CutPrefix(s.address, "unix:"); ok {
		if info, err := os.Lstat(path); err == nil && info.Mode()&os.ModeSocket == 0 {
			return nil, errors.New("there is a file already, which is no socket")
		}
		return listenPrivate(nil, path) // whoever starts berthd looks into it, not the workspace's user
	}
	if !s.anywhere && !loopback(s.address) {
		return nil, errors.New("it would be open to others: use an address on 127.0.0.1 or [::1], or unix:PATH")
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", s.address)
	if err != nil {
		return nil, fmt.Errorf("cannot listen: %w", err)
	}
	return l, nil
}

// loopback tells whether only this machine reaches an address.
func loopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

func (s *debugServer) serve(ctx context.Context, l net.Listener) {
	s.log.Info("serving what this machine may look into")
	h := s.handler
	if l.Addr().Network() == "tcp" && loopback(l.Addr().String()) {
		h = sameHost(h)
	}
	srv := newHTTPServer(ctx, h, s.log)
	srv.WriteTimeout = 0 // a profile takes as long as its reader asks for
	if err := serveHTTP(ctx, srv, l); err != nil {
		s.log.Warn("no longer served", "error", err)
	}
}
