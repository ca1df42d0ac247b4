package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// externalSource is the source of lines that name none.
var externalSource = uuid.MustParse(wire.ExternalLogSource)

// maxSourceName is how long the display name of a log source may be.
const maxSourceName = 127

func (s *Server) postLogSource(w http.ResponseWriter, r *http.Request, agent caller) {
	var req wire.PostLogSource
	if !readJSON(w, r, wire.MaxJSONBody, &req) {
		return
	}
	switch {
	case len([]rune(req.DisplayName)) > maxSourceName:
		writeError(w, internalError(fmt.Errorf("the display name is longer than %d characters", maxSourceName)))
		return
	case len(req.Icon) > wire.MaxURI:
		writeError(w, internalError(fmt.Errorf("the icon is longer than %d bytes", wire.MaxURI)))
		return
	}
	source := wire.LogSource{
		WorkspaceAgentID: agent.ID, ID: req.ID, CreatedAt: time.Now().UTC(), DisplayName: req.DisplayName, Icon: req.Icon,
	}
	// The answer echoes the request; what others are shown is cleaned, like lines.
	shown := source
	shown.DisplayName, shown.Icon = logText(source.DisplayName), logText(source.Icon)
	if err := s.addLogSource(r.Context(), shown); err != nil {
		writeError(w, internalError(err))
		return
	}
	writeJSON(w, http.StatusCreated, source)
}

// maxSources bounds the sources of one agent; stock agents have one a script.
const maxSources = 1000

func (s *Server) addLogSource(ctx context.Context, source wire.LogSource) error {
	known, err := s.store.LogSources(ctx, source.WorkspaceAgentID)
	if err != nil {
		return err
	}
	if _, ok := known[source.ID]; ok {
		return nil
	}
	if len(known) >= maxSources {
		return fmt.Errorf("the agent has %d log sources already", len(known))
	}
	return s.store.CreateLogSource(ctx, source)
}

// logSources are those that an agent declared, and those of its scripts and dev containers, which
// stock agents do not declare.
func (s *Server) logSources(ctx context.Context, a store.Agent) (map[uuid.UUID]wire.LogSource, error) {
	sources, err := s.store.LogSources(ctx, a.ID)
	if err != nil {
		return nil, err
	}
	add := func(id uuid.UUID, name string) {
		if _, ok := sources[id]; !ok {
			sources[id] = wire.LogSource{WorkspaceAgentID: a.ID, ID: id, CreatedAt: a.CreatedAt, DisplayName: name}
		}
	}
	for _, script := range a.Scripts {
		add(script.LogSourceID, script.DisplayName)
	}
	for _, d := range a.Devcontainers {
		add(d.LogSourceID, devcontainerLog(d))
	}
	return sources, nil
}

// logLevels are the levels by the names that HTTP knows.
var logLevels = map[string]agentpb.Log_Level{
	"": agentpb.Log_INFO, "trace": agentpb.Log_TRACE, "debug": agentpb.Log_DEBUG,
	"info": agentpb.Log_INFO, "warn": agentpb.Log_WARN, "error": agentpb.Log_ERROR,
}

func (s *Server) patchLogs(w http.ResponseWriter, r *http.Request, agent caller) {
	var req wire.PatchLogs
	// A batch of 1 MiB of output is longer as JSON; RPC takes this much too.
	if !readJSON(w, r, wire.MaxMessage, &req) {
		return
	}
	if len(req.Logs) == 0 {
		writeError(w, &wire.Error{StatusCode: http.StatusBadRequest, Message: "No logs provided."})
		return
	}
	b := store.LogBatch{Source: req.LogSourceID}
	for _, l := range req.Logs {
		level, ok := logLevels[l.Level]
		if !ok {
			writeError(w, &wire.Error{StatusCode: http.StatusBadRequest, Message: "Invalid log level provided.",
				Detail: fmt.Sprintf("invalid log level: %q", short(l.Level))})
			return
		}
		b.Lines = append(b.Lines, store.LogLine{Output: logText(l.Output), Level: level})
	}
	switch err := s.addLogs(r.Context(), agent.ID, b); {
	case errors.Is(err, store.ErrLogLimit):
		writeError(w, &wire.Error{StatusCode: http.StatusRequestEntityTooLarge, Message: "Logs limit exceeded"})
	case err != nil:
		writeError(w, internalError(err))
	default:
		writeJSON(w, http.StatusOK, nil)
	}
}

// addLogs stores lines; over HTTP and RPC alike. An agent that reaches its limit is marked, and told
// so from then on.
func (s *Server) addLogs(ctx context.Context, agent uuid.UUID, b store.LogBatch) error {
	if b.Source == uuid.Nil {
		b.Source = externalSource
		err := s.addLogSource(ctx, wire.LogSource{
			WorkspaceAgentID: agent, ID: externalSource, CreatedAt: time.Now().UTC(),
			DisplayName: "External", Icon: "/emojis/1f310.png",
		})
		if err != nil {
			return err
		}
	}
	err := s.store.AppendLogs(ctx, agent, b)
	if !errors.Is(err, store.ErrLogLimit) {
		return err
	}
	return errors.Join(err, s.store.UpdateState(ctx, agent, func(st *store.State) error {
		st.LogsOverflowed = true
		return nil
	}))
}

// logQuery is which lines of a log are asked for, and how they are to come.
type logQuery struct {
	after        int64
	follow, text bool
}

