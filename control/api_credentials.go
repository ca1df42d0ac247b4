package control

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
)

// externalAuthPath is where a person reads what is to be done for a provider without a token.
const externalAuthPath = "/external-auth/"

// findProvider returns the provider that a query is about.
func findProvider(providers []*provider, query url.Values) (*provider, *wire.Error) {
	bad := func(message string) (*provider, *wire.Error) {
		return nil, &wire.Error{StatusCode: http.StatusBadRequest, Message: message}
	}
	match, id := query.Get("match"), query.Get("id")
	if match == "" {
		match = query.Get("url")
	}
	switch {
	case match == "" && id == "":
		return bad("'url' or 'id' must be provided!")
	case match != "" && id != "":
		return bad("'url' and 'id' cannot be provided together!")
	}
	known := make([]string, 0, len(providers))
	for _, p := range providers {
		if id != "" && p.id == id || match != "" && p.regex.MatchString(match) {
			return p, nil
		}
		known = append(known, fmt.Sprintf("%s (%s)", p.id, p.regex))
	}
	what, asked := "url", match
	if id != "" {
		what, asked = "id", id
	}
	detail := "No providers are declared; the server's configuration file has a place for them, external_auth."
	if len(known) > 0 {
		detail = "Providers: " + strings.Join(known, ", ")
	}
	return nil, &wire.Error{StatusCode: http.StatusNotFound, Detail: detail,
		Message: fmt.Sprintf("No matching external auth provider found in Coder for the %s %q.", what, short(asked))}
}

// getExternalAuth gives an agent a credential of its owner, or says where he can get one.
func (s *Server) getExternalAuth(w http.ResponseWriter, r *http.Request, agent caller) {
	query := r.URL.Query()
	p, e := findProvider(s.declaredProviders(), query)
	if e != nil {
		writeError(w, e)
		return
	}
	ctx, done := s.lasting(r)
	defer done()
	c, err := p.credential(ctx)
	if query.Has("listen") && errors.Is(err, errNoToken) {
		p, c, err = s.awaitCredential(ctx, p, agent.tokenHash)
		extendWrite(w) // it may have taken long
	}
	switch {
	case errors.Is(err, errTokenEnded):
		writeError(w, notAuthorized())
	case errors.Is(err, errNoToken):
		writeJSON(w, http.StatusOK, wire.ExternalAuth{URL: s.config.AccessURL.JoinPath(externalAuthPath, p.id).String()})
	case err != nil && ctx.Err() != nil:
		writeError(w, &wire.Error{StatusCode: http.StatusServiceUnavailable, Message: "The server is shutting down."}) // or nobody is there to read it
	case err != nil:
		s.log.Warn("cannot give an agent a credential", "agent", agent.Name, "err", err)
		writeError(w, internalError(err))
	default:
		s.log.Info("gave an agent a credential", "agent", agent.Name, "provider", p.id)
		username, password := gitLogin(p.kind, c.token)
		writeJSON(w, http.StatusOK, wire.ExternalAuth{
			AccessToken: c.token.Reveal(), TokenExtra: c.extra, Type: p.kind, ExpiresAt: c.expires, Username: username, Password: password,
		})
	}
}

// errTokenEnded is why an agent waits no more for a credential.
var errTokenEnded = errors.New("the token of the agent has ended")

// awaitCredential waits for a provider, as it is declared at the time, to have a credential, until ctx
// is done or the agent's token has ended. What else goes wrong meanwhile may pass.
func (s *Server) awaitCredential(ctx context.Context, p *provider, tokenHash string) (*provider, credential, error) {
	ticker := time.NewTicker(askedFor)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return p, credential{}, ctx.Err()
		case <-ticker.C:
		}
		now, c, err := p, credential{}, errNoToken
		for _, declared := range s.declaredProviders() {
			if declared.id == p.id {
				now = declared
				c, err = declared.credential(ctx)
			}
		}
		// After that, which may have taken its time.
		if _, ended := s.store.TokenByHash(ctx, tokenHash); errors.Is(ended, store.ErrNotFound) {
			return p, credential{}, errTokenEnded
		}
		if err == nil {
			return now, c, nil
		}
	}
}

func (s *Server) declaredProviders() []*provider {
	if providers := s.providers.Load(); providers != nil {
		return *providers
	}
	return nil
}

// getExternalAuthPage tells a person who was sent here what is missing. It says no more than what the
// link that led here did.
func (s *Server) getExternalAuthPage(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = io.WriteString(w, "berth has no page to log in at. Whoever runs this control server puts the token where its\n"+
		"configuration file says (external_auth: token_file, or command); what waits for it goes on by itself.\n")
}

// gitSSHKey is the key pair of the owner, made when it is first asked for.
func (s *Server) gitSSHKey(ctx context.Context) (wire.GitSSHKey, error) {
	kept, err := s.store.Once(ctx, "git-ssh-key."+owner, func() ([]byte, error) {
		public, private, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			return nil, fmt.Errorf("cannot make an SSH key: %w", err)
		}
		line, err := ssh.NewPublicKey(public)
		if err != nil {
			return nil, fmt.Errorf("cannot make an SSH key: %w", err)
		}
		block, err := ssh.MarshalPrivateKey(private, owner)
		if err != nil {
			return nil, fmt.Errorf("cannot make an SSH key: %w", err)
		}
		return json.Marshal(wire.GitSSHKey{PublicKey: string(ssh.MarshalAuthorizedKey(line)), PrivateKey: string(pem.EncodeToMemory(block))})
	})
	var key wire.GitSSHKey
	if err == nil {
		err = json.Unmarshal(kept, &key)
	}
	return key, err
}

func (s *Server) getGitSSHKey(w http.ResponseWriter, r *http.Request, _ caller) {
	key, err := s.gitSSHKey(r.Context())
	if err != nil {
		writeError(w, internalError(err))
		return
	}
	writeJSON(w, http.StatusOK, key)
}
