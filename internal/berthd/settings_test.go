package berthd

import (
	"bytes"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/berthd/berth/agent"
	"github.com/berthd/berth/wire"
)

func parse(t *testing.T, env environment, args ...string) *settings {
	t.Helper()
	if env == nil {
		env = environment{}
	}
	env["HOME"] = "/home/u"
	s, err := parseSettings(args, env, false)
	if err != nil {
		t.Fatalf("parseSettings(%q): %v", args, err)
	}
	return s
}

// TestPrecedence: a flag, then our variable, then the stock agent's.
func TestPrecedence(t *testing.T) {
	stock := environment{"CODER_AGENT_URL": "https://stock"}
	both := environment{"CODER_AGENT_URL": "https://stock", "BERTH_URL": "https://ours"}
	tests := map[string]struct {
		env  environment
		args []string
		want string
	}{
		"nothing":           {nil, nil, ""},
		"stock's":           {stock, nil, "https://stock"},
		"ours":              {both, nil, "https://ours"},
		"flag":              {both, []string{"--url", "https://flag"}, "https://flag"},
		"flag with =":       {both, []string{"-url=https://flag"}, "https://flag"},
		"empty is not said": {environment{"BERTH_URL": "", "CODER_AGENT_URL": "https://stock"}, nil, "https://stock"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if got := parse(t, tt.env, tt.args...).server.url; got != tt.want {
				t.Errorf("url %q, want %q", got, tt.want)
			}
		})
	}
}

// inside lets cmp look into settings.
var inside = cmp.AllowUnexported(settings{}, serverSettings{}, identitySettings{}, dirSettings{}, serviceSettings{}, outputSettings{}, headerList{})

func TestEveryVariableIsRead(t *testing.T) {
	values := map[string]string{
		"exit-on-refused": "true", "header": "X-A=1,X-B=2", "ssh-max-timeout": "5m", "ssh-resume-window": "13m", "shutdown-timeout": "7s",
		"terminal-idle-timeout": "9m", "named-terminal-idle-timeout": "24h", "ssh-terminal-grace": "11m", "terminal-scrollback": "500",
		"tailnet-listen-port": "4242", "relay-only": "1", "block-file-transfer": "true", "block-reverse-port-forwarding": "true",
		"block-local-port-forwarding": "true", "subsystem": "envbox", "log-format": "json",
		"tailnet-debug": "true", "devcontainers": "false", "coder-command": "true", "no-reap": "true", "auto-upgrade": "true", "log-level": "debug",
	}
	for _, o := range options {
		value := values[o.name]
		if value == "" {
			value = "value"
		}
		byFlag := parse(t, nil, "--"+o.name+"="+value)
		for _, name := range []string{o.env, o.fallback} {
			if name == "" {
				continue
			}
			byEnv := parse(t, environment{name: value})
			if diff := cmp.Diff(byFlag, byEnv, inside); diff != "" {
				t.Errorf("--%s and %s differ:\n%s", o.name, name, diff)
			}
			if cmp.Equal(byEnv, parse(t, nil), inside) {
				t.Errorf("%s changes nothing", name)
			}
		}
	}
}

// TestSettingsPage: docs/settings.md shows every setting as it is in the code, and no other.
func TestSettingsPage(t *testing.T) {
	page := readFile(t, "../../docs/settings.md")
	cells := func(line string) []string {
		var cells []string
		for cell := range strings.SplitSeq(strings.Trim(line, "|"), "|") {
			cells = append(cells, strings.TrimSpace(cell))
		}
		return cells
	}
	var settings, without []string
	for line := range strings.Lines(page) {
		switch c := cells(strings.TrimSpace(line)); {
		case strings.HasPrefix(line, "| `--") && len(c) == 5:
			settings = append(settings, strings.Join(c[:4], " "))
		case strings.HasPrefix(line, "| `--") && len(c) == 3:
			without = append(without, c[0])
		case strings.HasPrefix(line, "| `--"):
			t.Errorf("a row of %d cells: %s", len(c), line)
		}
	}
	show := func(prefix, name string) string {
		if name == "" {
			return "-"
		}
		return "`" + prefix + name + "`"
	}
	var want []string
	for _, o := range options {
		want = append(want, strings.Join([]string{show("--", o.name), show("", o.env), show("--", o.stock), show("", o.fallback)}, " "))
	}
	if diff := cmp.Diff(want, settings); diff != "" {
		t.Errorf("settings (-code +page):\n%s", diff)
	}
	want = nil
	for _, name := range leftOut {
		want = append(want, show("--", name))
	}
	if diff := cmp.Diff(want, without); diff != "" {
		t.Errorf("left out (-code +page):\n%s", diff)
	}
	for _, name := range []string{envToken, envTokenFallback} {
		if !strings.Contains(page, "`"+name+"`") {
			t.Errorf("the page does not name %s", name)
		}
	}
}

