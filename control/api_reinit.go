package control

import (
	"io"
	"net/http"
	"time"

	"github.com/berthd/berth/wire"
)

// getReinit is where agents of prebuilt workspaces wait to be claimed. There are none here: an agent
// that takes no for an answer gets it, an older one waits for an event that never comes.
func (s *Server) getReinit(w http.ResponseWriter, r *http.Request, _ caller) {
	if r.URL.Query().Get("wait") == "true" {
		writeError(w, &wire.Error{StatusCode: http.StatusConflict, Message: "Workspace is not a prebuilt workspace waiting to be claimed."})
		return
	}
	ctx, done := s.lasting(r)
	defer done()
	control := http.NewResponseController(w)
	for name, value := range map[string]string{
		"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "Connection": "keep-alive", "X-Accel-Buffering": "no",
	} {
		w.Header().Set(name, value)
	}
	w.WriteHeader(http.StatusOK)
	if control.Flush() != nil {
		return
	}
	ticker := time.NewTicker(pingEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		// Not to be held by a peer that does not read; deadlines exist on net/http's own writer only.
		_ = control.SetWriteDeadline(time.Now().Add(pingWait))
		if _, err := io.WriteString(w, "event: ping\n\n"); err != nil {
			return
		}
		if control.Flush() != nil {
			return
		}
	}
}
