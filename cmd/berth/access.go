package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/google/uuid"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/wire"
)

// access is which server to talk to, and as whom.
type access struct {
	url    *url.URL
	token  wire.Secret
	origin string // where it was found, for people
}

// savedContext is the file that `berth up` and `berth serve` leave so that other commands need no
// flags. The token stays in a file of its own.
type savedContext struct {
	URL       string `json:"url"`
	TokenFile string `json:"token_file"`
	// PID is the process that the context holds for; 0 means it holds on.
	PID int `json:"pid,omitempty"`
}

// Names of the context files. That of `up` comes first while its process lives, so that trying berth
// never touches the context of a server that someone keeps.
const (
	contextUp    = "up.json"
	contextServe = "context.json"
)

// maxSmallFile bounds a context or token file; a token takes some 40 bytes.
const maxSmallFile = 16 << 10

// contextPath returns the path of a context file, $XDG_CONFIG_HOME/berth/name on Linux.
func contextPath(name string) (string, error) {
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("cannot find the configuration directory: %w", err)
	}
	return filepath.Join(dir, "berth", name), nil
}

// write saves the context for its owner only, in place of an older one.
func (s savedContext) write(path string) error {
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("cannot save the context: %w", err)
	}
	if err := replaceFile(path, append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("cannot save the context: %w", err)
	}
	return nil
}

// removeContext removes the file if it still says the same, and its directory if that leaves it empty.
func (s savedContext) remove(path string) {
	if found, err := readContext(path); err == nil && found == s {
		os.Remove(path)
		os.Remove(filepath.Dir(path)) // fails, as it should, when something else is in it
	}
}

func readContext(path string) (savedContext, error) {
	var s savedContext
	data, err := readSmallFile(path)
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(data, &s); err != nil {
		return savedContext{}, fmt.Errorf("cannot read %s: %w; remove it, or name a server with --url", path, err)
	}
	return s, nil
}

func readSmallFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxSmallFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxSmallFile {
		return nil, fmt.Errorf("cannot use %s: it is over %d bytes", path, maxSmallFile)
	}
	return data, nil
}

// replaceFile writes a file beside path and moves it there, so that readers see the old or the new one.
func replaceFile(path string, data []byte, mode fs.FileMode) (err error) {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".berth-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(tmp.Name())
		}
	}()
	_, err = tmp.Write(data)
	err = errors.Join(err, tmp.Chmod(mode), tmp.Sync(), tmp.Close())
	if err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

// readToken reads a token file and warns if others can read it too.
func (p *program) readToken(path string) (wire.Secret, error) {
	data, err := readSmallFile(path)
	if err != nil {
		return "", fmt.Errorf("cannot read the token: %w", err)
	}
	if info, err := os.Stat(path); err == nil && info.Mode().Perm()&0o077 != 0 {
		fmt.Fprintf(p.errOut, "berth: warning: others can read the token in %s; run: chmod 600 %s\n", clean(path), shellQuote(path))
	}
	token := string(bytes.TrimSpace(data))
	if token == "" {
		return "", fmt.Errorf("cannot use the token in %s: the file is empty", path)
	}
	if strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("cannot use the token in %s: it must be one line of plain characters", path)
	}
	return wire.Secret(token), nil
}