// TestStockFlags: the verb agent takes the stock agent's flags, and run does not.
func TestStockFlags(t *testing.T) {
	args := []string{
		"--agent-url", "https://flag", "--agent-header=X-A=1", "--pprof-address", "127.0.0.1:6060", "--devcontainers-enable=false",
		"--no-reap", "--socket-path", "/tmp/x.sock", "--socket-server-enabled=true", "--log-human", "/dev/stderr",
	}
	env := environment{"HOME": "/home/u", "BERTH_URL": "https://variable"}
	s, err := parseSettings(args, env, true)
	if err != nil {
		t.Fatal(err)
	}
	if s.server.url != "https://flag" || s.server.header.Get("X-A") != "1" || s.output.pprof != "127.0.0.1:6060" || s.services.devcontainers {
		t.Errorf("settings %+v", s)
	}
	if diff := cmp.Diff([]string{"socket-path", "socket-server-enabled"}, s.ignored); diff != "" {
		t.Errorf("ignored (-want +got):\n%s", diff)
	}
	if _, err := parseSettings(args, env, false); err == nil {
		t.Error("run took the stock agent's flags")
	}
	for _, name := range leftOut {
		if s, err := parseSettings([]string{"--" + name + "=1"}, env, true); err != nil || len(s.ignored) != 1 {
			t.Errorf("--%s: %v", name, err)
		}
	}
}

