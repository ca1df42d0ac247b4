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
	"time"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// apiTimeout bounds reading a request and writing an answer.
const apiTimeout = 20 * time.Second

// api is the HTTP API on the node's port 4. Every peer of the mesh that the coordinator lets
// through can call it, so it only shows things: it has no route that changes anything, and each
// answer is made from the fields below.
type api struct {
	ports      func(context.Context) ([]wire.ListeningPort, error)
	containers func(context.Context) (wire.Containers, error)
	manifest   func() *agentpb.Manifest
	mesh       func(io.Writer)
	metrics    func(io.Writer)
	logs       io.WriterTo
	log        *slog.Logger
}

// serve answers on l until ctx is done.
func (a *api) serve(ctx context.Context, l net.Listener) error {
	srv := &http.Server{
		Handler:           a.handler(),
		ReadTimeout:       apiTimeout,
		ReadHeaderTimeout: apiTimeout,
		WriteTimeout:      apiTimeout,
		MaxHeaderBytes:    64 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(a.log.Handler(), slog.LevelDebug),
	}
	return serveHTTP(ctx, srv, l)
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
	mux.HandleFunc("GET /api/v0/listening-ports", a.listeningPorts)
	mux.HandleFunc("GET /api/v0/containers", a.listContainers)
	mux.HandleFunc("POST /api/v0/list-directory", a.listDirectory)
	mux.HandleFunc("GET /api/v0/netcheck", a.netcheck)
	mux.HandleFunc("GET /debug/manifest", a.debugManifest)
	mux.HandleFunc("GET /debug/logs", a.debugLogs)
	mux.HandleFunc("GET /debug/magicsock", a.debugMesh)
	mux.HandleFunc("GET /debug/prometheus", a.prometheus)
	return mux
}

func (a *api) listeningPorts(w http.ResponseWriter, r *http.Request) {
	ports, err := a.ports(r.Context())
	if err != nil {
		a.log.Warn("cannot list listening ports", "error", err)
		writeError(w, http.StatusInternalServerError, "Could not scan for listening ports.", err)
		return
	}
	writeJSON(w, http.StatusOK, wire.ListeningPorts{Ports: ports})
}

func (a *api) listContainers(w http.ResponseWriter, r *http.Request) {
	list, err := a.containers(r.Context())
	if err != nil {
		a.log.Warn("cannot list containers", "error", err)
		writeError(w, http.StatusInternalServerError, "Could not get containers", err)
		return
	}
	writeJSON(w, http.StatusOK, list)
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
