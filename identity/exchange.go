package identity

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/berthd/berth/wire"
)

// exchangeTimeout bounds one exchange; stock agents wait as long.
const exchangeTimeout = 10 * time.Second

// Exchanger trades a proof of identity for a session token at the control server.
type Exchanger struct {
	// URL is the server's access URL.
	URL *url.URL
	// HTTP makes the request, through whatever proxy and CA the server needs. It should follow no
	// redirect: the proof is for this server. It is not used for metadata services.
	HTTP *http.Client
	// Header is added to the request.
	Header http.Header
}

// AWS exchanges an EC2 instance identity document.
func (e *Exchanger) AWS(ctx context.Context, proof wire.AWSInstanceIdentity) (wire.Secret, error) {
	return e.exchange(ctx, "aws", proof)
}

// exchange posts proof to the endpoint of a provider.
func (e *Exchanger) exchange(ctx context.Context, provider string, proof any) (wire.Secret, error) {
	ctx, cancel := context.WithTimeout(ctx, exchangeTimeout)
	defer cancel()
	body, err := json.Marshal(proof)
	if err != nil {
		return "", fmt.Errorf("cannot encode the identity: %w", err)
	}
	endpoint := e.URL.JoinPath("api/v2/workspaceagents", provider+"-instance-identity")
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, endpoint.String(), bytes.NewReader(body))
	if err != nil {
		return "", fmt.Errorf("cannot exchange the identity: %w", err)
	}
	if e.Header != nil {
		req.Header = e.Header.Clone()
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := e.HTTP.Do(req)
	if err != nil {
		return "", fmt.Errorf("cannot exchange the identity: %w", err)
	}
	defer resp.Body.Close()
	var answer wire.SessionToken
	if err := wire.ReadJSON(resp, http.StatusOK, &answer); err != nil {
		return "", fmt.Errorf("cannot exchange the identity: %w", err)
	}
	token, err := clean(answer.SessionToken)
	if err != nil {
		return "", fmt.Errorf("cannot use the server's answer: %w", err)
	}
	return token, nil
}
