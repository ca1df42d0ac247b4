package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
)

// routeContainers adds what is known of containers. Switched off, only the list itself says so: the
// rest is not there.
func (a *api) routeContainers(mux *http.ServeMux) {
	if refusal := a.containers.refusal; refusal != "" {
		mux.HandleFunc("GET "+wire.PathAgentContainers, func(w http.ResponseWriter, _ *http.Request) {
			writeError(w, http.StatusForbidden, refusal, nil)
		})
		return
	}
	mux.HandleFunc("GET "+wire.PathAgentContainers, a.listContainers)
	mux.HandleFunc("GET "+wire.PathAgentContainers+"/watch", a.watchContainers)
	mux.HandleFunc("POST "+wire.PathAgentContainers+"/devcontainers/{id}/recreate", a.recreateDevcontainer)
	mux.HandleFunc("DELETE "+wire.PathAgentContainers+"/devcontainers/{id}", a.deleteDevcontainer)
}

// firstContainers lists the containers, or answers why that cannot be done.
func (a *api) firstContainers(w http.ResponseWriter, r *http.Request) (wire.Containers, bool) {
	list, err := a.containers.get(r.Context())
	if err != nil {
		a.log.Warn("cannot list containers", "error", err)
		writeError(w, http.StatusInternalServerError, "Could not get containers", err)
		return wire.Containers{}, false
	}
	return list, true
}

func (a *api) listContainers(w http.ResponseWriter, r *http.Request) {
	if list, ok := a.firstContainers(w, r); ok {
		writeJSON(w, http.StatusOK, list)
	}
}

// watchContainers sends the list at once and whenever it has changed.
func (a *api) watchContainers(w http.ResponseWriter, r *http.Request) {
	changed, stop := a.containers.watch()
	defer stop()
	ours := a.containers.changes()
	list, ok := a.firstContainers(w, r)
	if !ok {
		return
	}
	a.watch(w, r, &a.watchers, func(ctx context.Context, send func(any) error) error {
		for {
			message, err := watchMessage(list)
			if err != nil {
				return err
			}
			if err := send(message); err != nil {
				return err
			}
			select {
			case <-ctx.Done():
				return nil
			case <-changed:
			case <-ours:
				ours = a.containers.changes()
			}
			if next, err := a.containers.get(ctx); err == nil {
				list = next
			}
		}
	})
}

// watchMessage encodes a list for those who watch, who get it as a line. What does not fit into a message that they take is left out, and said.
func watchMessage(list wire.Containers) (json.RawMessage, error) {
	all, warnings := len(list.Containers), list.Warnings
	for {
		message, err := json.Marshal(list)
		if err != nil {
			return nil, err
		}
		if len(message) < wire.MaxContainersMessage || len(list.Containers) == 0 {
			return message, nil
		}
		// They are about of one size; a little less than what would fit then does.
		fit := len(list.Containers) * (wire.MaxContainersMessage / 16) / (len(message) / 15)
		list.Containers = list.Containers[:min(fit, len(list.Containers)-1)]
		list.Warnings = append(slices.Clip(warnings), fmt.Sprintf("%d of %d containers are left out: a watch has no room for more", all-len(list.Containers), all))
	}
}

// findDevcontainer returns the dev container that a path names, or answers that there is none.
func (a *api) findDevcontainer(w http.ResponseWriter, r *http.Request) (wire.Devcontainer, bool) {
	list, ok := a.firstContainers(w, r)
	if !ok {
		return wire.Devcontainer{}, false
	}
	if id, err := uuid.Parse(r.PathValue("id")); err == nil {
		for _, d := range list.Devcontainers {
			if d.ID == id {
				return d, true
			}
		}
	}
	writeError(w, http.StatusNotFound, "Devcontainer not found.", nil)
	return wire.Devcontainer{}, false
}

func (a *api) recreateDevcontainer(w http.ResponseWriter, r *http.Request) {
	d, ok := a.findDevcontainer(w, r)
	if !ok {
		return
	}
	switch err := a.containers.recreate(d); {
	case errors.Is(err, errTransitioning):
		writeError(w, http.StatusConflict, "Unable to recreate transitioning devcontainer", nil)
	case err != nil:
		a.log.Warn("cannot recreate a dev container", "name", d.Name, "error", err)
		writeError(w, http.StatusInternalServerError, "Unable to recreate devcontainer", err)
	default:
		writeJSON(w, http.StatusAccepted, wire.Error{
			Message: "Devcontainer recreation initiated",
			Detail:  `Recreation process for devcontainer "` + d.Name + `" has started.`,
		})
	}
}

// deleteDevcontainer refuses: berthd enters containers and lists them, and removes none. An API that asks nobody
// for a credential is no place to remove them from.
func (a *api) deleteDevcontainer(w http.ResponseWriter, r *http.Request) {
	d, ok := a.findDevcontainer(w, r)
	switch {
	case !ok:
	case d.Status == devcontainerStarting:
		writeError(w, http.StatusConflict, "Unable to delete transitioning devcontainer", nil)
	default:
		writeError(w, http.StatusInternalServerError, "Unable to delete devcontainer",
			errors.New("berthd removes no containers: remove it with the engine's own command, in the workspace"))
	}
}
