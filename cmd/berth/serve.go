package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/berthd/berth/control"
)

// serveOptions are the flags of `berth serve`.
type serveOptions struct {
	listen, accessURL    string
	dataDir, config      string
	programs             string
	natsURL              string
	natsReplicas         int
	stun                 string
	tlsCert, tlsKey      string
	relayOnly, forceWS   bool
	logLimit             int64
	logJSON, keepContext bool
}

func (p *program) serveCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run a control server",
		Long: `Run a control server: what agents report to, what clients ask for the way to an agent, and
the relay both can meet at. State lives in the data directory, or in an external NATS cluster
that any number of servers share. SIGHUP reads the configuration, the certificate and the
agent programs again.`,
		Example: `  berth serve
  berth serve --listen :443 --access-url https://berth.example.com --tls-cert c.pem --tls-key k.pem
  berth serve --config agents.yaml --listen :8080 --stun :3478
  BERTH_NATS_URL=nats://nats1:4222 berth serve --listen :8080 --access-url https://berth.example.com`,
		Args:              wantArgs(0, 0),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	var o serveOptions
	f := cmd.Flags()
	f.StringVar(&o.listen, "listen", "127.0.0.1:7080", "address to listen on")
	f.StringVar(&o.accessURL, "access-url", "", "URL by which agents and clients reach this server (default: the address listened on)")
	f.StringVar(&o.dataDir, "data-dir", "", "directory for state and the admin key (default $STATE_DIRECTORY or ~/.local/share/berth)")
	f.StringVar(&o.config, "config", "", "YAML file that declares agents; read again when it changes")
	f.StringVar(&o.programs, "agent-binaries", "", "directory of agent programs to hand out at /install.sh and /bin/, as the release command makes it (default agents beside this program, if it is there)")
	f.StringVar(&o.natsURL, "nats-url", "", "external NATS cluster for the state (BERTH_NATS_URL, which hides a password in it)")
	f.IntVar(&o.natsReplicas, "nats-replicas", 1, "how many servers of the cluster hold each record")
	f.StringVar(&o.stun, "stun", "", "UDP address to answer STUN on, by which nodes behind NAT find direct paths; \"none\" for none (default that of --listen)")
	f.StringVar(&o.tlsCert, "tls-cert", "", "PEM file of the certificate, to serve https")
	f.StringVar(&o.tlsKey, "tls-key", "", "PEM file of its key")
	f.BoolVar(&o.relayOnly, "relay-only", false, "let agents and clients make no direct connections")
	f.BoolVar(&o.forceWS, "force-websocket", false, "reach the relay over WebSocket from the start")
	f.Int64Var(&o.logLimit, "log-limit", 0, "bytes an agent may log before its log ends for good, 1048576 on stock servers; 0: the oldest lines go instead")
	f.BoolVar(&o.logJSON, "log-json", false, "log as JSON")
	f.BoolVar(&o.keepContext, "no-context", false, "do not make this the server that berth's other commands use by default")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx, stop := untilSignal(cmd.Context())
		defer stop()
		return p.serve(ctx, o)
	}
	return cmd
}

// untilSignal is untilInterrupt without SIGHUP, which means "read the configuration again" to a server.
func untilSignal(ctx context.Context) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
}

func (p *program) serve(ctx context.Context, o serveOptions) error {
	if o.logLimit < 0 {
		return fmt.Errorf("cannot limit logs to %d bytes; give 0 for no limit", o.logLimit)
	}
	if (o.tlsCert == "") != (o.tlsKey == "") {
		return errors.New("cannot serve https with half a key pair; give both --tls-cert and --tls-key")
	}
	log := p.serveLog(o.logJSON)
	if o.natsURL == "" {
		o.natsURL = os.Getenv("BERTH_NATS_URL")
	}
	dir, err := dataDir(o.dataDir)
	if err != nil {
		return err
	}
	if o.programs == "" {
		o.programs = besideProgram()
	}
	l, err := net.Listen("tcp", o.listen)
	if err != nil {
		return fmt.Errorf("cannot listen on %s: %w; choose another address with --listen", o.listen, err)
	}
	defer l.Close()
	var pair certificate
	if o.tlsCert != "" {
		pair.cert, pair.key = o.tlsCert, o.tlsKey
		if err := pair.load(); err != nil {
			return err
		}
	}
	access, err := accessURL(o.accessURL, l.Addr(), pair.cert != "")
	if err != nil {
		return err
	}
	config := control.Config{
		DataDir: dir, NATSURL: o.natsURL, NATSReplicas: o.natsReplicas, AccessURL: access, ConfigFile: o.config, AgentPrograms: o.programs,
		STUNAddr: stunAddr(o.stun, l.Addr(), log), RelayOnly: o.relayOnly, ForceWebSocket: o.forceWS, Version: version(), Log: log,
	}
	config.Logs.Total = o.logLimit
	server, err := control.New(ctx, config)
	if err != nil {
		return err
	}
	keyFile := filepath.Join(dir, "admin-key")
	p.greet(access, keyFile, o)
	go reloadOnHangup(ctx, server, &pair, log)
	if pair.cert != "" {
		l = tls.NewListener(l, &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, GetCertificate: pair.get})
	}
	return server.Serve(ctx, l)
}