// parseLogQuery reads a query of the log. What it says of before and no_compression changes nothing, as
// on stock servers.
func parseLogQuery(query url.Values) (logQuery, *wire.Error) {
	wanted := logQuery{follow: query.Has("follow")}
	if text := query.Get("after"); text != "" {
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil || n < 0 {
			return logQuery{}, &wire.Error{StatusCode: http.StatusBadRequest,
				Message:     `Query param "after" must be an integer greater than or equal to zero.`,
				Validations: []wire.Validation{{Field: "after", Detail: "Must be an integer greater than or equal to zero"}}}
		}
		wanted.after = n
	}
	switch format := query.Get("format"); format {
	case "", "json":
	case "text":
		wanted.text = true
	default:
		return logQuery{}, &wire.Error{StatusCode: http.StatusBadRequest, Message: "Invalid format parameter.",
			Detail: fmt.Sprintf("Must be json or text, not %q", short(format))}
	}
	if wanted.text && wanted.follow {
		return logQuery{}, &wire.Error{StatusCode: http.StatusBadRequest, Message: "Text format is not supported with follow mode."}
	}
	return wanted, nil
}

func (s *Server) getLogs(w http.ResponseWriter, r *http.Request, a store.Agent) {
	wanted, e := parseLogQuery(r.URL.Query())
	switch {
	case e != nil:
		writeError(w, e)
	case wanted.follow:
		s.followLogs(w, r, a, wanted.after)
	case wanted.text:
		s.textLogs(w, r, a, wanted.after)
	default:
		s.jsonLogs(w, r, a, wanted.after)
	}
}

// jsonLogs streams the array as it is read, so that a long log is never in memory whole.
func (s *Server) jsonLogs(w http.ResponseWriter, r *http.Request, a store.Agent, after int64) {
	started := false
	begin := func() {
		w.Header().Set("Content-Type", jsonType)
		_, _ = io.WriteString(w, "[")
		started = true
	}
	for entries, err := range s.store.Logs(r.Context(), a.ID, after) {
		if err != nil && !started {
			writeError(w, internalError(err))
			return
		}
		if err != nil {
			panic(http.ErrAbortHandler) // an array that ends early must not look whole
		}
		extendWrite(w)
		for _, e := range entries {
			if !started {
				begin()
			} else if _, err := io.WriteString(w, ","); err != nil {
				return
			}
			line, err := json.Marshal(e)
			if err != nil {
				panic(http.ErrAbortHandler)
			}
			if _, err := w.Write(line); err != nil {
				return
			}
		}
	}
	if !started {
		begin()
	}
	_, _ = io.WriteString(w, "]\n")
}

func (s *Server) textLogs(w http.ResponseWriter, r *http.Request, a store.Agent, after int64) {
	sources, err := s.logSources(r.Context(), a)
	if err != nil {
		writeError(w, internalError(err))
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	for entries, err := range s.store.Logs(r.Context(), a.ID, after) {
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		extendWrite(w)
		for _, e := range entries {
			origin := "agent"
			if a.Name != "" {
				origin += "." + a.Name
			}
			if name := sources[e.SourceID].DisplayName; name != "" {
				origin += "|" + name
			}
			// Behind a carriage return it would write over its own beginning, which says whose line it is.
			output := strings.ReplaceAll(e.Output, "\r", " ")
			if _, err := fmt.Fprintf(w, "%s [%s] [%s] %s\n", e.CreatedAt.Format(time.RFC3339), e.Level, origin, output); err != nil {
				return
			}
		}
	}
}

// followLogs sends the log and what is added to it, as text messages that each hold an array. The
// stream ends normally when the agent is gone.
func (s *Server) followLogs(w http.ResponseWriter, r *http.Request, a store.Agent, after int64) {
	s.sendMessages(w, r, func(ctx context.Context, send func(any) error) error {
		ctx, end := context.WithCancel(ctx)
		defer end()
		s.active.Go(func() {
			defer end()
			s.awaitDeletion(ctx, a.ID)
		})
		for entries, err := range s.store.FollowLogs(ctx, a.ID, after) {
			if err != nil {
				return err
			}
			for message := range followMessages(entries) {
				if send(message) != nil {
					return nil
				}
			}
		}
		return nil
	})
}

// awaitDeletion returns when an agent is gone or ctx is done.
func (s *Server) awaitDeletion(ctx context.Context, agent uuid.UUID) {
	ticker := time.NewTicker(pingEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if _, err := s.store.Agent(ctx, agent); errors.Is(err, store.ErrNotFound) {
			return
		}
	}
}

// followMessages packs entries into messages that stock readers take. A line that is too long for
// one comes as several entries with the same id.
func followMessages(entries []wire.LogEntry) iter.Seq[json.RawMessage] {
	const (
		limit = wire.MaxFollowMessage - 64 // brackets, commas and some air
		// piece is how much output surely fits: every byte of it may become six ("\u0000"), and the
		// other fields take less than 512.
		piece = (limit - 512) / 6
	)
	return func(yield func(json.RawMessage) bool) {
		message := bytes.NewBufferString("[")
		flush := func() bool {
			message.WriteByte(']')
			ok := yield(message.Bytes())
			message = bytes.NewBufferString("[")
			return ok
		}
		fits := func(output string) bool {
			if len(output) > limit-512 {
				return false // encoded it is no shorter
			}
			line, err := json.Marshal(output)
			return err == nil && len(line) <= limit-512
		}
		add := func(e wire.LogEntry) bool {
			line, err := json.Marshal(e)
			if err != nil {
				return true // cannot be: all its fields have a JSON form
			}
			if message.Len() > 1 && message.Len()+len(line) > limit && !flush() {
				return false
			}
			if message.Len() > 1 {
				message.WriteByte(',')
			}
			message.Write(line)
			return true
		}
		for _, e := range entries {
			rest := e.Output
			for {
				e.Output = rest
				if len(rest) > piece && !fits(rest) {
					e.Output = store.CutText(rest, piece)
				}
				rest = rest[len(e.Output):]
				if !add(e) {
					return
				}
				if rest == "" {
					break
				}
			}
		}
		flush()
	}
}
