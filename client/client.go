// Package client talks to a control server: plain HTTP calls and the RPC link.
//
// An agent calls [Client.ConnectAgent], a person's program [Client.Agents] and [Client.Coordinate].
// Whatever fails, [Explain] says in plain words what is wrong and what to do.
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"sync/atomic"

	"github.com/coder/websocket"
	"github.com/coder/websocket/wsjson"
	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
)

// Config says which server to talk to, and as whom.
type Config struct {
	// URL is the server's access URL, http or https.
	URL *url.URL
	// Token is asked before each request, so that it may change. nil means none is sent.
	Token func() wire.Secret
	// HTTP makes every request and WebSocket; nil means what [NewHTTP] makes of no options.
	HTTP *http.Client
	// Header is added to every request.
	Header http.Header
}

// Client talks to one control server. Its methods may run at the same time.
type Client struct {
	config  Config
	version atomic.Pointer[wire.Version] // the newest the server is known to speak
}

// New returns a client; nothing is sent yet.
func New(config Config) (*Client, error) {
	if config.HTTP == nil {
		h, err := NewHTTP(HTTPConfig{})
		if err != nil {
			return nil, err
		}
		config.HTTP = h
	}
	return &Client{config: config}, nil
}

func (c *Client) url(path string, query url.Values) string {
	u := c.config.URL.JoinPath(path)
	u.RawQuery = query.Encode()
	return u.String()
}

func (c *Client) header() http.Header {
	h := c.config.Header.Clone()
	if h == nil {
		h = http.Header{}
	}
	if c.config.Token != nil {
		if token := c.config.Token(); token != "" {
			h.Set(wire.HeaderSessionToken, token.Reveal())
		}
	}
	return h
}

func agentPath(id uuid.UUID, rest string) string {
	return wire.PathAgents + id.String() + rest
}

// call makes one request; body and answer are JSON, or nil where there is none.
func (c *Client) call(ctx context.Context, method, path string, query url.Values, body any, status int, answer any) error {
	var payload bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&payload).Encode(body); err != nil {
			return fmt.Errorf("cannot encode the request: %w", err)
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, c.url(path, query), &payload)
	if err != nil {
		return err
	}
	req.Header = c.header()
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.config.HTTP.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if answer == nil {
		if resp.StatusCode != status {
			return wire.ReadError(resp)
		}
		return nil
	}
	return wire.ReadJSON(resp, status, answer)
}

// dial opens a WebSocket.
func (c *Client) dial(ctx context.Context, path string, query url.Values) (*websocket.Conn, error) {
	conn, resp, err := websocket.Dial(ctx, c.url(path, query), &websocket.DialOptions{
		HTTPClient: c.config.HTTP,
		HTTPHeader: c.header(),
		// Stock servers negotiate none, and the streams carried are encrypted or already framed.
		CompressionMode: websocket.CompressionDisabled,
	})
	if err != nil {
		if resp != nil && resp.StatusCode != http.StatusSwitchingProtocols {
			return nil, wire.ReadError(resp)
		}
		// The text of a url.Error holds the whole URL, and with it a resume token.
		if u := new(url.Error); errors.As(err, &u) {
			err = fmt.Errorf("cannot open a WebSocket at %s: %w", path, u.Err)
		}
		return nil, err
	}
	return conn, nil
}

// BuildInfo asks who the server is; it needs no token.
func (c *Client) BuildInfo(ctx context.Context) (wire.BuildInfo, error) {
	var info wire.BuildInfo
	err := c.call(ctx, http.MethodGet, wire.PathBuildInfo, nil, nil, http.StatusOK, &info)
	return info, err
}

