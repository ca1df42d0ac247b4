package control

import (
	"bytes"
	"encoding/json"
	"net/http"
	"time"
)

// events is an answer of server-sent events. Its methods may not run at the same time.
type events struct {
	w       http.ResponseWriter
	control *http.ResponseController
	pinged  time.Time
}

// The types of events.
const (
	eventData  = "data"
	eventError = "error"
)

// sendEvents begins such an answer. A caller that has gone already is found by the first event.
func sendEvents(w http.ResponseWriter) *events {
	for name, value := range map[string]string{
		"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "Connection": "keep-alive", "X-Accel-Buffering": "no",
	} {
		w.Header().Set(name, value)
	}
	w.WriteHeader(http.StatusOK)
	e := &events{w: w, control: http.NewResponseController(w), pinged: time.Now()}
	e.bound()
	_ = e.control.Flush()
	return e
}

// bound keeps a peer that does not read from holding what is written next. Deadlines exist on
// net/http's own writer only.
func (e *events) bound() { _ = e.control.SetWriteDeadline(time.Now().Add(pingWait)) }

// send sends one event. Its data is one line: JSON has no others.
func (e *events) send(kind string, data any) error {
	line, err := json.Marshal(data)
	if err != nil {
		return err
	}
	var event bytes.Buffer
	event.WriteString("event: " + kind + "\ndata: ")
	event.Write(line)
	event.WriteString("\n\n")
	return e.write(event.Bytes())
}

// ping tells the other side, and all that stands between, that the stream lives, unless it was told
// within pingEvery.
func (e *events) ping() error {
	if time.Since(e.pinged) < pingEvery {
		return nil
	}
	e.pinged = time.Now()
	return e.write([]byte("event: ping\n\n"))
}

func (e *events) write(event []byte) error {
	e.bound()
	if _, err := e.w.Write(event); err != nil {
		return err
	}
	return e.control.Flush()
}
