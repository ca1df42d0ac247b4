package client

import (
	"context"
	"net/http"
	"net/url"

	"github.com/berthd/berth/wire"
)

// GitSSHKey returns the key pair that the workspace's owner uses with git. The client's token must be
// an agent's.
func (c *Client) GitSSHKey(ctx context.Context) (wire.GitSSHKey, error) {
	var key wire.GitSSHKey
	err := c.call(ctx, http.MethodGet, wire.PathMe+"gitsshkey", nil, nil, http.StatusOK, &key)
	return key, err
}

// ExternalAuthQuery says which credential of the workspace's owner is asked for: by the id of its
// provider, or by a URL that one of the providers is for. Exactly one of them must be set.
type ExternalAuthQuery struct {
	ID, Match string
	// Listen lets the server answer only once the owner has logged in.
	Listen bool
}

// ExternalAuth asks for a credential for a service that is not the control server's. The client's
// token must be an agent's.
func (c *Client) ExternalAuth(ctx context.Context, q ExternalAuthQuery) (wire.ExternalAuth, error) {
	query := url.Values{}
	if q.ID != "" {
		query.Set("id", q.ID)
	}
	if q.Match != "" {
		query.Set("match", q.Match)
	}
	if q.Listen {
		query.Set("listen", "")
	}
	var auth wire.ExternalAuth
	err := c.call(ctx, http.MethodGet, wire.PathMe+"external-auth", query, nil, http.StatusOK, &auth)
	return auth, err
}
