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
	// Linked tells that the control server is there, Path how peers come: "direct", "relayed", or "" before the mesh.
	Linked bool   `json:"linked"`
	Path   string `json:"path,omitempty"`
	// Backlog is how much waits to be delivered, in bytes.
	Backlog int64 `json:"backlog"`
	// Trouble is what holds it back, Last how the berthd before it ended, and Kills how many processes of the workspace
	// the OOM killer ended since.
	Trouble *Trouble `json:"trouble,omitempty"`
	Last    *Ending  `json:"last,omitempty"`
	Kills   int64    `json:"oom_kills,omitempty"`
}

func (a *agent) about() About {
	_, serving := a.serving.now()
	return About{
		Version: a.cfg.Version, PID: os.Getpid(), Server: a.cfg.Server.URL.String(),
		Reachable: a.online.Load() && serving, Commands: a.ssh.Counts().Commands,
		Linked: a.online.Load(), Path: a.path(), Backlog: a.reporter.Backlog(),
		Trouble: a.cfg.Life.trouble(), Last: a.cfg.Life.Last(), Kills: a.cfg.Life.Kills(),
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
