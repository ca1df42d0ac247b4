package agent

import (
	"context"
	"errors"

	"github.com/google/uuid"

	"github.com/berthd/berth/client"
)

// errReinit ends an agent because its workspace has an owner now, for whom it starts anew.
var errReinit = errors.New("the workspace was given to an owner")

// claims is what is remembered of owners over the agents of one process.
type claims struct {
	owner uuid.UUID // whom the workspace was given to; nil if nobody is known
	over  bool      // no other will come
}

// runReinit waits for the workspace to be given to an owner, and ends the agent then. A workspace that
// was made for its owner has that told once.
func (a *agent) runReinit(ctx context.Context) error {
	// Before the first manifest there may be no token to ask with.
	if _, ok := a.first.wait(ctx); !ok {
		return nil
	}
	for pace := client.NewPace(); !a.claims.over; {
		event, err := a.server.AwaitReinit(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, client.ErrNoReinit):
			a.log.Debug("the workspace does not wait for an owner", "error", err)
			a.claims.over = true
		case err != nil:
			a.log.Debug("cannot hear of an owner; asking again", "error", err)
			if !pause(ctx, pace.Soon()) {
				return nil
			}
		case event.OwnerID != uuid.Nil && event.OwnerID == a.claims.owner:
			a.claims.over = true
		default:
			a.claims.owner = event.OwnerID
			return errReinit
		}
	}
	<-ctx.Done()
	return nil
}
