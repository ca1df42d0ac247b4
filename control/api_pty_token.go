package control

import (
	"crypto/hmac"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
)

// A terminal token opens terminals of one agent for a moment, in place of a key: a page cannot set
// headers on a WebSocket, and a key does not belong into a URL. It is the agent's id, the Unix time of
// its end, and an HMAC of both.
const (
	terminalTokenLifetime = time.Minute
	terminalTokenClaims   = 16 + 8
	// terminalTokenUse keeps what is signed apart from resume tokens, which are signed with the same key
	// and hold no NUL.
	terminalTokenUse = "terminal\x00"
)

func (s *Server) terminalToken(agent uuid.UUID, ends time.Time) string {
	claims := binary.BigEndian.AppendUint64(append([]byte{}, agent[:]...), uint64(ends.Unix()))
	return base64.RawURLEncoding.EncodeToString(append(claims, s.sign(terminalTokenUse+string(claims))...))
}

// checkTerminalToken tells whether a token is good for terminals of an agent now.
func (s *Server) checkTerminalToken(token string, agent uuid.UUID, now time.Time) bool {
	raw, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil || len(raw) < terminalTokenClaims {
		return false
	}
	claims, mac := raw[:terminalTokenClaims], raw[terminalTokenClaims:]
	return hmac.Equal(mac, s.sign(terminalTokenUse+string(claims))) &&
		uuid.UUID(claims[:16]) == agent && now.Unix() < int64(binary.BigEndian.Uint64(claims[16:]))
}

// onTerminals lets in people, and who has a token for terminals of the agent that the path names.
func (s *Server) onTerminals(next func(http.ResponseWriter, *http.Request, store.Agent)) guarded {
	asUser, named := s.onAgent(next), s.namedAgent(next)
	return guarded{userKey, func(w http.ResponseWriter, r *http.Request) {
		token := r.URL.Query().Get(wire.QuerySignedAppToken)
		if token == "" {
			asUser.HandlerFunc(w, r)
			return
		}
		if id, err := uuid.Parse(r.PathValue("id")); err != nil || !s.checkTerminalToken(token, id, time.Now()) {
			writeError(w, signedOut("The signed app token is not good for this agent, or not any more."))
			return
		}
		named(w, r)
	}}
}

// postTerminalToken makes such a token, for the URL at which it is to be used.
func (s *Server) postTerminalToken(w http.ResponseWriter, r *http.Request) {
	var req wire.SignTerminalToken
	if !readJSON(w, r, wire.MaxJSONBody, &req) {
		return
	}
	agent := ""
	if req.AgentID != uuid.Nil {
		agent = req.AgentID.String()
	}
	if e := required("url", req.URL, "agentID", agent); e != nil {
		writeError(w, e)
		return
	}
	if u, err := url.Parse(req.URL); err != nil || !strings.HasSuffix(u.Path, agents+agent+"/pty") {
		writeError(w, &wire.Error{StatusCode: http.StatusBadRequest, Message: "Invalid URL.",
			Detail: fmt.Sprintf("It must be that of the agent's terminals, …%s%s/pty", agents, agent)})
		return
	}
	_, err := s.store.Agent(r.Context(), req.AgentID)
	s.found(w, r, store.Agent{ID: req.AgentID}, err, func(w http.ResponseWriter, _ *http.Request, a store.Agent) {
		writeJSON(w, http.StatusOK, wire.SignedTerminalToken{SignedToken: s.terminalToken(a.ID, time.Now().Add(terminalTokenLifetime))})
	})
}