// access finds the server and the token. A token goes only to the server it was given with: one from
// the environment or a flag goes with a URL from either, CODER_SESSION_TOKEN only with CODER_URL, and
// that of a context only with its own URL.
func (p *program) access() (access, error) {
	p.http = client.HTTPConfig{
		CAFile:   cmp.Or(p.http.CAFile, os.Getenv("BERTH_CA_FILE")),
		CertFile: cmp.Or(p.http.CertFile, os.Getenv("BERTH_CLIENT_CERT")),
		KeyFile:  cmp.Or(p.http.KeyFile, os.Getenv("BERTH_CLIENT_KEY")),
	}
	switch {
	case p.url != "":
		return p.explicit(p.url, "--url", "BERTH_TOKEN")
	case os.Getenv("BERTH_URL") != "":
		return p.explicit(os.Getenv("BERTH_URL"), "BERTH_URL", "BERTH_TOKEN")
	case os.Getenv("CODER_URL") != "":
		return p.explicit(os.Getenv("CODER_URL"), "CODER_URL", "CODER_SESSION_TOKEN")
	}
	for _, name := range []string{contextUp, contextServe} {
		a, err := p.savedAccess(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		return a, err
	}
	return access{}, errors.New("cannot tell which server to talk to; run \"berth up\" in another terminal to try berth, or name one with --url and --token-file")
}

// explicit takes the URL that was found at origin, and the token from its file or variable.
func (p *program) explicit(raw, origin, variable string) (access, error) {
	u, err := parseURL(raw)
	if err != nil {
		return access{}, fmt.Errorf("cannot use the URL of %s: %w", origin, err)
	}
	a := access{url: u, origin: origin}
	switch token := os.Getenv(variable); {
	case p.tokenFile != "":
		a.token, err = p.readToken(p.tokenFile)
	case token != "":
		a.token = wire.Secret(strings.TrimSpace(token))
	default:
		err = fmt.Errorf("cannot log in at %s without a token; name its file with --token-file, or set %s", u.Redacted(), variable)
	}
	return a, err
}

// savedAccess reads a context file. One whose process is gone does not exist.
func (p *program) savedAccess(name string) (access, error) {
	path, err := contextPath(name)
	if err != nil {
		return access{}, fs.ErrNotExist
	}
	saved, err := readContext(path)
	if err != nil {
		return access{}, err
	}
	if saved.PID != 0 && errors.Is(syscall.Kill(saved.PID, 0), syscall.ESRCH) {
		return access{}, fs.ErrNotExist
	}
	u, err := parseURL(saved.URL)
	if err != nil {
		return access{}, fmt.Errorf("cannot use the URL in %s: %w", path, err)
	}
	file := saved.TokenFile
	if p.tokenFile != "" {
		file = p.tokenFile
	}
	token, err := p.readToken(file)
	if err != nil {
		// Not a missing context: the next one is another server.
		return access{}, fmt.Errorf("cannot log in at %s, which %s names: %v; if that server is gone, remove the file", u.Redacted(), path, err)
	}
	return access{url: u, token: token, origin: path}, nil
}

// parseURL checks a server's URL.
func parseURL(raw string) (*url.URL, error) {
	u, err := url.Parse(raw)
	switch {
	case err != nil:
		return nil, errors.New("it is not a URL; the form is https://host[:port]")
	case u.Scheme != "http" && u.Scheme != "https", u.Host == "":
		return nil, fmt.Errorf("%s is no http or https URL; the form is https://host[:port]", u.Redacted())
	case u.User != nil:
		return nil, errors.New("it holds a user or password; use --token-file instead")
	}
	return u, nil
}

// server is a control server one has access to.
type server struct {
	*client.Client
	access access
	http   *http.Client
}

// server returns the server to talk to; nothing is sent yet.
func (p *program) server() (*server, error) {
	a, err := p.access()
	if err != nil {
		return nil, err
	}
	h, err := client.NewHTTP(p.http)
	if err != nil {
		return nil, err
	}
	c, err := client.New(client.Config{URL: a.url, Token: func() wire.Secret { return a.token }, HTTP: h})
	if err != nil {
		return nil, err
	}
	return &server{Client: c, access: a, http: h}, nil
}

// tls returns how the server's certificate is checked; relays are checked alike.
func (s *server) tls() *tls.Config {
	if t, ok := s.http.Transport.(*http.Transport); ok && t.TLSClientConfig != nil {
		return t.TLSClientConfig.Clone()
	}
	return nil
}

// problem puts an error of the server in plain words.
func (s *server) problem(doing string, err error) error {
	return fmt.Errorf("cannot %s at %s: %w", doing, s.access.url.Redacted(), client.Explain(err))
}

// agent finds an agent by its name, its name with ".berth" behind, or its id.
func (s *server) agent(ctx context.Context, name string) (wire.AgentSummary, error) {
	if id, err := uuid.Parse(name); err == nil {
		a, err := s.Agent(ctx, id)
		if err != nil {
			return wire.AgentSummary{}, s.problem("find agent "+name, err)
		}
		return wire.AgentSummary{ID: a.ID, Name: a.Name, Status: a.Status, LifecycleState: a.LifecycleState, Version: a.Version}, nil
	}
	agents, err := s.Agents(ctx)
	if err != nil {
		return wire.AgentSummary{}, s.problem("find agent "+name, err)
	}
	if i := matchAgent(agents, name); i >= 0 {
		return agents[i], nil
	}
	if len(agents) == 0 {
		return wire.AgentSummary{}, fmt.Errorf("cannot find agent %q: the server has none; make one with \"berth agent create %s\"", name, name)
	}
	var names []string
	for _, a := range agents {
		names = append(names, a.Name)
	}
	slices.Sort(names)
	const most = 10 // as many as fit on a line or two
	if len(names) > most {
		names = append(names[:most], "…")
	}
	return wire.AgentSummary{}, fmt.Errorf("cannot find agent %q; the server has: %s", name, strings.Join(names, ", "))
}

// matchAgent returns the index of the agent meant, or -1. OpenSSH hands on host names in lower case,
// so case decides only between names that differ in nothing else.
func matchAgent(agents []wire.AgentSummary, name string) int {
	short := strings.TrimSuffix(name, hostSuffix)
	for _, same := range []func(string) bool{
		func(n string) bool { return n == name },
		func(n string) bool { return n == short },
		func(n string) bool { return strings.EqualFold(n, short) },
	} {
		if i := slices.IndexFunc(agents, func(a wire.AgentSummary) bool { return same(a.Name) }); i >= 0 {
			return i
		}
	}
	return -1
}

// find returns the server and the agent that a command line names.
func (p *program) find(ctx context.Context, name string) (*server, wire.AgentSummary, error) {
	s, err := p.server()
	if err != nil {
		return nil, wire.AgentSummary{}, err
	}
	a, err := s.agent(ctx, name)
	return s, a, err
}

// log returns where to log: nowhere unless --verbose was given.
func (p *program) log() *slog.Logger {
	if !p.verbose {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(p.errOut, &slog.HandlerOptions{Level: slog.LevelDebug}))
}
