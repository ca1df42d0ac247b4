// Package control is the control server: what agents report to, what clients ask for the way to an
// agent, and the relay both can meet at.
//
// [New] opens the state and makes a [Server]; [Server.Serve] answers on a listener until its context
// ends. A caller with an http.Server of its own uses the Server as its handler and calls
// [Server.Run] instead, before the first request.
//
// routes.go is the table of all that is answered. The other files are named for what they answer:
// api_logs.go holds the HTTP side of logs, rpc_agent.go the calls of an agent on its link. Two kinds
// of callers exist and neither is trusted: an agent proves itself with a token that was minted for it
// ([Server.agentRoute]) and speaks for itself only; a person proves himself with a key
// ([Server.userRoute]). What they may not be told apart by is answered alike.
package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/berthd/berth/control/coordinator"
	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/identity/attest"
	"github.com/berthd/berth/tailnet/relay"
	"github.com/berthd/berth/wire"
)

// Config says what a [Server] serves.
type Config struct {
	// DataDir holds the embedded state and the first admin key; empty keeps all in memory. With
	// NATSURL it holds the key only.
	DataDir string
	// NATSURL is an external NATS cluster that holds the state, shared by any number of servers, and
	// NATSReplicas how many of its servers hold each record (0 means 1).
	NATSURL      string
	NATSReplicas int
	// AccessURL is where agents and clients reach this server. Required.
	AccessURL *url.URL
	// ConfigFile declares agents, in YAML (docs/config.md); it is read again when it changes. Empty
	// means none.
	ConfigFile string
	// AgentPrograms is a directory of agent programs to hand out, as the release command makes it; empty means none.
	AgentPrograms string
	// STUNAddr is a UDP address to answer STUN on, so that nodes behind NAT find direct paths
	// (":3478"); empty means no STUN. It must be reachable at the host of AccessURL.
	STUNAddr string
	// RelayOnly tells agents and clients to make no direct connections, ForceWebSocket to reach the
	// relay over WebSocket from the start.
	RelayOnly, ForceWebSocket bool
	// Logs bounds what is kept of agents' logs.
	Logs store.LogLimits
	// AWS, Azure and Google say whom to believe about machines beside the clouds themselves. The
	// configuration file may add to it.
	AWS    attest.AWSConfig
	Azure  attest.AzureConfig
	Google attest.GoogleConfig
	// TokenLife is how long a token that a machine got for its identity lasts without a link; 0 means 24
	// hours.
	TokenLife time.Duration
	// Version is this build's version, "vX.Y.Z".
	Version string
	// Log gets what operators should know; nil discards.
	Log *slog.Logger
}

// Server is a control server. It is an http.Handler.
type Server struct {
	config      Config
	log         *slog.Logger
	store       *store.Store
	id          uuid.UUID // of the deployment
	adminKey    wire.Secret
	resumeKey   []byte
	coordinator *coordinator.Coordinator
	relay       *relay.Server
	relayMap    *wire.DERPMap
	links       links
	gate        *gate // of links that begin
	open        openRequests
	peers       *peers
	workspaces  *workspaces
	file        *configFile
	banners     atomic.Pointer[[]fileBanner] // of the configuration file; nil without one
	providers   atomic.Pointer[[]*provider]  // likewise
	identity    atomic.Pointer[identityRules]
	programs    atomic.Pointer[programs] // nil when there are none
	checks      *gate                    // of identities
	strangers   rate
	metrics     metrics
	handler     http.Handler

	// stopping ends every connection that outlives its request; active counts them.
	stopping context.Context
	stop     context.CancelFunc
	entering sync.Mutex // so that none enters while they are waited for
	active   sync.WaitGroup
}

// New opens the state and prepares to serve. Its errors say what is wrong with the data directory,
// the cluster or the configuration file, and what helps.
func New(ctx context.Context, config Config) (_ *Server, err error) {
	if config.AccessURL == nil || config.AccessURL.Hostname() == "" || (config.AccessURL.Scheme != "http" && config.AccessURL.Scheme != "https") {
		return nil, fmt.Errorf("cannot serve at %v: the access URL must be http or https with a host", config.AccessURL)
	}
	if config.Log == nil {
		config.Log = slog.New(slog.DiscardHandler)
	}
	if config.Version == "" {
		config.Version = "v0.0.0-devel"
	}
	s := &Server{config: config, log: config.Log, gate: newGate(maxBeginning), checks: newGate(maxChecks)}
	rules, err := newIdentityRules(config, fileIdentity{})
	if err != nil {
		return nil, err
	}
	s.identity.Store(rules)
	s.stopping, s.stop = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	dir := config.DataDir
	if config.NATSURL != "" {
		dir = ""
	}
	s.store, err = store.Open(ctx, store.Options{
		Dir: dir, URL: config.NATSURL, Replicas: config.NATSReplicas, TokenLife: config.TokenLife, Logs: config.Logs, Log: s.log,
	})
	if err != nil {
		return nil, err
	}
	if err := s.identify(ctx); err != nil {
		return nil, err
	}
	if s.coordinator, err = coordinator.New(s.store.Conn(), coordinator.Options{Log: s.log}); err != nil {
		return nil, err
	}
	s.relay = relay.New(s.log, s.coordinator.HasKey)
	stunPort := int32(-1)
	if config.STUNAddr != "" {
		addr, err := s.relay.ListenSTUN(config.STUNAddr)
		if err != nil {
			return nil, fmt.Errorf("cannot answer STUN on %s: %w; choose another address or none", config.STUNAddr, err)
		}
		stunPort = int32(addr.Port())
	}
	s.relayMap = embeddedRelayMap(config.AccessURL, stunPort)
	s.peers = newPeers(s)
	s.workspaces = newWorkspaces()
	if config.ConfigFile != "" {
		s.file = &configFile{path: config.ConfigFile}
	}
	if err := s.Reload(ctx); err != nil {
		return nil, err
	}
	if s.handler, err = s.routes(); err != nil {
		return nil, err
	}
	return s, nil
}