// TestLogSinks: each file gets each line in its own form, and standard error what it is told to.
func TestLogSinks(t *testing.T) {
	dir := t.TempDir()
	human, jsonFile, cloud := filepath.Join(dir, "human"), filepath.Join(dir, "json"), filepath.Join(dir, "cloud")
	if err := os.WriteFile(human, []byte("before\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var stderr, tail bytes.Buffer
	log, closeLog, err := newLog(outputSettings{logFormat: "text", logHuman: human, logJSON: jsonFile, logStackdriver: cloud}, &stderr, &tail)
	if err != nil {
		t.Fatal(err)
	}
	log = log.With("part", "x").WithGroup("g")
	log.Warn("hello", "token", wire.Secret("planted"), "level", "mine")
	log.Debug("unseen")
	closeLog()
	text := "level=WARN msg=hello part=x g.token=[redacted] g.level=mine\n"
	for name, tt := range map[string]struct{ got, want string }{
		"stderr":      {stderr.String(), text},
		"tail":        {tail.String(), text},
		"human":       {readFile(t, human), text},
		"json":        {readFile(t, jsonFile), `"level":"WARN","msg":"hello","part":"x","g":{"token":"[redacted]","level":"mine"}}` + "\n"},
		"stackdriver": {readFile(t, cloud), `"severity":"WARNING","message":"hello","part":"x","g":{"token":"[redacted]","level":"mine"}}` + "\n"},
	} {
		if !strings.HasSuffix(tt.got, tt.want) || strings.Contains(tt.got, "unseen") || strings.Contains(tt.got, "planted") {
			t.Errorf("%s got %q, want %q", name, tt.got, tt.want)
		}
	}
	if !strings.HasPrefix(readFile(t, human), "before\n") || !strings.HasPrefix(readFile(t, cloud), `{"timestamp":`) {
		t.Errorf("human %q, stackdriver %q", readFile(t, human), readFile(t, cloud))
	}

	stderr.Reset()
	log, closeLog, err = newLog(outputSettings{logFormat: "text", logJSON: "/dev/stderr"}, &stderr, &tail)
	if err != nil {
		t.Fatal(err)
	}
	defer closeLog()
	log.Info("once")
	if got := stderr.String(); strings.Count(got, "once") != 1 || !strings.HasPrefix(got, "{") {
		t.Errorf("stderr %q", got)
	}
	if _, _, err := newLog(outputSettings{logHuman: dir}, &stderr, &tail); err == nil || !strings.Contains(err.Error(), "--log-human") {
		t.Errorf("a directory as a log: %v", err)
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// TestHelperCommands: berthd is always there by one path; coder only where that is wanted.
func TestHelperCommands(t *testing.T) {
	state, err := agent.OpenState(filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer state.Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, coder := range []bool{false, true, true, false} {
		s := parse(t, environment{"BERTH_HEADER": "X-A=1,X-B=2", "BERTH_CA_FILE": "/ca.pem", "BERTH_CLIENT_CERT": "/me.pem"})
		s.services.coderCommand = coder
		h, err := s.helpers(state, nil)
		if err != nil {
			t.Fatal(err)
		}
		if to, err := os.Readlink(h.Program); err != nil || to != self || h.Program != state.Path("bin/berthd") {
			t.Errorf("program %s → %s, %v", h.Program, to, err)
		}
		if _, err := os.Lstat(filepath.Join(h.Dir, "coder")); (err == nil) != coder {
			t.Errorf("coder %v, want %v", err, coder)
		}
		slices.Sort(h.Env)
		if diff := cmp.Diff([]string{"BERTH_CA_FILE=/ca.pem", "BERTH_CLIENT_CERT=/me.pem", "BERTH_HEADER=X-A=1,X-B=2"}, h.Env); diff != "" {
			t.Errorf("environment (-want +got):\n%s", diff)
		}
	}
}

func TestTokenComesFromTheEnvironment(t *testing.T) {
	s := parse(t, environment{"CODER_AGENT_TOKEN": "stock", "BERTH_TOKEN": "ours"})
	if got := s.identity.token.Reveal(); got != "ours" {
		t.Errorf("token %q, want ours", got)
	}
	if got := parse(t, environment{"CODER_AGENT_TOKEN": "stock"}).identity.token.Reveal(); got != "stock" {
		t.Errorf("token %q, want stock's", got)
	}
}

func TestValues(t *testing.T) {
	s := parse(t, environment{"BERTH_HEADER": "X-A=1,X-B=a=b", "BERTH_SSH_MAX_TIMEOUT": "90s", "BERTH_LOG_LEVEL": "debug"})
	want := http.Header{"X-A": {"1"}, "X-B": {"a=b"}}
	if diff := cmp.Diff(want, s.server.header.Header); diff != "" {
		t.Errorf("header (-want +got):\n%s", diff)
	}
	if s.services.sshMaxTimeout != 90*time.Second {
		t.Errorf("timeout %v", s.services.sshMaxTimeout)
	}
}

func TestDefaultStateDir(t *testing.T) {
	tests := map[string]struct {
		env  environment
		want string
	}{
		"xdg":          {environment{"XDG_STATE_HOME": "/xdg", "HOME": "/home/u"}, "/xdg/berthd"},
		"home":         {environment{"HOME": "/home/u"}, "/home/u/.local/state/berthd"},
		"relative xdg": {environment{"XDG_STATE_HOME": "xdg", "HOME": "/home/u"}, "/home/u/.local/state/berthd"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := defaultStateDir(1000, tt.env)
			if err != nil || got != tt.want {
				t.Errorf("defaultStateDir = %q, %v; want %q", got, err, tt.want)
			}
		})
	}
	if _, err := defaultStateDir(1000, environment{}); err == nil {
		t.Error("no error without any place")
	}
}

// TestMistakesInSettings: each is one sentence and the exit code for usage, and repeats no secret.
func TestMistakesInSettings(t *testing.T) {
	const secret = "s3cr3t-planted"
	tests := map[string]struct {
		env      environment
		args     []string
		contains string
	}{
		"no url":          {nil, nil, "BERTH_URL"},
		"no scheme":       {environment{"BERTH_URL": "berth.example.com"}, nil, "http://"},
		"other scheme":    {environment{"BERTH_URL": "ftp://berth"}, nil, "http://"},
		"no host":         {environment{"BERTH_URL": "https:///x"}, nil, "no host"},
		"password in url": {environment{"BERTH_URL": "https://u:" + secret + "@h"}, nil, "password"},
		"bad url":         {environment{"BERTH_URL": "https://h:" + secret}, nil, "URL"},
		"query":           {environment{"BERTH_URL": "https://h/?x=1"}, nil, "?"},
		"no token":        {environment{"BERTH_URL": "https://h"}, nil, "BERTH_TOKEN"},
		"unknown auth":    {environment{"BERTH_URL": "https://h"}, []string{"--auth", "magic"}, "magic"},
		"unknown flag":    {nil, []string{"--nonsense"}, "nonsense"},
		"token in argv":   {nil, []string{"--token", "x"}, "token"},
		"unknown verb":    {nil, []string{"fly"}, "fly"},
		"bad port":        {nil, []string{"--tailnet-listen-port", "70000"}, "70000"},
		"endless lines":   {nil, []string{"--terminal-scrollback", "4294967296"}, "--terminal-scrollback"},
		"bad duration":    {environment{"CODER_AGENT_SSH_MAX_TIMEOUT": "soon"}, nil, "CODER_AGENT_SSH_MAX_TIMEOUT"},
		"bad header":      {environment{"BERTH_HEADER": secret}, nil, "BERTH_HEADER"},
		"bad header flag": {nil, []string{"--header", secret}, "--header"},
		"bad header name": {nil, []string{"--header", "a b=" + secret}, "one word"},
		"negative time":   {nil, []string{"--ssh-max-timeout", "-1h"}, "negative"},
		"bad log format":  {nil, []string{"--log-format", "xml"}, "xml"},
		"bad subsystem":   {environment{"CODER_AGENT_SUBSYSTEM": "vm"}, nil, "vm"},
		"no ca file":      {environment{"BERTH_URL": "https://h", "BERTH_CA_FILE": "/no/such"}, nil, "/no/such"},
		"report no app":   {nil, []string{"report"}, "--app"},
		"closed fd":       {environment{"BERTH_URL": "https://h", "BERTH_TOKEN": "x"}, []string{"--status-json", "99"}, "--status-json 99"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			env := []string{"HOME=" + t.TempDir()}
			for k, v := range tt.env {
				env = append(env, k+"="+v)
			}
			var out, errs bytes.Buffer
			code := Main(t.Context(), tt.args, env, nil, &out, &errs)
			if code != ExitUsage {
				t.Errorf("exit code %d, want %d: %s", code, ExitUsage, &errs)
			}
			if !strings.Contains(errs.String(), tt.contains) || strings.Count(errs.String(), "\n") != 1 {
				t.Errorf("said %q, want one line with %q", &errs, tt.contains)
			}
			if strings.Contains(errs.String(), secret) {
				t.Errorf("the secret was repeated: %q", &errs)
			}
		})
	}
}

func TestHelpNamesEveryVariable(t *testing.T) {
	var out, errs bytes.Buffer
	if code := Main(t.Context(), []string{"run", "--help"}, []string{"HOME=/"}, nil, &out, &errs); code != ExitOK {
		t.Errorf("exit code %d: %s", code, &errs)
	}
	for _, o := range options {
		for _, want := range []string{"--" + o.name, o.env, o.fallback} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("--help does not name %s", want)
			}
		}
	}
}

// TestFirstLineOfVersion: stock start scripts look for "Coder" there.
func TestFirstLineOfVersion(t *testing.T) {
	for _, args := range [][]string{{"version"}, {"--version"}} {
		var out, errs bytes.Buffer
		if code := Main(t.Context(), args, nil, nil, &out, &errs); code != ExitOK {
			t.Errorf("exit code %d: %s", code, &errs)
		}
		if line, _, _ := strings.Cut(out.String(), "\n"); !strings.Contains(line, "Coder") || !strings.HasPrefix(line, "berthd v") {
			t.Errorf("first line %q", line)
		}
	}
}

// TestSources: which source the settings choose, and in what order tokens are looked for.
func TestSources(t *testing.T) {
	credentials := t.TempDir()
	if err := os.WriteFile(filepath.Join(credentials, "agent-token"), []byte("x"), 0o400); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		env  environment
		want string
	}{
		"variable":                  {environment{"BERTH_TOKEN": "x"}, "token"},
		"file":                      {environment{"BERTH_TOKEN_FILE": "/f"}, "token file /f"},
		"variable before file":      {environment{"BERTH_TOKEN": "x", "BERTH_TOKEN_FILE": "/f"}, "token"},
		"credential before both":    {environment{"BERTH_TOKEN": "x", "BERTH_TOKEN_FILE": "/f", "CREDENTIALS_DIRECTORY": credentials}, "systemd credential agent-token"},
		"no such credential":        {environment{"BERTH_TOKEN": "x", "BERTH_CREDENTIAL": "other", "CREDENTIALS_DIRECTORY": credentials}, "token"},
		"AWS":                       {environment{"BERTH_TOKEN": "x", "CODER_AGENT_AUTH": "aws-instance-identity"}, "AWS instance identity"},
		"Azure":                     {environment{"BERTH_AUTH": "azure-instance-identity"}, "Azure instance identity"},
		"Google":                    {environment{"BERTH_AUTH": "google-instance-identity"}, "Google Cloud instance identity"},
		"Kubernetes":                {environment{"BERTH_AUTH": "kubernetes-service-account"}, "Kubernetes service-account token /var/run/secrets/berth/token"},
		"Kubernetes elsewhere":      {environment{"BERTH_AUTH": "kubernetes-service-account", "BERTH_TOKEN_FILE": "/f"}, "Kubernetes service-account token /f"},
		"auto with a token":         {environment{"BERTH_AUTH": "auto", "BERTH_TOKEN": "x"}, "token"},
		"auto with a credential":    {environment{"BERTH_AUTH": "auto", "CREDENTIALS_DIRECTORY": credentials}, "systemd credential agent-token"},
		"auto with nothing of this": {environment{"BERTH_AUTH": "auto"}, "the cloud's instance identity, once it is known which cloud this is"},
	} {
		t.Run(name, func(t *testing.T) {
			s := parse(t, tt.env)
			source, err := s.identity.source(exchanger(agent.Server{}), slog.New(slog.DiscardHandler), func(agent.Event) {})
			if err != nil || source.String() != tt.want {
				t.Errorf("source %v, %v; want %s", source, err, tt.want)
			}
		})
	}
}

func TestOnRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		args  []string
		ends  bool
		stock bool
		want  agent.RefusedPolicy
	}{
		"nothing said":             {nil, false, false, agent.ExitWhenLost},
		"in a container":           {nil, true, false, agent.StayWhenRefused},
		"as stock scripts do":      {nil, false, true, agent.StayWhenRefused},
		"exit":                     {[]string{"--exit-on-refused"}, false, false, agent.ExitWhenRefused},
		"a container shall exit":   {[]string{"--exit-on-refused=true"}, true, false, agent.ExitWhenRefused},
		"a stock agent shall exit": {[]string{"--exit-on-refused"}, false, true, agent.ExitWhenRefused},
		"stay":                     {[]string{"--exit-on-refused=false"}, false, false, agent.StayWhenRefused},
	} {
		s, err := parseSettings(tt.args, environment{"HOME": "/home/x"}, tt.stock)
		if err != nil {
			t.Fatal(err)
		}
		if got := s.onRefused(tt.ends); got != tt.want {
			t.Errorf("%s: policy %d, want %d", name, got, tt.want)
		}
	}
}

// TestOpenState: the user of a container may have no home that can be written to, or one that several
// agents share. A stock agent works there.
func TestOpenState(t *testing.T) {
	held := t.TempDir()
	other, err := agent.OpenState(held)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	for name, tt := range map[string]struct {
		stock bool
		dirs  dirSettings
		want  error // nil: a new directory
	}{
		"not writable":         {true, dirSettings{state: "/dev/null/s", stateByDefault: true}, nil},
		"held by another":      {true, dirSettings{state: held, stateByDefault: true}, nil},
		"no home at all":       {true, dirSettings{stateByDefault: true}, nil},
		"as it was told":       {true, dirSettings{state: held}, agent.ErrStateBusy},
		"not as a stock agent": {false, dirSettings{state: held, stateByDefault: true}, agent.ErrStateBusy},
	} {
		t.Run(name, func(t *testing.T) {
			temp := t.TempDir()
			t.Setenv("TMPDIR", temp)
			s := &settings{stock: tt.stock, dirs: tt.dirs}
			state, err := s.openState(slog.New(slog.DiscardHandler))
			if !errors.Is(err, tt.want) {
				t.Fatalf("error %v, want %v", err, tt.want)
			}
			if err != nil {
				return
			}
			defer state.Close()
			if dir := filepath.Dir(state.Path("x")); filepath.Dir(dir) != temp || s.dirs.state != dir {
				t.Errorf("state in %s, and settings say %s", dir, s.dirs.state)
			}
		})
	}
}
