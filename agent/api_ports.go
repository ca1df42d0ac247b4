package agent

import (
	"context"
	"net/http"
	"slices"

	"github.com/berthd/berth/wire"
)

// portView is what shows listening ports; [ports.Lister] is one.
type portView interface {
	List(ctx context.Context) ([]wire.ListeningPort, error)
	Watch(ctx context.Context, changed func([]wire.ListeningPort) error) error
	Source() string
}

// routePorts adds what is known of listening ports.
func (a *api) routePorts(mux *http.ServeMux) {
	mux.HandleFunc("GET "+wire.PathAgentPorts, func(w http.ResponseWriter, r *http.Request) {
		if list, ok := a.firstPorts(w, r); ok {
			writeJSON(w, http.StatusOK, a.showPorts(r, list))
		}
	})
	mux.HandleFunc("GET "+wire.PathAgentPorts+"/watch", func(w http.ResponseWriter, r *http.Request) {
		if _, ok := a.firstPorts(w, r); !ok {
			return
		}
		a.watch(w, r, &a.portWatchers, func(ctx context.Context, send func(any) error) error {
			return a.ports.Watch(ctx, func(list []wire.ListeningPort) error { return send(a.showPorts(r, list)) })
		})
	})
}

// firstPorts lists the ports, or answers why that cannot be done.
func (a *api) firstPorts(w http.ResponseWriter, r *http.Request) ([]wire.ListeningPort, bool) {
	list, err := a.ports.List(r.Context())
	if err != nil {
		a.log.Warn("cannot list listening ports", "error", err)
		writeError(w, http.StatusInternalServerError, "Could not scan for listening ports.", err)
	}
	return list, err == nil
}

// showPorts returns what a request asks for. Stock servers know TCP ports alone, and take each for one
// of the workspace itself.
func (a *api) showPorts(r *http.Request, list []wire.ListeningPort) wire.ListeningPorts {
	query := r.URL.Query()
	all, hidden := query.Get(wire.QueryNetwork) == wire.NetworkAll, query.Get(wire.QueryHidden) == "true"
	shown := slices.DeleteFunc(append([]wire.ListeningPort{}, list...), func(p wire.ListeningPort) bool {
		return p.Port < wire.FirstUserPort || !hidden && p.Hidden != "" || !all && (p.Network != "tcp" || p.Namespace != 0)
	})
	return wire.ListeningPorts{Ports: shown, Source: a.ports.Source()}
}
