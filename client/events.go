package client

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"mime"
	"net/http"
)

// eventStream is the media type of server-sent events.
const eventStream = "text/event-stream"

const (
	// maxEvent bounds one event; those of the protocol have a few hundred bytes.
	maxEvent = 64 << 10
	// maxEventLines bounds the lines of one event, of which comments and unknown fields cost nothing else.
	maxEventLines = 1024
)

// eventReader reads server-sent events: lines "event: kind" and "data: …", and an empty line at the
// end of each. Kinds here are data, error and ping.
type eventReader struct{ lines *bufio.Scanner }

func newEventReader(r io.Reader) *eventReader {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxEvent)
	return &eventReader{lines}
}

// next returns the next event. An event that is cut off is an [io.ErrUnexpectedEOF], the end of the
// stream before one an [io.EOF].
func (r *eventReader) next() (kind string, data []byte, err error) {
	begun := false
	for range maxEventLines {
		if !r.lines.Scan() {
			switch err := r.lines.Err(); {
			case err != nil:
				return "", nil, err
			case begun:
				return "", nil, io.ErrUnexpectedEOF
			}
			return "", nil, io.EOF
		}
		line := r.lines.Bytes()
		if len(line) == 0 {
			if begun {
				return kind, data, nil
			}
			continue
		}
		begun = true
		field, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimPrefix(value, []byte(" "))
		switch string(field) {
		case "event":
			kind = string(value)
		case "data":
			if data != nil {
				data = append(data, '\n')
			}
			if len(data)+len(value) > maxEvent {
				return "", nil, bufio.ErrTooLong
			}
			data = append(data, value...)
		}
	}
	return "", nil, errors.New("cannot read an event of so many lines")
}

func mediaType(resp *http.Response) string {
	media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	return media
}
