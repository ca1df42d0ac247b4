package client

import (
	"bytes"
	"io"
	"net/http"
	"net/url"
	"testing"

	"github.com/google/uuid"
)

// answering is a server whose every answer is one body.
type answering []byte

// RoundTrip implements [http.RoundTripper].
func (a answering) RoundTrip(r *http.Request) (*http.Response, error) {
	return &http.Response{
		StatusCode: http.StatusOK, Header: http.Header{"Content-Type": {"application/json"}}, Request: r,
		Body: io.NopCloser(bytes.NewReader(a)),
	}, nil
}

// FuzzStoredLogs streams a log from whatever might come in its place.
func FuzzStoredLogs(f *testing.F) {
	f.Add([]byte(`[{"id":1,"created_at":"2024-01-01T00:00:00Z","output":"o","level":"info","source_id":"3b579bf4-1ed8-4b99-87a8-e9a1e3410410"},{"id":2}]`))
	f.Add([]byte(`[]`))
	f.Add([]byte(`{"message":"no"}`))
	f.Add([]byte(`[{"id":1},`))
	f.Add([]byte(`[[[[[[`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, body []byte) {
		c, err := New(Config{URL: &url.URL{Scheme: "http", Host: "berth.example.com"}, HTTP: &http.Client{Transport: answering(body)}})
		if err != nil {
			t.Fatal(err)
		}
		lines, failed := 0, false
		for _, err := range c.FollowLogs(t.Context(), uuid.New(), 0, false) {
			if failed {
				t.Error("something came after an error")
			}
			failed = err != nil
			if lines++; lines > len(body)+1 {
				t.Fatal("more lines than bytes")
			}
		}
	})
}
