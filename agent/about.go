package agent

import (
	"context"
	"fmt"
	"net/http"
	"os"
)

// About is what a running agent tells of itself on its local socket.
type About struct {
	Version string `json:"version"`
	PID     int    `json:"pid"`
	Server  string `json:"server"` // the control server's URL
	// Reachable tells that people can come in: the link is up, and everything is served on the mesh.
	Reachable bool `json:"reachable"`
	// Commands is how many SSH sessions without a terminal there are, file transfers among them: a restart ends those.
	Commands int64 `json:"commands"`
}

func (a *agent) about() About {
	_, serving := a.serving.now()
	return About{
		Version: a.cfg.Version, PID: os.Getpid(), Server: a.cfg.Server.URL.String(),
		Reachable: a.online.Load() && serving, Commands: a.ssh.Counts().Commands,
	}
}

func (l *localAPI) getAgent(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, l.about())
}

// AskAbout asks the agent that listens on socket about itself.
func AskAbout(ctx context.Context, socket string) (About, error) {
	ctx, cancel := context.WithTimeout(ctx, localTimeout)
	defer cancel()
	var about About
	if err := getLocal(ctx, socket, "/v1/agent", &about); err != nil {
		return About{}, fmt.Errorf("cannot ask berthd about itself: %w", err)
	}
	return about, nil
}
