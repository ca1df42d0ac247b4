package containers

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/moby/moby/client"
)

// request is a kind of request to an engine.
type request struct {
	method string
	path   *regexp.Regexp // of the whole path, without the API's version
}

// An id, of a container or of an exec, is what an engine itself made: no name that a person chose is ever part of a path.
const id = `[0-9a-f]{64}`

// Everything that berthd ever asks of an engine. What is on neither list is refused before it is sent, whoever asks.
var (
	// looking changes nothing.
	looking = []request{
		{http.MethodHead, regexp.MustCompile(`^/_ping$`)},
		{http.MethodGet, regexp.MustCompile(`^/_ping$`)},
		{http.MethodGet, regexp.MustCompile(`^/containers/json$`)},
		{http.MethodGet, regexp.MustCompile(`^/containers/` + id + `/json$`)},
		{http.MethodGet, regexp.MustCompile(`^/events$`)},
	}
	// executing runs a command in a container that a person may enter.
	executing = []request{
		{http.MethodHead, regexp.MustCompile(`^/_ping$`)},
		{http.MethodGet, regexp.MustCompile(`^/_ping$`)},
		{http.MethodGet, regexp.MustCompile(`^/containers/` + id + `/json$`)},
		{http.MethodPost, regexp.MustCompile(`^/containers/` + id + `/exec$`)},
		{http.MethodPost, regexp.MustCompile(`^/exec/` + id + `/start$`)},
		{http.MethodPost, regexp.MustCompile(`^/exec/` + id + `/resize$`)},
		{http.MethodGet, regexp.MustCompile(`^/exec/` + id + `/json$`)},
	}
)

// versionPrefix is how the API's version stands before a path.
var versionPrefix = regexp.MustCompile(`^/v\d+\.\d+/`)

// permits reports whether a request is on the list. base stands before every path of an engine behind a proxy.
func permits(list []request, base, method, path string) bool {
	path, ok := strings.CutPrefix(path, base)
	if !ok {
		return false
	}
	path = versionPrefix.ReplaceAllString(path, "/")
	for _, r := range list {
		if r.method == method && r.path.MatchString(path) {
			return true
		}
	}
	return false
}

// maxAnswer bounds what an engine may say to one request. 5,000 containers with long labels take about 10 MB.
const maxAnswer = 32 << 20

var errTooLong = fmt.Errorf("it answered with more than %d MiB", maxAnswer>>20)

// allowance is what may still be read from an engine. A nil allowance has no end.
type allowance struct{ left atomic.Int64 }

// renew allows for one more answer.
func (a *allowance) renew() { a.left.Store(maxAnswer) }

// boundedConn is a connection that fails once too much has been read.
type boundedConn struct {
	net.Conn
	*allowance
}

func (c *boundedConn) Read(p []byte) (int, error) {
	if c.left.Load() <= 0 {
		return 0, errTooLong
	}
	n, err := c.Conn.Read(p)
	c.left.Add(int64(-n))
	return n, err
}

// dial opens a connection to the engine.
func (e engine) dial(ctx context.Context) (net.Conn, error) {
	network, address, _ := strings.Cut(e.host, "://")
	if u, err := url.Parse(e.host); err == nil && network == "tcp" {
		address = u.Host
	}
	if network == "unix" {
		return e.user.DialUnix(ctx, address)
	}
	return new(net.Dialer).DialContext(ctx, network, address)
}

// connect returns a client of the engine that makes the listed requests and no others. It has found out which version of the API they share. Each
// request renews limit.
func (e engine) connect(ctx context.Context, list []request, limit *allowance) (*client.Client, error) {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		conn, err := e.dial(ctx)
		if err != nil || limit == nil {
			return conn, err
		}
		return &boundedConn{conn, limit}, nil
	}
	// The client's own words for a failed dial do not say why it failed; the kernel's do.
	conn, err := e.dial(ctx)
	if err != nil {
		return nil, err
	}
	conn.Close()
	base := e.base()
	options := []client.Opt{client.WithHost(e.host), client.WithDialContext(dial), client.WithHTTPRequestHook(func(r *http.Request) error {
		if !permits(list, base, r.Method, r.URL.Path) {
			return fmt.Errorf("refused to ask the engine for %s %q: berthd never does", r.Method, r.URL.Path)
		}
		if limit != nil {
			limit.renew()
		}
		return nil
	})}
	if e.tlsFromEnv {
		options = append([]client.Opt{client.WithTLSClientConfigFromEnv()}, options...)
	}
	api, err := client.New(options...)
	if err != nil {
		return nil, err
	}
	// Asked for by itself, so that an engine too old for us says so.
	if _, err := api.Ping(ctx, client.PingOptions{NegotiateAPIVersion: true}); err != nil {
		api.Close()
		return nil, err
	}
	return api, nil
}

// base stands before every path of an engine that is reached through a proxy.
func (e engine) base() string {
	if u, err := url.Parse(e.host); err == nil && u.Scheme == "tcp" {
		return strings.TrimSuffix(u.Path, "/")
	}
	return ""
}

// local reports whether the engine counts processes as this machine does.
func (e engine) local() bool { return strings.HasPrefix(e.host, "unix://") }

// explain says why an engine could not do what was asked, and what helps. timeout is what it had.
func (e engine) explain(what string, err error, timeout time.Duration) string {
	where := fmt.Sprintf("cannot %s %s at %s", what, e.name, e.host)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return where + ": this user may not use its socket (join the group that owns it)"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Sprintf("%s: it did not answer within %v", where, timeout)
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		return where + ": nothing listens there (is the engine running?)"
	case strings.Contains(err.Error(), "minimum supported API version is "+client.MinAPIVersion):
		return fmt.Sprintf("%s: the engine is too old (berthd speaks versions %s to %s of its API): upgrade it", where, client.MinAPIVersion, client.MaxAPIVersion)
	case strings.Contains(err.Error(), "too old. Minimum supported API version"):
		return fmt.Sprintf("%s: the engine is too new (berthd speaks versions %s to %s of its API): upgrade berthd", where, client.MinAPIVersion, client.MaxAPIVersion)
	}
	return fmt.Sprintf("%s: %s", where, inert(err.Error()))
}

// inert returns an engine's words as a terminal may show them: in whole if nothing in them acts on one, else quoted. 500 bytes are enough of them.
func inert(words string) string {
	const enough = 500
	if len(words) > enough {
		words = strings.ToValidUTF8(words[:enough], "") + "…"
	}
	if utf8.ValidString(words) && !strings.ContainsFunc(words, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return words
	}
	return strconv.Quote(words)
}