func (p *program) serveLog(asJSON bool) *slog.Logger {
	options := &slog.HandlerOptions{Level: slog.LevelInfo}
	if p.verbose {
		options.Level = slog.LevelDebug
	}
	if asJSON {
		return slog.New(slog.NewJSONHandler(p.errOut, options))
	}
	return slog.New(slog.NewTextHandler(p.errOut, options))
}

// dataDir returns the directory for state: the one given, systemd's, or the user's.
func dataDir(given string) (string, error) {
	if given == "" {
		given = os.Getenv("STATE_DIRECTORY")
	}
	if given == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("cannot choose a data directory: %w; give one with --data-dir", err)
		}
		base := os.Getenv("XDG_DATA_HOME")
		if base == "" {
			base = filepath.Join(home, ".local", "share")
		}
		given = filepath.Join(base, "berth")
	}
	return filepath.Abs(given)
}

// besideProgram returns the directory of agent programs that lies beside this program, or "" if there is none.
func besideProgram() string {
	self, err := os.Executable()
	if err != nil {
		return ""
	}
	dir := filepath.Join(filepath.Dir(self), "agents")
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		return ""
	}
	return dir
}

// accessURL returns the URL given, or the one that leads to the listener from this machine.
func accessURL(given string, addr net.Addr, secure bool) (*url.URL, error) {
	if given != "" {
		u, err := parseURL(given)
		if err != nil {
			return nil, fmt.Errorf("cannot use --access-url: %w", err)
		}
		return u, nil
	}
	u := &url.URL{Scheme: "http", Host: addr.String()}
	if secure {
		u.Scheme = "https"
	}
	if tcp, ok := addr.(*net.TCPAddr); ok && tcp.IP.IsUnspecified() {
		u.Host = net.JoinHostPort("127.0.0.1", fmt.Sprint(tcp.Port))
	}
	return u, nil
}

// stunAddr returns the address given, none for "none", and for "" the UDP port of the number that is
// served on, if it is free.
func stunAddr(given string, served net.Addr, log *slog.Logger) string {
	switch given {
	case "none":
		return ""
	case "":
	default:
		return given
	}
	free, err := net.ListenPacket("udp", served.String())
	if err != nil {
		log.Warn("cannot answer STUN on the port that is served on, so nodes behind NAT will find fewer direct paths; choose another with --stun", "error", err)
		return ""
	}
	free.Close()
	return served.String()
}

// greet tells where the server is, where its key lies, and what to do next.
func (p *program) greet(access *url.URL, keyFile string, o serveOptions) {
	fmt.Fprintf(p.errOut, "serving %s\n", access)
	if _, err := os.Stat(keyFile); err != nil {
		fmt.Fprintf(p.errOut, "the admin key is kept by the server that made it\n")
		return
	}
	fmt.Fprintf(p.errOut, "the admin key is in %s\n", keyFile)
	next := "berth agent create NAME"
	if o.keepContext || !p.saveServeContext(savedContext{URL: access.String(), TokenFile: keyFile}) {
		next = fmt.Sprintf("berth --url %s --token-file %s agent create NAME", access, shellQuote(keyFile))
	}
	fmt.Fprintf(p.errOut, "next: %s\n", next)
	if o.programs != "" {
		fmt.Fprintf(p.errOut, "and on its machine, with the token in BERTH_TOKEN: curl -fsSL %s/install.sh | sh\n", strings.TrimSuffix(access.String(), "/"))
	}
	if o.accessURL == "" {
		fmt.Fprintf(p.errOut, "only this machine knows the way here; name the public one with --access-url\n")
	}
}

// saveServeContext makes this server the default of the other commands, unless another one is.
func (p *program) saveServeContext(saved savedContext) bool {
	path, err := contextPath(contextServe)
	if err != nil {
		return false // a service without a home has no person to save it for
	}
	found, err := readContext(path)
	if err == nil && found.URL != saved.URL {
		if _, err := os.Stat(found.TokenFile); err == nil {
			fmt.Fprintf(p.errOut, "%s names another server and is left alone\n", path)
			return false
		}
	}
	if err := saved.write(path); err != nil {
		fmt.Fprintln(p.errOut, "berth: warning:", err)
		return false
	}
	return true
}

// certificate is a key pair in files that can be read again.
type certificate struct {
	cert, key string
	pair      atomic.Pointer[tls.Certificate]
}

func (c *certificate) load() error {
	pair, err := tls.LoadX509KeyPair(c.cert, c.key)
	if err != nil {
		return fmt.Errorf("cannot load the certificate: %w", err)
	}
	c.pair.Store(&pair)
	return nil
}

func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.pair.Load(), nil }

// reloadOnHangup reads configuration and certificate again at each SIGHUP. What cannot be read leaves
// the old one in force.
func reloadOnHangup(ctx context.Context, server *control.Server, pair *certificate, log *slog.Logger) {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	for {
		select {
		case <-ctx.Done():
			return
		case <-hangups:
		}
		err := server.Reload(ctx)
		if pair.cert != "" {
			err = errors.Join(err, pair.load())
		}
		if err != nil {
			log.Error("cannot reload; what was loaded before stays in force", "error", err)
			continue
		}
		log.Info("reloaded")
	}
}
