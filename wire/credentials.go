package wire

import (
	"encoding/json"
	"time"
)

// GitSSHKey answers GET workspaceagents/me/gitsshkey: the key pair of the workspace's owner. The
// private half is for the holder of the agent's token only.
type GitSSHKey struct {
	// PublicKey is a line of authorized_keys, PrivateKey is PEM.
	PublicKey  string `json:"public_key"`
	PrivateKey string `json:"private_key"`
}

// ExternalAuth answers GET workspaceagents/me/external-auth. Either only URL means something, and the
// owner is to log in there first, or URL is empty and the rest is a credential.
type ExternalAuth struct {
	AccessToken string          `json:"access_token"`
	TokenExtra  json.RawMessage `json:"token_extra"`
	URL         string          `json:"url"`
	// Type is the kind of provider, such as github or gitlab.
	Type string `json:"type"`
	// ExpiresAt is when the token ends; zero means never, or unknown.
	ExpiresAt time.Time `json:"expires_at"`
	// Username and Password are the token in the form that git wants for this provider. Without a
	// password the user name is the token.
	Username string `json:"username"`
	Password string `json:"password"`
}
