package wire

import (
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Error is the body of every failed HTTP answer. As a Go error it also carries the status.
type Error struct {
	// StatusCode is the HTTP status it came with; 0 when made locally.
	StatusCode int `json:"-"`
	AnswerTiming
	// Message is one sentence for people, Detail what is behind it.
	Message     string       `json:"message"`
	Detail      string       `json:"detail,omitempty"`
	Validations []Validation `json:"validations,omitempty"`
}

// Validation names a field of the request and what is wrong with it.
type Validation struct {
	Field  string `json:"field"`
	Detail string `json:"detail"`
}

// AnswerTiming is what the headers of a failed answer say about time.
type AnswerTiming struct {
	// RetryAfter is how long to wait before the same is asked again, at most [MaxRetryAfter]; 0 when
	// nothing is said.
	RetryAfter time.Duration `json:"-"`
	// ClockOffset is how far the other side's clock is ahead of ours, in whole minutes; 0 when it is
	// less, or not known.
	ClockOffset time.Duration `json:"-"`
}

// MaxRetryAfter bounds for how long a server may send a client away (docs/protocol.md#pace).
const MaxRetryAfter = 5 * time.Minute

func readTiming(h http.Header, now time.Time) AnswerTiming {
	var t AnswerTiming
	if date, err := http.ParseTime(h.Get("Date")); err == nil {
		t.ClockOffset = date.Sub(now).Truncate(time.Minute)
	}
	after := h.Get("Retry-After")
	if seconds, err := strconv.ParseUint(after, 10, 32); err == nil {
		t.RetryAfter = time.Duration(seconds) * time.Second
	} else if date, err := http.ParseTime(after); err == nil {
		t.RetryAfter = date.Sub(now) - t.ClockOffset
	}
	t.RetryAfter = min(max(0, t.RetryAfter), MaxRetryAfter)
	return t
}

// Error implements error.
func (e *Error) Error() string {
	parts := []string{e.Message}
	if e.Detail != "" {
		parts = append(parts, e.Detail)
	}
	for _, v := range e.Validations {
		parts = append(parts, v.Field+": "+v.Detail)
	}
	return strings.Join(parts, ": ")
}

// Validation returns what the answer says about a field.
func (e *Error) Validation(field string) (detail string, ok bool) {
	for _, v := range e.Validations {
		if v.Field == field {
			return v.Detail, true
		}
	}
	return "", false
}

// UnexpectedResponse is an HTTP answer that no control server gives: a page, a redirect, or an
// error that is not JSON. Something else answered, or something stands in between.
type UnexpectedResponse struct {
	StatusCode  int
	ContentType string
	// Location is where a redirect points.
	Location string
	// Body is its beginning, at most 512 bytes.
	Body string
	AnswerTiming
}

// Error implements error.
func (e *UnexpectedResponse) Error() string {
	if e.Location != "" {
		return fmt.Sprintf("unexpected redirect (status %d) to %q", e.StatusCode, e.Location)
	}
	return fmt.Sprintf("unexpected %s response (status %d)", e.ContentType, e.StatusCode)
}

// ReadError turns an answer that is not the hoped-for one into an [*Error], or into an
// [*UnexpectedResponse] when its body is not a JSON error. It reads at most [MaxJSONBody] and does
// not close the body.
func ReadError(resp *http.Response) error {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, MaxJSONBody))
	media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	timing := readTiming(resp.Header, time.Now())
	if media == "application/json" && resp.StatusCode >= 400 {
		e := &Error{StatusCode: resp.StatusCode, AnswerTiming: timing}
		if json.Unmarshal(body, e) == nil && e.Message != "" {
			return e
		}
	}
	if media == "" {
		media = "unlabelled"
	}
	return &UnexpectedResponse{
		StatusCode:  resp.StatusCode,
		ContentType: media,
		Location:    resp.Header.Get("Location"),
		Body:        string(body[:min(len(body), 512)]),

		AnswerTiming: timing,
	}
}

// ReadJSON decodes the body of an answer with the wanted status into v, and turns any other into an
// error by [ReadError]. It reads at most [MaxJSONAnswer] and does not close the body.
func ReadJSON(resp *http.Response, status int, v any) error {
	media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if resp.StatusCode != status || media != "application/json" {
		return ReadError(resp)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, MaxJSONAnswer)).Decode(v); err != nil {
		return fmt.Errorf("cannot decode the server's answer: %w", err)
	}
	return nil
}
