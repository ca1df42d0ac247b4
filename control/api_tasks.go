package control

import (
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
)

// maxSnapshot bounds the messages of a task that an agent sends, in bytes.
const maxSnapshot = 64 << 10

// snapshotFormat is the one format of a snapshot.
const snapshotFormat = "agentapi"

// postTaskLogSnapshot checks what an agent says of a task. There are no tasks here, so no snapshot has
// a place.
func (s *Server) postTaskLogSnapshot(w http.ResponseWriter, r *http.Request, _ caller) {
	bad := func(message, detail string, validations ...wire.Validation) {
		writeError(w, &wire.Error{StatusCode: http.StatusBadRequest, Message: message, Detail: detail, Validations: validations})
	}
	if _, err := uuid.Parse(r.PathValue("task")); err != nil {
		bad("Invalid task ID format.", err.Error())
		return
	}
	switch format := r.URL.Query().Get("format"); format {
	case snapshotFormat:
	case "":
		bad("Invalid query parameters.", "", wire.Validation{Field: "format", Detail: `Query param "format" is required and cannot be empty`})
		return
	default:
		bad("Invalid format parameter.", fmt.Sprintf("Must be %s, not %q", snapshotFormat, short(format)))
		return
	}
	var payload map[string]json.RawMessage
	if err := decodeJSON(w, r, maxSnapshot, &payload); err != nil {
		bad("Failed to decode request payload.", err.Error())
		return
	}
	var messages []json.RawMessage
	if err := json.Unmarshal(payload["messages"], &messages); err != nil || messages == nil {
		bad("Invalid agentapi payload structure.", "Its messages must be there, as an array.")
		return
	}
	writeError(w, noResource())
}

// postChatContextRefresh says that no chat had to be refreshed: there are none here.
func postChatContextRefresh(w http.ResponseWriter, _ *http.Request, _ caller) {
	writeJSON(w, http.StatusOK, wire.Refreshed{})
}
