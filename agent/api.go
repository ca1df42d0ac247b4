package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/account"
	"github.com/berthd/berth/mask"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/tailnetpb"
)

// apiTimeout bounds reading a request and writing an answer. WebSockets are exempt.
const apiTimeout = 20 * time.Second

// api is the HTTP API on the node's port 4. It asks nobody for a credential: every peer of the mesh
// that the coordinator lets through can call it, and so could whoever tricks such a peer's HTTP
// client. So it shows things, and has few routes that change anything: one makes a dev container anew
// that this workspace declares or has, others rename and close terminals, to which every peer may attach. It reads no other file's content, writes none and starts no command
// of a caller's choosing; who may do that has SSH. Of scripts' log files it shows what those who may come
// here are shown by the control server too, secrets hidden.
type api struct {
	user       *account.User // whose files are shown
	ports      portView
	containers *containerView
	terminals  *terminalHost
	manifest   func() *agentpb.Manifest
	self       func() *tailnetpb.Node // what peers are told of our node; nil before there is one
	mesh       func(io.Writer)
	meshDebug  *atomic.Bool // whether the mesh logs all it does
	metrics    func(io.Writer)
	logs       *LogTail
	scriptLog  func(source uuid.UUID) (*os.File, error) // an fs.ErrNotExist if there is none
	mask       *mask.Masker
	log        *slog.Logger

	watchers     atomic.Int64   // of containers
	portWatchers atomic.Int64   // of listening ports
	work         sync.WaitGroup // WebSockets, which the HTTP server does not wait for
}

// serve answers on l until ctx is done.
func (a *api) serve(ctx context.Context, l net.Listener) error {
	defer a.work.Wait()
	return serveHTTP(ctx, newHTTPServer(ctx, a.handler(), a.log), l)
}

// newHTTPServer returns a server with the limits that hold for each of the agent's own.
func newHTTPServer(ctx context.Context, h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadTimeout:       apiTimeout,
		ReadHeaderTimeout: apiTimeout,
		WriteTimeout:      apiTimeout,
		MaxHeaderBytes:    64 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

// serveHTTP runs srv on l until ctx is done, and cuts what is then still open: answers take
// milliseconds, and a peer that does not read must not hold up a stop.
func serveHTTP(ctx context.Context, srv *http.Server, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) && ctx.Err() == nil {
		return fmt.Errorf("cannot serve HTTP: %w", err)
	}
	return nil
}

func (a *api) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, wire.Error{Message: "Hello from the agent!"})
	})
	mux.HandleFunc("POST /api/v0/list-directory", a.listDirectory)
	mux.HandleFunc("GET /api/v0/netcheck", a.netcheck)
	a.routePorts(mux)
	a.routeContainers(mux)
	a.routeTerminals(mux)
	mux.HandleFunc("GET "+wire.PathAgentScriptLogs+"{source}", a.getScriptLog)
	a.routeDebug(mux)
	mux.HandleFunc("GET /debug/prometheus", a.prometheus)
	return sameHost(mux)
}

// sameHost lets through what was sent to an address, and refuses what was sent to a name: a web page
// that points its own name at an address where this API can be reached (DNS rebinding) would
// otherwise read it through the browser of somebody who forwards the port. What such a page sends to
// the address itself is refused by its origin. Names below .coder are those that stock desktop clients
// give agents; nobody can have one in the public DNS.
func sameHost(next http.Handler) http.Handler {
	next = http.NewCrossOriginProtection().Handler(next)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := (&url.URL{Host: r.Host}).Hostname()
		name := strings.ToLower(strings.TrimSuffix(host, "."))
		if _, err := netip.ParseAddr(host); err != nil && name != "localhost" && !strings.HasSuffix(name, ".coder") {
			writeError(w, http.StatusForbidden, fmt.Sprintf("This API is not served at the name %q: use an address, or localhost.", host), nil)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// onlyQuery reports whether the query holds nothing but the parameters named, once each at most. If
// not, the request has been answered.
func onlyQuery(w http.ResponseWriter, r *http.Request, names ...string) bool {
	query, err := url.ParseQuery(r.URL.RawQuery)
	var wrong []wire.Validation
	if err != nil {
		wrong = append(wrong, wire.Validation{Field: "query", Detail: err.Error()})
	}
	for name, values := range query {
		switch {
		case !slices.Contains(names, name):
			wrong = append(wrong, wire.Validation{Field: name, Detail: fmt.Sprintf("Query param %q is not known here", name)})
		case len(values) > 1:
			wrong = append(wrong, wire.Validation{Field: name, Detail: fmt.Sprintf("Query param %q is given %d times", name, len(values))})
		}
	}
	if len(wrong) == 0 {
		return true
	}
	slices.SortFunc(wrong, func(x, y wire.Validation) int { return bytes.Compare([]byte(x.Field), []byte(y.Field)) })
	writeBadQuery(w, wrong...)
	return false
}

func writeBadQuery(w http.ResponseWriter, wrong ...wire.Validation) {
	writeJSON(w, http.StatusBadRequest, wire.Error{Message: "Query parameters have invalid values.", Validations: wrong})
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	var buf bytes.Buffer
	if err := json.NewEncoder(&buf).Encode(body); err != nil {
		http.Error(w, "cannot encode the answer", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	// A peer that left is no trouble of ours.
	_, _ = w.Write(buf.Bytes())
}

func writeError(w http.ResponseWriter, status int, message string, cause error) {
	body := wire.Error{Message: message}
	if cause != nil {
		body.Detail = cause.Error()
	}
	writeJSON(w, status, body)
}
