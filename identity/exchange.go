package identity

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/berthd/berth/wire"
)

// exchangeTimeout bounds one exchange; stock agents wait as long.
const exchangeTimeout = 10 * time.Second

// challengeLength and maxAudience bound what a server may have a cloud sign, in bytes.
const (
	challengeLength = 32
	maxAudience     = 2 << 10
)

// Exchanger trades a proof of identity for a session token at the control server. It answers the
// server's challenge, and adds the machine's own proof key, where the server knows of them; a stock
// server does not.
type Exchanger struct {
	// URL is the server's access URL.
	URL *url.URL
	// HTTP makes the requests, through whatever proxy and CA the server needs. It should follow no
	// redirect: the proof is for this server. It is not used for metadata services.
	HTTP *http.Client
	// Header is added to the requests.
	Header http.Header
	// ProofKey is the file that keeps this machine's proof key, which is made at the first exchange.
	// Empty means that there is none.
	ProofKey string
}

// challenge asks for one. It is empty when the server knows no challenges.
func (e *Exchanger) challenge(ctx context.Context, provider string) (wire.IdentityChallenge, error) {
	var challenge wire.IdentityChallenge
	err := e.post(ctx, wire.PathIdentityChallenge, wire.IdentityChallengeRequest{Provider: provider}, &challenge)
	switch {
	case unknownRoute(err):
		return wire.IdentityChallenge{}, nil
	case err != nil:
		return wire.IdentityChallenge{}, fmt.Errorf("cannot ask for a challenge: %w", err)
	}
	if err := checkChallenge(provider, challenge); err != nil {
		return wire.IdentityChallenge{}, fmt.Errorf("cannot use the server's challenge: %w", err)
	}
	return challenge, nil
}

// unknownRoute tells whether the server does not know what was asked. Challenges need no token, so one
// who wants one does not know them; and what stands before a server may refuse strange paths itself.
func unknownRoute(err error) bool {
	if answer := new(wire.Error); errors.As(err, &answer) {
		switch answer.StatusCode {
		case http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusUnauthorized:
			return true
		}
		return false
	}
	if other := new(wire.UnexpectedResponse); errors.As(err, &other) {
		switch other.StatusCode {
		case http.StatusProxyAuthRequired, http.StatusTooManyRequests, http.StatusUpgradeRequired:
			return false
		}
		return other.StatusCode >= 400 && other.StatusCode < 500
	}
	return false
}

// checkChallenge keeps a server from having something signed that serves elsewhere: a nonce or an
// audience is good for a control server only.
func checkChallenge(provider string, c wire.IdentityChallenge) error {
	if len(c.Challenge) != challengeLength || strings.Trim(c.Challenge, "abcdefghijklmnopqrstuvwxyz0123456789") != "" {
		return fmt.Errorf("it is not %d letters and digits", challengeLength)
	}
	if provider != wire.ProviderGoogle {
		return nil
	}
	if len(c.Audience) > maxAudience || !strings.HasPrefix(c.Audience, "http") || !strings.HasSuffix(c.Audience, "?challenge="+c.Challenge) {
		return errors.New("its audience is not a control server's URL with the challenge at its end")
	}
	return nil
}

// exchange posts a proof to the endpoint of its provider.
func (e *Exchanger) exchange(ctx context.Context, provider string, challenge wire.IdentityChallenge, signed proof) (wire.Secret, error) {
	if challenge.Challenge != "" {
		signed.own.Challenge = challenge.Challenge
		if err := e.prove(provider, signed); err != nil {
			return "", err
		}
	}
	var answer wire.SessionToken
	if err := e.post(ctx, "/api/v2/workspaceagents/"+provider+"-instance-identity", signed.body, &answer); err != nil {
		return "", fmt.Errorf("cannot exchange the identity: %w", err)
	}
	token, problem := clean(answer.SessionToken)
	if problem != "" {
		return "", fmt.Errorf("cannot use the token that the server gave: %s", problem)
	}
	return token, nil
}

// prove adds the signature of this machine's own key.
func (e *Exchanger) prove(provider string, signed proof) error {
	if e.ProofKey == "" {
		return nil
	}
	key, err := loadProofKey(e.ProofKey)
	if err != nil {
		return err
	}
	signed.own.ProofKey = base64.StdEncoding.EncodeToString(key.Public().(ed25519.PublicKey))
	signature := ed25519.Sign(key, wire.IdentityProofMessage(provider, signed.own.Challenge, signed.payload))
	signed.own.Proof = base64.StdEncoding.EncodeToString(signature)
	return nil
}

// post makes one request to the server.
func (e *Exchanger) post(ctx context.Context, path string, body, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, exchangeTimeout)
	defer cancel()
	text, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("cannot encode the request: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, e.URL.JoinPath(path).String(), bytes.NewReader(text))
	if err != nil {
		return err
	}
	if e.Header != nil {
		req.Header = e.Header.Clone()
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := e.HTTP.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return wire.ReadJSON(resp, http.StatusOK, answer)
}
