package agent

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/netutil"

	"github.com/berthd/berth/account"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// LocalSocket is the file name of the socket that programs in the workspace report to. The agent
// puts its path into their environment as EnvSocket.
const (
	LocalSocket = "berthd.sock"
	EnvSocket   = "BERTH_SOCKET"
)

// localAPI serves programs of the workspace on a Unix socket that only the workspace's user may
// use (docs/status.md). One curl line is a client:
//
//	curl --unix-socket "$BERTH_SOCKET" -d '{"app_slug":"x","state":"working","message":"…"}' http://berthd/v1/app-status
type localAPI struct {
	path      string
	user      *account.User      // whose programs report; the socket is theirs
	server    string             // the control server's URL, as sessions have it
	token     func() wire.Secret // the session token in use
	manifest  func() *agentpb.Manifest
	appStatus func(*agentpb.UpdateAppStatusRequest)
	about     func() About
	hide      func(...wire.Secret)
	log       *slog.Logger
	ready     chan struct{} // closed once the socket is there, or could not be made
}

// run serves until ctx is done. A socket that cannot be made costs the workspace its reports, not
// its terminals: it is said once, and the agent goes on.
func (l *localAPI) run(ctx context.Context) error {
	listener, err := listenPrivate(l.user, l.path)
	close(l.ready)
	if err != nil {
		l.log.Warn("programs in the workspace cannot report their status", "error", err)
		<-ctx.Done()
		return nil
	}
	return serveHTTP(ctx, newHTTPServer(ctx, l.handler(), l.log), netutil.LimitListener(listener, maxLocalConnections))
}

const (
	// maxLocalConnections bounds how many programs are served at a time; a request takes less than a
	// millisecond, so that others wait, and programs that never end theirs cannot take all of berthd's files.
	maxLocalConnections = 128
	// maxLocalBody bounds a request: the longest link and message, should each character be escaped.
	maxLocalBody = 32 << 10
)

func (l *localAPI) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/app-status", l.postAppStatus)
	mux.HandleFunc("POST /v1/secrets", l.postSecrets)
	mux.HandleFunc("GET /v1/session-token", l.getSessionToken)
	mux.HandleFunc("GET /v1/agent", l.getAgent)
	return mux
}

// listenPrivate listens on a Unix socket for one user alone. The state directory's lock makes sure
// that what lies at path is left from a process that is gone.
func listenPrivate(user *account.User, path string) (l net.Listener, err error) {
	err = user.Do(func() error {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cannot replace socket: %w", err)
		}
		if l, err = user.ListenUnix(path); err != nil {
			return fmt.Errorf("cannot listen on socket: %w", err)
		}
		// Its directory is private already; this holds should somebody open that up.
		if err := os.Chmod(path, 0o600); err != nil {
			l.Close()
			return fmt.Errorf("cannot make socket private: %w", err)
		}
		return nil
	})
	return l, err
}

// readLocal reads the body of a request, and answers one that is not right; then it returns false.
func readLocal(w http.ResponseWriter, r *http.Request, body any) bool {
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxLocalBody))
	dec.DisallowUnknownFields()
	err := dec.Decode(body)
	if err == nil {
		if _, end := dec.Token(); !errors.Is(end, io.EOF) {
			err = cmp.Or(end, errors.New("there is more than one value"))
		}
	}
	if tooLong, ok := errors.AsType[*http.MaxBytesError](err); ok {
		writeError(w, http.StatusRequestEntityTooLarge, fmt.Sprintf("Request body must have at most %d bytes.", tooLong.Limit), nil)
		return false
	}
	if err != nil {
		writeError(w, http.StatusBadRequest, "Request body must be valid JSON.", err)
		return false
	}
	return true
}

// secrets are values that a program in the workspace came by and that are to be hidden in what leaves it.
type secrets struct {
	Values []string `json:"values"`
}

// postSecrets has values hidden. Whoever may use the socket could keep them from being so by other means.
func (l *localAPI) postSecrets(w http.ResponseWriter, r *http.Request) {
	var body secrets
	if !readLocal(w, r, &body) {
		return
	}
	for _, value := range body.Values {
		l.hide(wire.Secret(value))
	}
	w.WriteHeader(http.StatusNoContent)
}

