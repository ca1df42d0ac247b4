package control

import (
	"encoding/json"
	"io"
	"net/http"

	"github.com/coder/websocket"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
)

func (s *Server) getBuildInfo(w http.ResponseWriter, r *http.Request) {
	writeJSON(w, http.StatusOK, wire.BuildInfo{
		ExternalURL:           "https://github.com/berthd/berth",
		Version:               s.config.Version,
		DashboardURL:          s.config.AccessURL.String(),
		AgentAPIVersion:       "1.0", // a constant that clients expect; the link negotiates its own version
		ProvisionerAPIVersion: "1.0",
		DeploymentID:          s.id.String(),
	})
}

func getOK(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = io.WriteString(w, "OK")
}

func getLatencyCheck(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Access-Control-Allow-Origin", "*")
	w.Header().Set("Timing-Allow-Origin", "*")
	getOK(w, r)
}

// getDERPMap sends the relay map. It does not change while a server runs, so after the first message
// only pings follow.
func (s *Server) getDERPMap(w http.ResponseWriter, r *http.Request) {
	ctx, done := s.lasting(r)
	defer done()
	conn := s.accept(w, r)
	if conn == nil {
		return
	}
	defer conn.CloseNow()
	ctx, stop := readNothing(ctx, conn)
	defer stop()
	out, err := conn.Writer(ctx, websocket.MessageBinary)
	if err != nil {
		return
	}
	if err := json.NewEncoder(out).Encode(s.relayMap); err != nil {
		return
	}
	if err := out.Close(); err != nil {
		return
	}
	keepAlive(ctx, conn)
	_ = conn.Close(websocket.StatusGoingAway, "") // also when the other side left first
}

func (s *Server) connectionInfo() wire.ConnectionInfo {
	return wire.ConnectionInfo{
		DERPMap:                  s.relayMap,
		DERPForceWebSockets:      s.config.ForceWebSocket,
		DisableDirectConnections: s.config.RelayOnly,
		HostnameSuffix:           "berth",
	}
}

func (s *Server) getConnection(w http.ResponseWriter, r *http.Request) {
	writeJSON(w, http.StatusOK, s.connectionInfo())
}

func (s *Server) getAgentConnection(w http.ResponseWriter, r *http.Request, _ store.Agent) {
	writeJSON(w, http.StatusOK, s.connectionInfo())
}