// RelayMap asks for the server's relay map over a WebSocket, which needs no token: it tells whether one comes through.
func (c *Client) RelayMap(ctx context.Context) (*wire.DERPMap, error) {
	conn, err := c.dial(ctx, wire.PathAPI+"derp-map", nil)
	if err != nil {
		return nil, err
	}
	defer conn.CloseNow()
	conn.SetReadLimit(wire.MaxJSONBody)
	_, body, err := conn.Read(ctx)
	if err != nil {
		return nil, fmt.Errorf("cannot read the relay map: %w", err)
	}
	var m wire.DERPMap
	if err := json.Unmarshal(body, &m); err != nil {
		return nil, fmt.Errorf("cannot read the relay map: %w", err)
	}
	return &m, nil
}

// CheckToken tells whether the server takes the token of an agent. It asks for a link of a version that no server speaks,
// so that none is made: servers look at the token first.
func (c *Client) CheckToken(ctx context.Context) error {
	err := c.call(ctx, http.MethodGet, wire.PathMe+"rpc", url.Values{"version": {"0.0"}}, nil, http.StatusOK, nil)
	if answer, ok := errors.AsType[*wire.Error](err); ok && answer.StatusCode == http.StatusBadRequest {
		if _, ok := answer.Validation("version"); ok {
			return nil
		}
	}
	return err
}

// Agents lists every agent of the server.
func (c *Client) Agents(ctx context.Context) ([]wire.AgentSummary, error) {
	var agents []wire.AgentSummary
	err := c.call(ctx, http.MethodGet, wire.PathBerth+"agents", nil, nil, http.StatusOK, &agents)
	return agents, err
}

// CreateAgent declares an agent and returns its token, which the server does not show again.
func (c *Client) CreateAgent(ctx context.Context, name string) (wire.CreatedAgent, error) {
	var created wire.CreatedAgent
	err := c.call(ctx, http.MethodPost, wire.PathBerth+"agents", nil, wire.CreateAgent{Name: name}, http.StatusCreated, &created)
	return created, err
}

// AgentToken makes another token for an agent; its earlier ones stay good.
func (c *Client) AgentToken(ctx context.Context, id uuid.UUID) (wire.CreatedAgent, error) {
	var created wire.CreatedAgent
	err := c.call(ctx, http.MethodPost, wire.PathBerth+"agents/"+id.String()+"/token", nil, nil, http.StatusCreated, &created)
	return created, err
}

// ForgetAgent lets any installation on the machine of an agent become it, and ends its tokens.
func (c *Client) ForgetAgent(ctx context.Context, id uuid.UUID) error {
	return c.call(ctx, http.MethodPost, wire.PathBerth+"agents/"+id.String()+"/forget", nil, nil, http.StatusNoContent, nil)
}

// RevokeAgent ends every token of an agent and its link.
func (c *Client) RevokeAgent(ctx context.Context, id uuid.UUID) error {
	return c.call(ctx, http.MethodPost, wire.PathBerth+"agents/"+id.String()+"/revoke", nil, nil, http.StatusNoContent, nil)
}

// Agent returns what the server knows of one agent.
func (c *Client) Agent(ctx context.Context, id uuid.UUID) (wire.Agent, error) {
	var agent wire.Agent
	err := c.call(ctx, http.MethodGet, agentPath(id, ""), nil, nil, http.StatusOK, &agent)
	return agent, err
}

// Status returns an agent with all that it told of its workspace.
func (c *Client) Status(ctx context.Context, id uuid.UUID) (wire.StatusReport, error) {
	var report wire.StatusReport
	err := c.call(ctx, http.MethodGet, wire.PathBerth+"agents/"+id.String()+"/status", nil, nil, http.StatusOK, &report)
	return report, err
}

// AppStatuses returns what an app of an agent said of itself, newest first.
func (c *Client) AppStatuses(ctx context.Context, id uuid.UUID, slug string) ([]wire.AppStatus, error) {
	var statuses []wire.AppStatus
	err := c.call(ctx, http.MethodGet, wire.PathBerth+"agents/"+id.String()+"/app-statuses", url.Values{wire.QueryApp: {slug}}, nil, http.StatusOK, &statuses)
	return statuses, err
}

