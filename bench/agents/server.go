package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/wire"
)

// metadataKeys are what each agent declares; most of them change at each collection.
var metadataKeys = []string{"cpu", "memory", "disk", "load", "branch"}

// server is a control server in a process of its own, which may be killed and started again.
type server struct {
	program, dir string
	addr         string
	url          *url.URL
	process      *exec.Cmd
	ended        chan struct{}
}

// build makes berth, as the tests of the built programs do: what they have compiled is used again.
func build(ctx context.Context, dir string) (string, error) {
	program := filepath.Join(dir, "berth")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", program, "github.com/berthd/berth/cmd/berth")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("cannot build berth: %w\n%s", err, out)
	}
	return program, nil
}

// newServer declares the agents in a configuration file and chooses an address.
func newServer(program, dir string, agents int) (*server, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	addr := l.Addr().String()
	l.Close()
	var config strings.Builder
	config.WriteString("agents:\n")
	for i := range agents {
		fmt.Fprintf(&config, "  - name: %s\n    metadata:\n", agentName(i))
		for _, key := range metadataKeys {
			fmt.Fprintf(&config, "      - {key: %s, script: \"true\", interval: 3s}\n", key)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "agents.yaml"), []byte(config.String()), 0o600); err != nil {
		return nil, err
	}
	return &server{program: program, dir: dir, addr: addr, url: &url.URL{Scheme: "http", Host: addr}}, nil
}

func agentName(i int) string { return fmt.Sprintf("agent-%04d", i) }

// start runs the server until it answers.
func (s *server) start(ctx context.Context) error {
	log, err := os.OpenFile(s.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	s.process = exec.Command(s.program, "serve", "--listen", s.addr, "--data-dir", filepath.Join(s.dir, "data"),
		"--config", filepath.Join(s.dir, "agents.yaml"), "--stun", "none", "--no-context")
	s.process.Env = append(os.Environ(), "XDG_CONFIG_HOME="+s.dir)
	s.process.Stdout, s.process.Stderr = log, log
	if err := s.process.Start(); err != nil {
		return err
	}
	s.ended = make(chan struct{})
	go func() { defer close(s.ended); s.process.Wait() }()
	admin, err := client.New(client.Config{URL: s.url})
	if err != nil {
		return err
	}
	for {
		if _, err := admin.BuildInfo(ctx); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.ended:
			return fmt.Errorf("the server ended: see %s", s.logFile())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// kill ends the server without a word, as a crash does.
func (s *server) kill() {
	s.process.Process.Kill()
	<-s.ended
}

func (s *server) logFile() string { return filepath.Join(s.dir, "serve.log") }

// admin returns a client with the server's first key.
func (s *server) admin() (*client.Client, error) {
	key, err := os.ReadFile(filepath.Join(s.dir, "data", "admin-key"))
	if err != nil {
		return nil, err
	}
	secret := wire.Secret(strings.TrimSpace(string(key)))
	return client.New(client.Config{URL: s.url, Token: func() wire.Secret { return secret }})
}

// tokens makes a token for each agent.
func (s *server) tokens(ctx context.Context) ([]wire.CreatedAgent, error) {
	admin, err := s.admin()
	if err != nil {
		return nil, err
	}
	rows, err := admin.Agents(ctx)
	if err != nil {
		return nil, err
	}
	made := make([]wire.CreatedAgent, len(rows))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(8)
	for i, row := range rows {
		group.Go(func() (err error) {
			made[i], err = admin.AgentToken(ctx, row.ID)
			return err
		})
	}
	return made, group.Wait()
}

// recovering is what the store says of its files after a server was killed, which is no trouble.
var recovering = regexp.MustCompile(`store: Filestore .*(attempting to recover|will rebuild|Recovering stream state|Stream state detected prior state)`)

// troubles are the warnings and errors in the server's log.
func (s *server) troubles() ([]string, error) {
	body, err := os.ReadFile(s.logFile())
	if err != nil {
		return nil, err
	}
	var found []string
	lines := bufio.NewScanner(bytes.NewReader(body))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if line := lines.Text(); !recovering.MatchString(line) && (strings.Contains(line, "WARN") || strings.Contains(line, "ERROR") || strings.Contains(line, "panic")) {
			found = append(found, line)
		}
	}
	return found, lines.Err()
}

// usage is what the kernel tells about a process.
type usage struct {
	resident, anonymous, peak int64 // bytes
	cpu                       time.Duration
}

func (s *server) usage() (u usage, err error) {
	pid := s.process.Process.Pid
	body, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return u, err
	}
	for _, line := range strings.Split(string(body), "\n") {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		kib, _ := strconv.ParseInt(fields[1], 10, 64)
		switch fields[0] {
		case "VmRSS:":
			u.resident = kib << 10
		case "RssAnon:":
			u.anonymous = kib << 10
		case "VmHWM:":
			u.peak = kib << 10
		}
	}
	body, err = os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return u, err
	}
	// The second field is the name in parentheses, which may hold spaces; utime and stime are 12 and 13 after it.
	fields := strings.Fields(string(body[bytes.LastIndexByte(body, ')')+1:]))
	if len(fields) < 13 {
		return u, errors.New("cannot read processor time")
	}
	for _, f := range fields[11:13] {
		ticks, err := strconv.Atoi(f)
		if err != nil {
			return u, err
		}
		u.cpu += time.Duration(ticks) * 10 * time.Millisecond // the kernel counts in ticks of 10 ms
	}
	return u, nil
}
