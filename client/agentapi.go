package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
)

const (
	// agentProbe is how often a watch looks whether its agent is there, agentProbeTimeout how long an
	// answer may take. An agent that was started anew ends the connection at the first probe.
	agentProbe, agentProbeTimeout = 5 * time.Second, 15 * time.Second
	// agentPoll is how often an agent that has no watch is asked. A stock one remembers a list for 1 s.
	agentPoll = 2 * time.Second
)

// AgentAPI talks to the HTTP API that an agent serves on its own address on the mesh. It asks nobody
// for a credential, so it is sent none. Its methods may run at the same time.
type AgentAPI struct {
	host string
	http *http.Client
	stop context.CancelFunc // of dialling: an HTTP client goes on with it when nobody waits any more
}

// NewAgentAPI returns the API of an agent, of berth or stock; dial connects to [wire.PortHTTP] there.
func NewAgentAPI(agent uuid.UUID, dial func(context.Context) (net.Conn, error)) *AgentAPI {
	open, stop := context.WithCancel(context.Background())
	return &AgentAPI{
		host: netip.AddrPortFrom(wire.AgentAddr(agent), wire.PortHTTP).String(),
		stop: stop,
		http: &http.Client{
			Transport: &http.Transport{
				DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
					ctx, cancel := context.WithTimeout(ctx, answerTimeout)
					defer cancel()
					defer context.AfterFunc(open, cancel)()
					return dial(ctx)
				},
				ResponseHeaderTimeout: answerTimeout,
				IdleConnTimeout:       time.Minute,
			},
			// An agent must not send this program elsewhere.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
}

// Close ends dialling, and connections that are kept for the next request. Watches end by their context.
func (a *AgentAPI) Close() {
	a.stop()
	a.http.CloseIdleConnections()
}

// WatchPorts yields every port that something listens on in the workspace, at once and whenever they
// have changed, until ctx is done or the connection breaks; with hidden, those of berthd itself and of
// editors' helpers too. An error is the last thing yielded. An agent without a watch is asked every two
// seconds.
func (a *AgentAPI) WatchPorts(ctx context.Context, hidden bool) iter.Seq2[wire.ListeningPorts, error] {
	return watchAgent[wire.ListeningPorts](ctx, a, wire.PathAgentPorts, everyPort(hidden))
}

// WatchContainers yields the containers beside the agent, as [AgentAPI.WatchPorts] does ports.
func (a *AgentAPI) WatchContainers(ctx context.Context) iter.Seq2[wire.Containers, error] {
	return watchAgent[wire.Containers](ctx, a, wire.PathAgentContainers, nil)
}

// ScriptLog returns all that is kept of what a script with this log source has printed, to be closed.
func (a *AgentAPI) ScriptLog(ctx context.Context, source uuid.UUID) (io.ReadCloser, error) {
	resp, err := a.request(ctx, wire.PathAgentScriptLogs+source.String(), nil)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		return nil, wire.ReadError(resp)
	}
	return resp.Body, nil
}

// watchAgent yields what is at a path, by the watch below it or, where there is none, by asking again.
func watchAgent[T any](ctx context.Context, a *AgentAPI, path string, query url.Values) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		next, done, err := a.watch(ctx, path, query)
		if noWatch(err) {
			next, done, err = a.poll(ctx, path, query), func() {}, nil
		}
		if err != nil {
			yield(*new(T), err)
			return
		}
		defer done()
		for {
			data, err := next()
			var list T
			if err == nil {
				list, err = decodeList[T](data)
			}
			if ctx.Err() != nil || !yield(list, err) || err != nil {
				return
			}
		}
	}
}

// noWatch tells whether an agent answered that it has no such watch: stock agents do not know the
// path, and a proxy in between may not know WebSockets.
func noWatch(err error) bool {
	var page *wire.UnexpectedResponse
	if errors.As(err, &page) {
		return page.StatusCode == http.StatusNotFound || page.StatusCode == http.StatusMethodNotAllowed || page.StatusCode == http.StatusUpgradeRequired
	}
	var answer *wire.Error
	return errors.As(err, &answer) && answer.StatusCode == http.StatusNotFound
}

// watch opens the WebSocket below a path; next reads one message of it.
func (a *AgentAPI) watch(ctx context.Context, path string, query url.Values) (next func() ([]byte, error), done func(), err error) {
	u := url.URL{Scheme: "ws", Host: a.host, Path: path + "/watch", RawQuery: query.Encode()}
	dialing, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	conn, resp, err := websocket.Dial(dialing, u.String(), &websocket.DialOptions{
		HTTPClient:      a.http,
		CompressionMode: websocket.CompressionNoContextTakeover, // lists are long and repeat themselves
	})
	if err != nil {
		if resp != nil && resp.StatusCode != http.StatusSwitchingProtocols {
			return nil, nil, wire.ReadError(resp)
		}
		return nil, nil, bare(err)
	}
	conn.SetReadLimit(wire.MaxJSONAnswer)
	probing, stop := context.WithCancel(ctx)
	go probeAgent(probing, conn)
	next = func() ([]byte, error) {
		_, data, err := conn.Read(ctx)
		if err != nil {
			return nil, fmt.Errorf("the watch ended: %w", err)
		}
		return data, nil
	}
	return next, func() { stop(); conn.CloseNow() }, nil
}

// probeAgent closes a watch whose agent does not answer any more: one that has nothing to say is silent.
func probeAgent(ctx context.Context, conn *websocket.Conn) {
	tick := time.NewTicker(agentProbe)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		probing, cancel := context.WithTimeout(ctx, agentProbeTimeout)
		err := conn.Ping(probing)
		cancel()
		if err != nil {
			conn.CloseNow()
			return
		}
	}
}

// poll asks for a path again and again; next returns an answer that differs from the one before.
func (a *AgentAPI) poll(ctx context.Context, path string, query url.Values) (next func() ([]byte, error)) {
	var last []byte
	return func() ([]byte, error) {
		for {
			if last != nil {
				select {
				case <-ctx.Done():
					return nil, ctx.Err()
				case <-time.After(agentPoll):
				}
			}
			data, err := a.get(ctx, path, query)
			if err != nil {
				return nil, err
			}
			if last == nil || !bytes.Equal(data, last) {
				last = data
				return data, nil
			}
		}
	}
}

// request gets what is at a path, whatever the answer's status.
func (a *AgentAPI) request(ctx context.Context, path string, query url.Values) (*http.Response, error) {
	u := url.URL{Scheme: "http", Host: a.host, Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := a.http.Do(req)
	if err != nil {
		return nil, bare(err)
	}
	return resp, nil
}

// get returns the JSON at a path.
func (a *AgentAPI) get(ctx context.Context, path string, query url.Values) (json.RawMessage, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	resp, err := a.request(ctx, path, query)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var body json.RawMessage
	err = wire.ReadJSON(resp, http.StatusOK, &body)
	return body, err
}

// bare takes off what says at which URL something failed: an agent's address means nothing to people.
func bare(err error) error {
	if u := new(url.Error); errors.As(err, &u) {
		return u.Err
	}
	return err
}

// decodeList decodes one list of a watch.
func decodeList[T any](data []byte) (T, error) {
	var list T
	dec := json.NewDecoder(bytes.NewReader(data))
	if err := dec.Decode(&list); err != nil {
		return *new(T), fmt.Errorf("cannot read what the agent says: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return *new(T), errors.New("cannot read what the agent says: something follows the list")
	}
	return list, nil
}
