package agent

import (
	"context"
	"net/http"
	"slices"
	"time"

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
			following := func() {}
			defer func() { following() }()
			asked := false
			return a.ports.Watch(ctx, func(list []wire.ListeningPort) error {
				if !asked && a.unnamed(r, list) {
					asked = true
					_, following = a.containers.watch()
				}
				return send(a.showPorts(r, list))
			})
		})
	})
}

// namesWait is how long a list of ports waits for engines that were not asked yet: one that is well
// answers within 0.1 s.
const namesWait = 500 * time.Millisecond

// firstPorts lists the ports, or answers why that cannot be done.
func (a *api) firstPorts(w http.ResponseWriter, r *http.Request) ([]wire.ListeningPort, bool) {
	list, err := a.ports.List(r.Context())
	if err == nil && a.unnamed(r, list) {
		ctx, cancel := context.WithTimeout(r.Context(), namesWait)
		_, engines := a.containers.list(ctx)
		cancel()
		if engines == nil {
			list, err = a.ports.List(r.Context())
		}
	}
	if err != nil {
		a.log.Warn("cannot list listening ports", "error", err)
		writeError(w, http.StatusInternalServerError, "Could not scan for listening ports.", err)
	}
	return list, err == nil
}

// unnamed tells whether engines are to be asked for the names in a list: for somebody who is shown the
// ports of containers, and where there may be any. Others do not wake an engine that sleeps.
func (a *api) unnamed(r *http.Request, list []wire.ListeningPort) bool {
	return a.containers.refusal == "" && r.URL.Query().Get(wire.QueryNetwork) == wire.NetworkAll &&
		slices.ContainsFunc(list, func(p wire.ListeningPort) bool { return p.Namespace != 0 || p.Container != "" })
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
