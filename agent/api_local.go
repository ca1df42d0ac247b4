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
	"net/url"
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
	server    string             // the control server's URL, as sessions have it
	token     func() wire.Secret // the session token in use
	appStatus func(*agentpb.UpdateAppStatusRequest)
	log       *slog.Logger
	ready     chan struct{} // closed once the socket is there, or could not be made
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
	mux.HandleFunc("GET /v1/session-token", l.getSessionToken)
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

// getSessionToken answers with the token in use, which a session that was opened a while ago may not
// have: an identity is exchanged anew with each link. Whoever may use the socket may read the agent's
// memory too. The caller says which server it is for, lest it take the token to another.
func (l *localAPI) getSessionToken(w http.ResponseWriter, r *http.Request) {
	token := l.token()
	if r.URL.Query().Get("server") != l.server || token == "" {
		writeError(w, http.StatusNotFound, "There is no token for this server.", nil)
		return
	}
	writeJSON(w, http.StatusOK, wire.SessionToken{SessionToken: token.Reveal()})
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

// localTimeout bounds a request to the socket: the answer waits for nothing but the agent's own memory.
const localTimeout = 10 * time.Second

// SessionToken asks the agent that listens on socket for its token in use at a control server.
func SessionToken(ctx context.Context, socket, server string) (wire.Secret, error) {
	ctx, cancel := context.WithTimeout(ctx, localTimeout)
	defer cancel()
	resp, err := askLocal(ctx, socket, http.MethodGet, "/v1/session-token?"+url.Values{"server": {server}}.Encode(), nil)
	if err != nil {
		return "", fmt.Errorf("cannot ask berthd for its token: %w", err)
	}
	defer resp.Body.Close()
	var answer wire.SessionToken
	if err := wire.ReadJSON(resp, http.StatusOK, &answer); err != nil {
		return "", fmt.Errorf("cannot ask berthd for its token: %w", err)
	}
	return wire.Secret(answer.SessionToken), nil
}

// askLocal makes one request to the socket.
func askLocal(ctx context.Context, socket, method, target string, body []byte) (*http.Response, error) {
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://berthd"+target, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	return (&http.Client{Transport: transport}).Do(req)
}

// ReportAppStatus hands a status to the agent that listens on socket. It returns a [*wire.Error] if
// that refuses it; delivery to the server goes on behind it.
func ReportAppStatus(ctx context.Context, socket string, status wire.PatchAppStatus) error {
	ctx, cancel := context.WithTimeout(ctx, localTimeout)
	defer cancel()
	body, err := json.Marshal(status)
	if err != nil {
		return fmt.Errorf("cannot report a status: %w", err)
	}
	resp, err := askLocal(ctx, socket, http.MethodPost, "/v1/app-status", body)
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
