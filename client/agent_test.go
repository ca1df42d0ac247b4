package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/berthd/berth/wire"
)

// against returns a client of a server that answers with handle.
func against(t *testing.T, handle http.HandlerFunc) *Client {
	t.Helper()
	s := httptest.NewServer(handle)
	t.Cleanup(s.Close)
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	h, err := NewHTTP(HTTPConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.CloseIdleConnections)
	c, err := New(Config{URL: u, HTTP: h, Token: func() wire.Secret { return "token" }})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestPatchAppStatus(t *testing.T) {
	var got wire.PatchAppStatus
	c := against(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPatch || r.URL.Path != "/api/v2/workspaceagents/me/app-status" || r.Header.Get(wire.HeaderSessionToken) != "token" {
			t.Errorf("%s %s %v", r.Method, r.URL, r.Header)
		}
		if err := json.NewDecoder(r.Body).Decode(&got); err != nil {
			t.Error(err)
		}
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		if got.AppSlug == "unknown" {
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprint(w, `{"message":"Failed to get workspace app.","detail":"No app found with slug \"unknown\""}`)
			return
		}
		fmt.Fprintln(w, "null")
	})
	status := wire.PatchAppStatus{AppSlug: "a", State: "idle", Message: "m", URI: "u"}
	if err := c.PatchAppStatus(t.Context(), status); err != nil || got != status {
		t.Errorf("sent %+v: %v", got, err)
	}
	err := c.PatchAppStatus(t.Context(), wire.PatchAppStatus{AppSlug: "unknown"})
	if answer, ok := errors.AsType[*wire.Error](err); !ok || answer.StatusCode != http.StatusBadRequest {
		t.Errorf("got %v, want the server's refusal", err)
	}
}

func TestAwaitReinit(t *testing.T) {
	owner := uuid.MustParse("6b1a3b5c-0d2e-4f60-8a7b-9c8d7e6f5a4b")
	events := func(stream string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Query().Get("wait") != "true" || r.Header.Get(wire.HeaderSessionToken) != "token" {
				t.Errorf("%s %v", r.URL, r.Header)
			}
			w.Header().Set("Content-Type", "text/event-stream")
			io.WriteString(w, stream)
		}
	}
	tests := map[string]struct {
		handle http.HandlerFunc
		want   wire.Reinitialization
		never  bool
		err    string
	}{
		"claimed": {
			handle: events("event: ping\n\nevent: data\ndata: {\"workspace_id\":\"" + owner.String() + "\",\"reason\":\"prebuild_claimed\",\"owner_id\":\"" + owner.String() + "\"}\n\n"),
			want:   wire.Reinitialization{WorkspaceID: owner, Reason: "prebuild_claimed", OwnerID: owner},
		},
		"claimed, server of 2025": {
			handle: events("event: data\ndata: {\"reason\":\"prebuild_claimed\"}\n\n"),
			want:   wire.Reinitialization{Reason: "prebuild_claimed"},
		},
		"not prebuilt": {
			handle: func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "application/json; charset=utf-8")
				w.WriteHeader(http.StatusConflict)
				fmt.Fprint(w, `{"message":"Workspace is not a prebuilt workspace waiting to be claimed."}`)
			},
			never: true, err: "not a prebuilt",
		},
		"refused": {
			handle: func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "application/json; charset=utf-8")
				w.WriteHeader(http.StatusUnauthorized)
				fmt.Fprint(w, `{"message":"Workspace agent not authorized."}`)
			},
			err: "not authorized",
		},
		"a login page":     {handle: func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") }, err: "unexpected"},
		"ended":            {handle: events("event: ping\n\n"), err: "EOF"},
		"cut off":          {handle: events("event: data\ndata: {"), err: "unexpected EOF"},
		"not JSON":         {handle: events("event: data\ndata: {\n\n"), err: "cannot decode"},
		"server's trouble": {handle: events("event: error\ndata: {\"message\":\"database is away\"}\n\n"), err: "database is away"},
		"endless line":     {handle: events("data: " + strings.Repeat("x", maxEvent)), err: "token too long"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := against(t, tt.handle).AwaitReinit(t.Context())
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("error %v, want %q", err, tt.err)
			}
			if errors.Is(err, ErrNoReinit) != tt.never {
				t.Errorf("error %v, want final %v", err, tt.never)
			}
		})
	}
}

func TestAwaitReinitEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	c := against(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		w.WriteHeader(http.StatusOK)
		http.NewResponseController(w).Flush()
		cancel()
		<-r.Context().Done()
	})
	if _, err := c.AwaitReinit(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestEvents(t *testing.T) {
	type event struct{ Kind, Data string }
	tests := map[string]struct {
		in   string
		want []event
		err  error
	}{
		"as servers write":  {"event: data\ndata: {}\n\nevent: ping\n\n", []event{{"data", "{}"}, {"ping", ""}}, io.EOF},
		"no space":          {"event:data\ndata:{}\n\n", []event{{"data", "{}"}}, io.EOF},
		"CRLF":              {"event: data\r\ndata: {}\r\n\r\n", []event{{"data", "{}"}}, io.EOF},
		"several lines":     {"data: a\ndata: b\n\n", []event{{"", "a\nb"}}, io.EOF},
		"comments, unknown": {": hello\nid: 7\nretry\nevent: data\n\n", []event{{"data", ""}}, io.EOF},
		"empty lines":       {"\n\n\nevent: ping\n\n\n", []event{{"ping", ""}}, io.EOF},
		"cut off":           {"event: data\n", nil, io.ErrUnexpectedEOF},
		"too much":          {strings.Repeat("data: "+strings.Repeat("x", maxEvent/2)+"\n", 3), nil, bufio.ErrTooLong},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			r := newEventReader(strings.NewReader(tt.in))
			var got []event
			for {
				kind, data, err := r.next()
				if err != nil {
					if !errors.Is(err, tt.err) {
						t.Errorf("ended with %v, want %v", err, tt.err)
					}
					break
				}
				got = append(got, event{kind, string(data)})
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func FuzzEvents(f *testing.F) {
	f.Add([]byte("event: data\ndata: {}\n\nevent: ping\n\n"))
	f.Add([]byte(":\r\nevent:x\r\ndata\r\n\r\n"))
	f.Add(bytes.Repeat([]byte("data: x\n"), maxEventLines+1))
	f.Fuzz(func(t *testing.T, in []byte) {
		r := newEventReader(bytes.NewReader(in))
		for n := 0; ; n++ {
			_, data, err := r.next()
			if err != nil {
				return
			}
			if len(data) > maxEvent+maxEventLines || n > len(in) {
				t.Fatalf("event %d of %d bytes out of %d", n, len(data), len(in))
			}
		}
	})
}