func (l *localAPI) postAppStatus(w http.ResponseWriter, r *http.Request) {
	var body wire.PatchAppStatus
	if !readLocal(w, r, &body) {
		return
	}
	update, wrong := appStatus(body, l.manifest())
	if len(wrong) > 0 {
		writeJSON(w, http.StatusBadRequest, wire.Error{Message: "The status has invalid fields.", Validations: wrong})
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

// appStates are the states that an app may have.
var appStates = []agentpb.UpdateAppStatusRequest_AppStatusState{
	agentpb.UpdateAppStatusRequest_WORKING, agentpb.UpdateAppStatusRequest_IDLE,
	agentpb.UpdateAppStatusRequest_COMPLETE, agentpb.UpdateAppStatusRequest_FAILURE,
}

// AppStates are the states that [ReportAppStatus] takes.
func AppStates() []string {
	var names []string
	for _, state := range appStates {
		names = append(names, appStateName(state))
	}
	return names
}

func appStateName(state agentpb.UpdateAppStatusRequest_AppStatusState) string {
	return strings.ToLower(state.String())
}

// appStatus checks a status before it is queued: what the server would refuse must be refused while
// somebody is there to hear it. Before there is a manifest any app may be one of the workspace.
func appStatus(body wire.PatchAppStatus, m *agentpb.Manifest) (*agentpb.UpdateAppStatusRequest, []wire.Validation) {
	var wrong []wire.Validation
	check := func(bad bool, field, format string, args ...any) {
		if bad {
			wrong = append(wrong, wire.Validation{Field: field, Detail: fmt.Sprintf(format, args...)})
		}
	}
	state := slices.Index(AppStates(), body.State)
	check(body.AppSlug == "", "app_slug", "is missing: name the app as the workspace's template does")
	check(len(body.AppSlug) > maxSlug, "app_slug", "has %d bytes: at most %d fit", len(body.AppSlug), maxSlug)
	check(len(wrong) == 0 && m != nil && !hasApp(m, body.AppSlug), "app_slug", "%q is no app of this workspace, which has %s", body.AppSlug, appSlugs(m))
	check(state < 0, "state", "%q is none of %s", body.State, strings.Join(AppStates(), ", "))
	check(len(body.Message) > wire.MaxAppStatusMessage, "message", "has %d bytes: at most %d fit", len(body.Message), wire.MaxAppStatusMessage)
	check(len(body.URI) > wire.MaxURI, "uri", "has %d bytes: at most %d fit", len(body.URI), wire.MaxURI)
	if len(wrong) > 0 {
		return nil, wrong
	}
	return &agentpb.UpdateAppStatusRequest{Slug: body.AppSlug, State: appStates[state], Message: body.Message, Uri: body.URI}, nil
}

// maxSlug is longer than a template lets a slug be.
const maxSlug = 128

func hasApp(m *agentpb.Manifest, slug string) bool {
	return slices.ContainsFunc(m.GetApps(), func(app *agentpb.WorkspaceApp) bool { return app.GetSlug() == slug })
}

// appSlugs lists the apps of a workspace for a person.
func appSlugs(m *agentpb.Manifest) string {
	const shown = 10
	var slugs []string
	for _, app := range m.GetApps() {
		slugs = append(slugs, app.GetSlug())
	}
	switch {
	case len(slugs) == 0:
		return "none"
	case len(slugs) > shown:
		return fmt.Sprintf("%s and %d more", strings.Join(slugs[:shown], ", "), len(slugs)-shown)
	}
	return strings.Join(slugs, ", ")
}

// localTimeout bounds a request to the socket: the answer waits for nothing but the agent's own memory.
const localTimeout = 10 * time.Second

// SessionToken asks the agent that listens on socket for its token in use at a control server.
func SessionToken(ctx context.Context, socket, server string) (wire.Secret, error) {
	ctx, cancel := context.WithTimeout(ctx, localTimeout)
	defer cancel()
	var answer wire.SessionToken
	if err := getLocal(ctx, socket, "/v1/session-token?"+url.Values{"server": {server}}.Encode(), &answer); err != nil {
		return "", fmt.Errorf("cannot ask berthd for its token: %w", err)
	}
	return wire.Secret(answer.SessionToken), nil
}

// getLocal reads JSON from the socket.
func getLocal(ctx context.Context, socket, target string, answer any) error {
	resp, err := askLocal(ctx, socket, http.MethodGet, target, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return wire.ReadJSON(resp, http.StatusOK, answer)
}

// Hide has the agent that listens on socket hide secrets in the logs, statuses and metadata that leave the workspace. The empty ones are none.
func Hide(ctx context.Context, socket string, values ...wire.Secret) error {
	ctx, cancel := context.WithTimeout(ctx, localTimeout)
	defer cancel()
	var all secrets
	for _, value := range values {
		if value != "" {
			all.Values = append(all.Values, value.Reveal())
		}
	}
	body, err := json.Marshal(all)
	if err != nil {
		return fmt.Errorf("cannot have a secret hidden: %w", err)
	}
	resp, err := askLocal(ctx, socket, http.MethodPost, "/v1/secrets", body)
	if err != nil {
		return fmt.Errorf("cannot have a secret hidden: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		return fmt.Errorf("cannot have a secret hidden: berthd answered %s", resp.Status)
	}
	return nil
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
