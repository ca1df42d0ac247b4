package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// LocalSocket is the file name of the socket that programs in the workspace report to. The agent
// puts its path into their environment as EnvSocket.
const (
	LocalSocket = "berthd.sock"
	EnvSocket   = "BERTH_SOCKET"
)

// localAPI serves programs of the workspace on a Unix socket that only the agent's own user may
// use. One curl line is a client:
//
//	curl --unix-socket "$BERTH_SOCKET" -d '{"app_slug":"x","state":"working","message":"…"}' http://berthd/v1/app-status
type localAPI struct {
	path      string
	appStatus func(*agentpb.UpdateAppStatusRequest)
	log       *slog.Logger
	ready     chan struct{} // closed once the socket is there, or could not be made
}

func newLocalAPI(path string, appStatus func(*agentpb.UpdateAppStatusRequest), log *slog.Logger) *localAPI {
	return &localAPI{path: path, appStatus: appStatus, log: log, ready: make(chan struct{})}
}

// run serves until ctx is done. A socket that cannot be made costs the workspace its reports, not
// its terminals: it is said once, and the agent goes on.
func (l *localAPI) run(ctx context.Context) error {
	listener, err := listenPrivate(l.path)
	close(l.ready)
	if err != nil {
		l.log.Warn("programs in the workspace cannot report their status", "error", err)
		<-ctx.Done()
		return nil
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/app-status", l.postAppStatus)
	srv := &http.Server{
		Handler:           mux,
		ReadTimeout:       apiTimeout,
		ReadHeaderTimeout: apiTimeout,
		WriteTimeout:      apiTimeout,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(l.log.Handler(), slog.LevelDebug),
	}
	return serveHTTP(ctx, srv, listener)
}

// listenPrivate listens on a Unix socket for this user alone. The state directory's lock makes sure
// that what lies at path is left from a process that is gone.
func listenPrivate(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("cannot replace socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("cannot listen on socket: %w", err)
	}
	// Its directory is private already; this holds should somebody open that up.
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("cannot make socket private: %w", err)
	}
	return l, nil
}

func (l *localAPI) postAppStatus(w http.ResponseWriter, r *http.Request) {
	var body wire.PatchAppStatus
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, wire.MaxJSONBody))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&body); err != nil {
		writeError(w, http.StatusBadRequest, "Request body must be valid JSON.", err)
		return
	}
	update, err := appStatus(body)
	if err != nil {
		writeError(w, http.StatusBadRequest, err.Error(), nil)
		return
	}
	l.appStatus(update)
	w.WriteHeader(http.StatusAccepted)
}

// appStatus checks a status before it is queued: what the server would refuse must be refused while
// somebody is there to hear it.
func appStatus(body wire.PatchAppStatus) (*agentpb.UpdateAppStatusRequest, error) {
	states := map[string]agentpb.UpdateAppStatusRequest_AppStatusState{
		"working":  agentpb.UpdateAppStatusRequest_WORKING,
		"idle":     agentpb.UpdateAppStatusRequest_IDLE,
		"complete": agentpb.UpdateAppStatusRequest_COMPLETE,
		"failure":  agentpb.UpdateAppStatusRequest_FAILURE,
	}
	state, ok := states[body.State]
	switch {
	case body.AppSlug == "":
		return nil, errors.New("app_slug is missing: name the app as the workspace's template does")
	case !ok:
		return nil, fmt.Errorf("state %q is none of working, idle, complete and failure", body.State)
	case len(body.Message) > wire.MaxAppStatusMessage:
		return nil, fmt.Errorf("message has %d bytes: at most %d fit", len(body.Message), wire.MaxAppStatusMessage)
	}
	return &agentpb.UpdateAppStatusRequest{Slug: body.AppSlug, State: state, Message: body.Message, Uri: body.URI}, nil
}

// reportTimeout bounds [ReportAppStatus]: the answer waits for nothing but the agent's own memory.
const reportTimeout = 10 * time.Second

// ReportAppStatus hands a status to the agent that listens on socket. It returns a [*wire.Error] if
// that refuses it; delivery to the server goes on behind it.
func ReportAppStatus(ctx context.Context, socket string, status wire.PatchAppStatus) error {
	ctx, cancel := context.WithTimeout(ctx, reportTimeout)
	defer cancel()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	defer transport.CloseIdleConnections()
	body, err := json.Marshal(status)
	if err != nil {
		return fmt.Errorf("cannot report a status: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://berthd/v1/app-status", bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("cannot report a status: %w", err)
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return fmt.Errorf("cannot report a status: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusAccepted {
		return nil
	}
	refusal := wire.Error{StatusCode: resp.StatusCode, Message: resp.Status}
	if err := json.NewDecoder(http.MaxBytesReader(nil, resp.Body, wire.MaxJSONBody)).Decode(&refusal); err != nil {
		return fmt.Errorf("cannot report a status: berthd answered %s", resp.Status)
	}
	return &refusal
}
