package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/berthd/berth/wire"
)

// ErrNoReinit is returned (wrapped) by [Client.AwaitReinit] when the server will never ask for it.
var ErrNoReinit = errors.New("this workspace does not wait for an owner")

// maxSilence is how long a stream of events may say nothing: servers send a ping every 15 s.
const maxSilence = time.Minute

// PatchAppStatus tells what an app of the calling agent is doing, to a server that has no RPC for it.
func (c *Client) PatchAppStatus(ctx context.Context, status wire.PatchAppStatus) error {
	return c.call(ctx, http.MethodPatch, wire.PathMe+"app-status", nil, status, http.StatusOK, nil)
}

// AwaitReinit waits until the server tells the calling agent to start anew. It fails with
// [ErrNoReinit] if that will never be, and with another error if asking again may help.
func (c *Client) AwaitReinit(ctx context.Context) (wire.Reinitialization, error) {
	event, err := c.awaitReinit(ctx)
	if answer, ok := errors.AsType[*wire.Error](err); ok && answer.StatusCode == http.StatusConflict {
		return event, fmt.Errorf("%w: %w", ErrNoReinit, err)
	}
	if err != nil {
		return event, fmt.Errorf("cannot wait for the workspace's owner: %w", err)
	}
	return event, nil
}

func (c *Client) awaitReinit(ctx context.Context) (wire.Reinitialization, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var event wire.Reinitialization
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url(wire.PathMe+"reinit", url.Values{"wait": {"true"}}), nil)
	if err != nil {
		return event, err
	}
	req.Header = c.header()
	req.Header.Set("Accept", eventStream)
	resp, err := c.config.HTTP.Do(req)
	if err != nil {
		return event, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK || mediaType(resp) != eventStream {
		return event, wire.ReadError(resp)
	}
	silence := time.AfterFunc(maxSilence, func() { cancel(errors.New("the server has fallen silent")) })
	defer silence.Stop()
	events := newEventReader(resp.Body)
	for {
		kind, data, err := events.next()
		switch {
		case ctx.Err() != nil:
			return event, context.Cause(ctx)
		case err != nil:
			return event, err
		case kind == "data":
			if err := json.Unmarshal(data, &event); err != nil {
				return event, fmt.Errorf("cannot decode the event: %w", err)
			}
			return event, nil
		case kind == "error":
			refusal := &wire.Error{Message: "the server reported an error"}
			_ = json.Unmarshal(data, refusal) // as far as it says more
			return event, refusal
		}
		silence.Reset(maxSilence)
	}
}