// ServeHTTP implements [http.Handler].
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.handler.ServeHTTP(w, r) }

// AdminKey returns the first admin key, or "" when this server cannot know it: then it was made by
// another one, or its file was removed.
func (s *Server) AdminKey() wire.Secret { return s.adminKey }

// Run does the server's work beside answering requests until ctx is done; then it ends every open
// connection, closes the state and returns nil. It is called once.
func (s *Server) Run(ctx context.Context) error {
	// The parts stop in reverse order: first what uses the coordinator, then it, then the state.
	inner, stopInner := context.WithCancel(context.WithoutCancel(ctx))
	defer stopInner()
	coordination := make(chan error, 1)
	go func() { coordination <- s.coordinator.Run(inner) }()

	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error { return s.watchRevoked(groupCtx) })
	group.Go(func() error { return s.watchPins(groupCtx) })
	group.Go(func() error { return s.watchWorkspaces(groupCtx) })
	group.Go(func() error { return s.peers.run(groupCtx) })
	if s.file != nil {
		group.Go(func() error { return s.watchConfig(groupCtx) })
	}
	group.Go(func() error {
		select {
		case <-groupCtx.Done():
			return nil
		case err := <-coordination:
			coordination <- err
			return fmt.Errorf("cannot coordinate any more: %w", err)
		}
	})
	err := group.Wait()
	s.entering.Lock()
	s.stop()
	s.entering.Unlock()
	s.active.Wait()
	stopInner()
	return errors.Join(err, <-coordination, s.close())
}

// How patient the HTTP server is. Bodies have deadlines of their own (see readJSON), and what is
// streamed has none.
const (
	headerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute
	// shutdownBudget is how long requests may take to end when the server stops.
	shutdownBudget = 5 * time.Second
)

// Serve answers on l until ctx is done, and runs the server meanwhile as [Server.Run] does.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	web := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error {
		err := web.Serve(l)
		if errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		return fmt.Errorf("cannot serve on %s: %w", l.Addr(), err)
	})
	group.Go(func() error {
		<-groupCtx.Done()
		// New requests end first, then those that are open; the context that ended cannot wait for them.
		budget, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownBudget)
		defer cancel()
		s.stop()
		if err := web.Shutdown(budget); err != nil {
			return web.Close()
		}
		return nil
	})
	group.Go(func() error { return s.Run(groupCtx) })
	return group.Wait()
}

func (s *Server) close() error {
	s.stop()
	var err error
	if s.relay != nil {
		err = s.relay.Close()
	}
	if s.store != nil {
		err = errors.Join(err, s.store.Close())
	}
	return err
}

// lasting returns a context for a connection that outlives its request's handler chain: it ends with
// the request or with the server. done must be called when the connection has ended.
func (s *Server) lasting(r *http.Request) (ctx context.Context, done func()) {
	ctx, cancel := context.WithCancel(r.Context())
	s.entering.Lock()
	defer s.entering.Unlock()
	if s.stopping.Err() != nil {
		cancel()
		return ctx, cancel
	}
	s.active.Add(1)
	unhook := context.AfterFunc(s.stopping, cancel)
	return ctx, func() {
		unhook()
		cancel()
		s.active.Done()
	}
}

// embeddedRelayMap is the map of the relay inside this server. Receivers put their own access URL in
// place of its host.
func embeddedRelayMap(access *url.URL, stunPort int32) *wire.DERPMap {
	const region = 999
	port := int32(443)
	if access.Scheme == "http" {
		port = 80
	}
	if p := access.Port(); p != "" {
		n, err := net.LookupPort("tcp", p)
		if err == nil {
			port = int32(n)
		}
	}
	return &wire.DERPMap{Regions: map[int64]*wire.DERPRegion{region: {
		EmbeddedRelay: true,
		RegionID:      region,
		RegionCode:    "berth",
		RegionName:    "Berth Embedded Relay",
		Nodes: []*wire.DERPNode{{
			Name: "999b", RegionID: region, HostName: access.Hostname(), DERPPort: port,
			STUNPort: stunPort, ForceHTTP: access.Scheme == "http",
		}},
	}}}
}
