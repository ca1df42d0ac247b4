package client

import (
	"context"
	"errors"
	"net/http"
	"net/url"

	"github.com/coder/websocket"
	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/rpc"
	"github.com/berthd/berth/wire/tailnetpb"
)

// Link is one RPC session with the server. It does not reconnect by itself.
type Link struct {
	// Agent is nil on a link made by [Client.Coordinate].
	Agent   agentpb.DRPCAgentClient
	Tailnet tailnetpb.DRPCTailnetClient
	// Version is the API version of this session.
	Version wire.Version

	rpc *rpc.Client
}

// Done is closed when the session has ended, from either side.
func (l *Link) Done() <-chan struct{} { return l.rpc.Closed() }

// Close ends the session and with it every call on it.
func (l *Link) Close() error { return l.rpc.Close() }

// ConnectAgent opens the link of an agent. It asks for the newest version and steps down to what the
// server says it speaks, which is remembered for the next time.
func (c *Client) ConnectAgent(ctx context.Context) (*Link, error) {
	version := wire.CurrentVersion
	if v := c.version.Load(); v != nil {
		version = *v
	}
	session, err := c.agentSession(ctx, version)
	// More than once only where servers of several versions stand behind one address.
	for v, ok := olderServer(err); ok && v.Minor < version.Minor; v, ok = olderServer(err) {
		version = v
		session, err = c.agentSession(ctx, version)
	}
	if err != nil {
		// Next time ask anew: the server may have been upgraded, or be another.
		c.version.Store(nil)
		return nil, err
	}
	c.version.Store(&version)
	return &Link{
		Agent:   agentpb.NewDRPCAgentClient(session),
		Tailnet: tailnetpb.NewDRPCTailnetClient(session),
		Version: version,
		rpc:     session,
	}, nil
}

func (c *Client) agentSession(ctx context.Context, version wire.Version) (*rpc.Client, error) {
	return c.session(ctx, wire.PathMe+"rpc", url.Values{"version": {version.String()}, "role": {"agent"}})
}

// olderServer reads the version a server is at from its refusal of a newer one.
func olderServer(err error) (wire.Version, bool) {
	var e *wire.Error
	if !errors.As(err, &e) || e.StatusCode != http.StatusBadRequest {
		return wire.Version{}, false
	}
	detail, ok := e.Validation("version")
	if !ok {
		return wire.Version{}, false
	}
	return wire.ServerVersion(detail)
}

// coordinateVersion is what a client needs: resume tokens may still be called, and are answered
// "unimplemented" by servers that lack them.
var coordinateVersion = wire.Version{Major: 2, Minor: 0}

// Coordinate opens the link of a client to one agent. A resume token, if there is one, keeps the
// identity on the mesh of the link that it came from; one that the server no longer takes is left out.
func (c *Client) Coordinate(ctx context.Context, agent uuid.UUID, resumeToken string) (*Link, error) {
	query := url.Values{"version": {coordinateVersion.String()}}
	if resumeToken != "" {
		query.Set("resume_token", resumeToken)
	}
	session, err := c.session(ctx, agentPath(agent, "/coordinate"), query)
	var e *wire.Error
	if resumeToken != "" && errors.As(err, &e) && e.StatusCode == http.StatusUnauthorized {
		if _, ok := e.Validation("resume_token"); ok {
			return c.Coordinate(ctx, agent, "")
		}
	}
	if err != nil {
		return nil, err
	}
	return &Link{Tailnet: tailnetpb.NewDRPCTailnetClient(session), Version: coordinateVersion, rpc: session}, nil
}

// session opens a WebSocket and an RPC session on it. The context bounds the opening only.
func (c *Client) session(ctx context.Context, path string, query url.Values) (*rpc.Client, error) {
	conn, err := c.dial(ctx, path, query)
	if err != nil {
		return nil, err
	}
	// The stream has no message limit; what is on it is bounded where it is decoded.
	conn.SetReadLimit(-1)
	return rpc.NewClient(websocket.NetConn(context.Background(), conn, websocket.MessageBinary))
}