// Connection returns what is needed to join the mesh of an agent.
func (c *Client) Connection(ctx context.Context, id uuid.UUID) (wire.ConnectionInfo, error) {
	var info wire.ConnectionInfo
	err := c.call(ctx, http.MethodGet, agentPath(id, "/connection"), nil, nil, http.StatusOK, &info)
	return info, err
}

// ListeningPorts lists what listens in the agent's workspace; with hidden, ports of berthd itself and
// of editors' helpers too.
func (c *Client) ListeningPorts(ctx context.Context, id uuid.UUID, hidden bool) (wire.ListeningPorts, error) {
	var ports wire.ListeningPorts
	err := c.call(ctx, http.MethodGet, agentPath(id, "/listening-ports"), everyPort(hidden), nil, http.StatusOK, &ports)
	return ports, err
}

// everyPort is the query for ports of every kind.
func everyPort(hidden bool) url.Values {
	query := url.Values{wire.QueryNetwork: {wire.NetworkAll}}
	if hidden {
		query.Set(wire.QueryHidden, "true")
	}
	return query
}

// Containers lists the containers beside the agent.
func (c *Client) Containers(ctx context.Context, id uuid.UUID) (wire.Containers, error) {
	var containers wire.Containers
	err := c.call(ctx, http.MethodGet, agentPath(id, "/containers"), nil, nil, http.StatusOK, &containers)
	return containers, err
}

// FollowLogs yields the log lines with an id above after, those stored and then those to come, until
// ctx is done or the stream breaks; with follow false it ends after the stored ones. An error is the
// last thing yielded.
func (c *Client) FollowLogs(ctx context.Context, id uuid.UUID, after int64, follow bool) iter.Seq2[wire.LogEntry, error] {
	query := url.Values{"after": {strconv.FormatInt(after, 10)}}
	return func(yield func(wire.LogEntry, error) bool) {
		if follow {
			c.follow(ctx, id, query, yield)
			return
		}
		c.stored(ctx, id, query, yield)
	}
}

// stored streams the array of a plain log request: it may be longer than fits in memory.
func (c *Client) stored(ctx context.Context, id uuid.UUID, query url.Values, yield func(wire.LogEntry, error) bool) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url(agentPath(id, "/logs"), query), nil)
	if err != nil {
		yield(wire.LogEntry{}, err)
		return
	}
	req.Header = c.header()
	resp, err := c.config.HTTP.Do(req)
	if err != nil {
		yield(wire.LogEntry{}, err)
		return
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		yield(wire.LogEntry{}, wire.ReadError(resp))
		return
	}
	dec := json.NewDecoder(resp.Body)
	if _, err := dec.Token(); err != nil {
		yield(wire.LogEntry{}, fmt.Errorf("cannot read logs: %w", err))
		return
	}
	for dec.More() {
		var entry wire.LogEntry
		if err := dec.Decode(&entry); err != nil {
			yield(wire.LogEntry{}, fmt.Errorf("cannot read logs: %w", err))
			return
		}
		if !yield(entry, nil) {
			return
		}
	}
}

func (c *Client) follow(ctx context.Context, id uuid.UUID, query url.Values, yield func(wire.LogEntry, error) bool) {
	query.Set("follow", "true")
	conn, err := c.dial(ctx, agentPath(id, "/logs"), query)
	if err != nil {
		yield(wire.LogEntry{}, err)
		return
	}
	defer conn.CloseNow()
	conn.SetReadLimit(wire.MaxJSONBody)
	for {
		var entries []wire.LogEntry
		err := wsjson.Read(ctx, conn, &entries)
		if err != nil {
			if ctx.Err() == nil && websocket.CloseStatus(err) != websocket.StatusNormalClosure {
				yield(wire.LogEntry{}, fmt.Errorf("cannot follow logs: %w", err))
			}
			return
		}
		for _, entry := range entries {
			if !yield(entry, nil) {
				return
			}
		}
	}
}
