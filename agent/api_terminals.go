package agent

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"

	"github.com/google/uuid"

	"github.com/berthd/berth/ptyhost"
	"github.com/berthd/berth/wire"
)

// routeTerminals adds what is berth's own: the terminals that port 2 attaches to, listed, renamed and closed.
func (a *api) routeTerminals(mux *http.ServeMux) {
	const one = wire.PathAgentTerminals + "/{terminal}"
	mux.HandleFunc("GET "+wire.PathAgentTerminals, a.getTerminals)
	mux.HandleFunc("GET "+one, a.getTerminal)
	mux.HandleFunc("PATCH "+one, notRedirected(a.patchTerminal))
	mux.HandleFunc("DELETE "+one, notRedirected(a.deleteTerminal))
}

// notRedirected refuses what another server sent a client on to: a hostile agent must not have a control
// server that follows redirects close the terminals of another. Clients name in Referer where they come from.
func notRedirected(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Referer() != "" {
			writeError(w, http.StatusForbidden, "Terminals are changed by direct requests only, without a Referer.", nil)
			return
		}
		next(w, r)
	}
}

func (a *api) getTerminals(w http.ResponseWriter, r *http.Request) {
	all, err := a.terminals.list(r.Context())
	if err != nil {
		writeTerminalError(w, err)
		return
	}
	answer := wire.Terminals{Terminals: make([]wire.Terminal, 0, len(all))}
	for _, info := range all {
		answer.Terminals = append(answer.Terminals, describeTerminal(info))
	}
	writeJSON(w, http.StatusOK, answer)
}

func (a *api) getTerminal(w http.ResponseWriter, r *http.Request) {
	info, err := a.findTerminal(r.Context(), r.PathValue("terminal"))
	if err != nil {
		writeTerminalError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, describeTerminal(info))
}

func (a *api) patchTerminal(w http.ResponseWriter, r *http.Request) {
	var change wire.TerminalChange
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, wire.MaxJSONBody))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&change); err != nil {
		writeError(w, http.StatusBadRequest, "Request body must be valid JSON.", err)
		return
	}
	if change.Name == nil {
		writeError(w, http.StatusBadRequest, "There is nothing to change: give a name.", nil)
		return
	}
	info, err := a.findTerminal(r.Context(), r.PathValue("terminal"))
	if err == nil {
		err = a.terminals.rename(r.Context(), info.ID, *change.Name)
	}
	if err == nil {
		info, err = a.findTerminal(r.Context(), info.ID)
	}
	if err != nil {
		writeTerminalError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, describeTerminal(info))
}

// deleteTerminal closes a terminal. It answers when that has begun: the program gets a hang-up, and is
// killed 3 s later if it stays.
func (a *api) deleteTerminal(w http.ResponseWriter, r *http.Request) {
	info, err := a.findTerminal(r.Context(), r.PathValue("terminal"))
	if err == nil {
		err = a.terminals.close(r.Context(), info.ID)
	}
	if err != nil {
		writeTerminalError(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// findTerminal returns the terminal with this id or name.
func (a *api) findTerminal(ctx context.Context, key string) (shownTerminal, error) {
	all, err := a.terminals.list(ctx)
	if err != nil {
		return shownTerminal{}, err
	}
	id, _ := uuid.Parse(key) // the zero id is nobody's
	for _, info := range all {
		if info.ID == id.String() || info.Name == key {
			return info, nil
		}
	}
	return shownTerminal{}, ptyhost.ErrNoSession
}

func writeTerminalError(w http.ResponseWriter, err error) {
	switch {
	case errors.Is(err, ptyhost.ErrNoSession):
		writeError(w, http.StatusNotFound, "There is no such terminal: it has ended, or never was.", nil)
	case errors.Is(err, ptyhost.ErrNameTaken):
		writeError(w, http.StatusConflict, "Another terminal has this name.", nil)
	case errors.Is(err, ptyhost.ErrBadName):
		writeError(w, http.StatusBadRequest, "A terminal's name has 1 to 128 bytes of characters that can be printed, and is no id.", err)
	case errors.Is(err, ptyhost.ErrHostOld):
		writeError(w, http.StatusNotImplemented, "This cannot be done until the workspace starts again.", err)
	default:
		writeError(w, http.StatusInternalServerError, "The process that owns the terminals does not answer.", err)
	}
}

func describeTerminal(info shownTerminal) wire.Terminal {
	id, _ := uuid.Parse(info.ID) // the host makes all of them
	t := wire.Terminal{
		ID: id, Name: info.Name, Title: info.Title, Command: info.Command, Running: info.Running, Directory: info.Directory, Container: info.Container, Kind: info.Kind,
		PID: info.PID, Rows: info.Size.Rows, Cols: info.Size.Cols, Viewers: info.Viewers,
		CreatedAt: info.Created, ActiveAt: info.LastActive, EndsAt: info.EndsAt, CutOffAt: info.cutOff,
	}
	if e := info.Exited; e != nil {
		t.Exited = &wire.PTYEnding{Code: e.Code, Signal: e.Signal, Reason: e.Reason}
	}
	return t
}
