package shell

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	"github.com/berthd/berth/account"
	"github.com/berthd/berth/internal/testhome"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

func TestMain(m *testing.M) { testhome.Main(m) }

// workspace returns one whose user has the given passwd shell; its home is a new directory.
func workspace(t *testing.T, cfg Config, shell string, environ ...string) (*Workspace, string) {
	t.Helper()
	home := t.TempDir()
	passwd := filepath.Join(t.TempDir(), "passwd")
	line := fmt.Sprintf("nobody:x:65000:65000::/:/bin/false\nann:x:%d:100:Ann:%s:%s\n", os.Getuid(), home, shell)
	if err := os.WriteFile(passwd, []byte(line), 0o600); err != nil {
		t.Fatal(err)
	}
	return newWorkspace(cfg, environ, passwd), home
}

func command(t *testing.T, w *Workspace, line string, clientEnv ...string) Spec {
	t.Helper()
	spec, err := w.Command(line, clientEnv)
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

// variables returns what spec sets for names, "-" where it sets nothing.
func variables(spec Spec, names ...string) map[string]string {
	got := map[string]string{}
	for _, name := range names {
		got[name] = "-"
		for _, pair := range spec.Env {
			if value, ok := strings.CutPrefix(pair, name+"="); ok {
				got[name] = value
			}
		}
	}
	return got
}

func TestNoCommandBeforeTheManifest(t *testing.T) {
	w, _ := workspace(t, Config{}, "/bin/sh")
	if _, err := w.Command("true", nil); !errors.Is(err, ErrNoManifest) {
		t.Errorf("got %v, want ErrNoManifest", err)
	}
	if w.Directory() != "" {
		t.Errorf("directory %q before the manifest", w.Directory())
	}
}

func TestArgv(t *testing.T) {
	w, _ := workspace(t, Config{}, "/bin/sh")
	w.Update(&agentpb.Manifest{}, "")
	for line, want := range map[string][]string{
		"":                             {"/bin/sh", "-l"},
		"echo 'a b'":                   {"/bin/sh", "-c", "echo 'a b'"},
		"\n #!/usr/bin/env -S x\nbody": {"/usr/bin/env", "-S", "x", "-c", "\n #!/usr/bin/env -S x\nbody"},
		"#!\necho":                     {"/bin/sh", "-c", "#!\necho"},
	} {
		if diff := cmp.Diff(want, command(t, w, line).Argv); diff != "" {
			t.Errorf("%q (-want +got):\n%s", line, diff)
		}
	}
	if _, err := w.Command("a\x00b", nil); err == nil {
		t.Error("a NUL byte passed")
	}
}

func TestLoginShell(t *testing.T) {
	for _, c := range []struct{ name, passwd, environ, want string }{
		{"user database wins", "/bin/cat", "SHELL=/bin/sh", "/bin/cat"},
		{"missing shell is replaced", "/nowhere/zsh", "SHELL=/nowhere/zsh", "/bin/sh"},
		{"empty means sh", "", "SHELL=/bin/cat", "/bin/sh"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, _ := workspace(t, Config{}, c.passwd, c.environ)
			if w.account.Shell != c.want {
				t.Errorf("got %s, want %s", w.account.Shell, c.want)
			}
		})
	}
	t.Run("no entry", func(t *testing.T) {
		got := lookUp("/nowhere/passwd", 4711, environment{"SHELL": "/bin/cat"})
		if diff := cmp.Diff(account.User{Name: "4711", Home: "/", Shell: "/bin/cat"}, got); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("shared uid", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "passwd")
		if err := os.WriteFile(path, []byte("root:x:0:0::/root:/bin/sh\ntoor:x:0:0::/toor:/bin/cat\nbad:0\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		for user, want := range map[string]string{"": "root", "toor": "toor", "bob": "root"} {
			if got := lookUp(path, 0, environment{"USER": user}); got.Name != want {
				t.Errorf("USER=%s gives %s, want %s", user, got.Name, want)
			}
		}
	})
}

func TestEnvironmentLayers(t *testing.T) {
	id := uuid.New()
	w, home := workspace(t,
		Config{AgentPath: "/opt/it's/berthd", URL: "https://berth.example", BinDir: "/data/bin", LastDir: "/state/bin", Fixed: []string{"BERTH_CA_FILE=/ca"}}, "/bin/sh",
		"PATH=/usr/bin", "A=agent", "B=agent", "WHO=world", "CODER_AGENT_TOKEN=old", "NOTIFY_SOCKET=/run/x", "CODER=no")
	w.Update(&agentpb.Manifest{
		WorkspaceId: id[:], WorkspaceName: "ws", AgentName: "main", OwnerUsername: "olga",
		VsCodePortProxyUri: "https://{{port}}.example",
		EnvironmentVariables: map[string]string{
			"T": "hello $WHO ${NOBODY}!$$", "SECRET": "template", "CS_DISABLE_GETTING_STARTED_OVERRIDE": "template",
			"GIT_ASKPASS": "template", "BAD=NAME": "x", "NUL": "a\x00b",
		},
		Secrets: []*agentpb.WorkspaceSecret{
			{EnvName: "SECRET", Value: []byte("$WHO")}, {FilePath: "~/x", Value: []byte("y")}, {EnvName: "RAW", Value: []byte("\x00")},
		},
	}, "s3cret")
	spec := command(t, w, "true",
		"B=client", "BERTH_CA_FILE=/stolen", "C=1", "C=2", "CODER_AGENT_TOKEN=stolen", "USER=mallory", "CODER_SSH_SESSION_TYPE=vscode", "NOTIFY_SOCKET=/run/y", "broken")
	want := map[string]string{
		"A": "agent", "B": "client", "C": "2", "T": "hello world !", "SECRET": "$WHO", "RAW": "-", "NUL": "-",
		"USER": "ann", "LOGNAME": "ann", "SHELL": "/bin/sh", "HOME": home, "PATH": "/data/bin:/usr/bin:/state/bin", "BERTH_CA_FILE": "/ca",
		"CODER": "true", "BERTH": "true",
		"CODER_WORKSPACE_NAME": "ws", "BERTH_WORKSPACE_NAME": "ws",
		"CODER_WORKSPACE_AGENT_NAME": "main", "BERTH_WORKSPACE_AGENT_NAME": "main",
		"CODER_WORKSPACE_OWNER_NAME": "olga", "BERTH_WORKSPACE_OWNER_NAME": "olga",
		"CODER_WORKSPACE_ID": id.String(), "BERTH_WORKSPACE_ID": id.String(),
		"CODER_AGENT_TOKEN": "s3cret", "BERTH_AGENT_TOKEN": "s3cret",
		"CODER_AGENT_URL": "https://berth.example", "BERTH_AGENT_URL": "https://berth.example",
		"VSCODE_PROXY_URI":                    "https://{{port}}.example",
		"CS_DISABLE_GETTING_STARTED_OVERRIDE": "template",
		"GIT_SSH_COMMAND":                     `'/opt/it'\''s/berthd' git-ssh --`, "GIT_ASKPASS": "/opt/it's/berthd",
		"SSH_CLIENT": "0.0.0.0 0 0", "SSH_CONNECTION": "0.0.0.0 0 0.0.0.0 0",
		"CODER_SSH_SESSION_TYPE": "-", "NOTIFY_SOCKET": "-", "BAD": "-", "broken": "-",
	}
	names := make([]string, 0, len(want))
	for name := range want {
		names = append(names, name)
	}
	if diff := cmp.Diff(want, variables(spec, names...)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if !slices.IsSorted(spec.Env) {
		t.Error("the environment is not sorted")
	}
}

func TestLinkerVariablesOfClientsAreRefused(t *testing.T) {
	w, _ := workspace(t, Config{}, "/bin/sh", "LD_LIBRARY_PATH=/agent")
	w.Update(&agentpb.Manifest{}, "")
	spec := command(t, w, "", "LD_PRELOAD=/x", "LD_LIBRARY_PATH=/x", "DYLD_INSERT_LIBRARIES=/x", "GLIBC_TUNABLES=x", "GCONV_PATH=/x", "LDX=fine")
	want := map[string]string{
		"LD_PRELOAD": "-", "LD_LIBRARY_PATH": "/agent", "DYLD_INSERT_LIBRARIES": "-", "GLIBC_TUNABLES": "-", "GCONV_PATH": "-", "LDX": "fine",
	}
	if diff := cmp.Diff(want, variables(spec, "LD_PRELOAD", "LD_LIBRARY_PATH", "DYLD_INSERT_LIBRARIES", "GLIBC_TUNABLES", "GCONV_PATH", "LDX")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestAnotherUser: their database entry counts, not this process's environment, and the kernel keeps them out where they may not go.
func TestAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root becomes another user")
	}
	user := &account.User{Name: "dev", UID: 54321, GID: 54322, Groups: []uint32{54322, 54323}, Home: "/", Shell: "/bin/sh"}
	w := newWorkspace(Config{User: user}, []string{"PATH=/usr/bin:/bin", "HOME=/root", "SHELL=/bin/bash", "XDG_STATE_HOME=/root/x", "LANG=C", "MAIL=/m"}, "/etc/passwd")
	w.Update(&agentpb.Manifest{Directory: t.TempDir()}, "") // root's alone
	spec := command(t, w, "id -u; id -g; id -G; pwd")
	want := map[string]string{"HOME": "/", "USER": "dev", "LOGNAME": "dev", "SHELL": "/bin/sh", "XDG_STATE_HOME": "-", "MAIL": "-", "LANG": "C", "PATH": "/usr/bin:/bin"}
	if diff := cmp.Diff(want, variables(spec, "HOME", "USER", "LOGNAME", "SHELL", "XDG_STATE_HOME", "MAIL", "LANG", "PATH")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	out, err := spec.Cmd(t.Context()).Output()
	if string(out) != "54321\n54322\n54322 54323\n/\n" || err != nil {
		t.Errorf("%q, %v", out, err)
	}
}

func TestGitHelpersOnlyWhereTheyExist(t *testing.T) {
	w, _ := workspace(t, Config{}, "/bin/sh")
	w.Update(&agentpb.Manifest{}, "")
	if diff := cmp.Diff(map[string]string{"GIT_SSH_COMMAND": "-", "GIT_ASKPASS": "-"}, variables(command(t, w, ""), "GIT_SSH_COMMAND", "GIT_ASKPASS")); diff != "" {
		t.Error(diff)
	}
}

func TestDirectory(t *testing.T) {
	w, home := workspace(t, Config{}, "/bin/sh", "PROJECT=src")
	src := filepath.Join(home, "src")
	if err := os.Mkdir(src, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(home, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ given, expanded, start string }{
		{"", "", home},
		{"~", home, home},
		{"~/src", src, src},
		{"~/$PROJECT", src, src},
		{"${PROJECT}/", src, src},
		{"/etc", "/etc", "/etc"},
		{"~/missing", filepath.Join(home, "missing"), home},
		{"file", filepath.Join(home, "file"), home},
	} {
		w.Update(&agentpb.Manifest{Directory: c.given}, "")
		if got := w.Directory(); got != c.expanded {
			t.Errorf("%q expands to %q, want %q", c.given, got, c.expanded)
		}
		if got := command(t, w, "").Dir; got != c.start {
			t.Errorf("%q starts in %q, want %q", c.given, got, c.start)
		}
	}
	if got := w.Expand("a/$PROJECT.log", "/logs"); got != "/logs/a/src.log" {
		t.Errorf("expanded to %q", got)
	}
}

func TestSecretsDoNotPrint(t *testing.T) {
	w, _ := workspace(t, Config{}, "/bin/sh", "CODER_AGENT_TOKEN=pl4nted")
	w.Update(&agentpb.Manifest{Secrets: []*agentpb.WorkspaceSecret{{EnvName: "S", Value: []byte("pl4nted")}}}, "pl4nted")
	var out bytes.Buffer
	spec := command(t, w, "true")
	slog.New(slog.NewTextHandler(&out, nil)).Info("start", "spec", spec)
	fmt.Fprintf(&out, "%v %+v %#v %s", spec, spec, spec, spec)
	fmt.Fprintf(&out, "%v %+v %#v", w, w, w)
	if strings.Contains(out.String(), "pl4nted") {
		t.Errorf("a secret was printed: %s", out.String())
	}
}

func TestCommandRuns(t *testing.T) {
	w, _ := workspace(t, Config{}, "/bin/sh", "PATH=/usr/bin:/bin")
	w.Update(&agentpb.Manifest{Directory: "/tmp"}, "")
	for _, c := range []struct{ line, want string }{
		{`echo "$PWD $GREETING"`, "/tmp hi\n"},
		{"#!/usr/bin/env sh\necho script", "script\n"},
		{"#!sh -e\nfalse\necho unreached", ""},
	} {
		out, err := command(t, w, c.line, "GREETING=hi").Cmd(t.Context()).Output()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Errorf("%q: %v", c.line, err)
		}
		if string(out) != c.want {
			t.Errorf("%q printed %q, want %q", c.line, out, c.want)
		}
	}
}

func TestCmdHangsUpTheWholeGroup(t *testing.T) {
	w, _ := workspace(t, Config{}, "/bin/sh", "PATH=/usr/bin:/bin")
	w.Update(&agentpb.Manifest{}, "")
	ctx, cancel := context.WithCancel(t.Context())
	cmd := command(t, w, "sleep 1000 & echo $!; wait").Cmd(ctx)
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 32)
	n, err := pipe.Read(line)
	if err != nil {
		t.Fatal(err)
	}
	child, err := strconv.Atoi(strings.TrimSpace(string(line[:n])))
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := pipe.Read(line); err == nil { // end of file: no process holds the pipe any more
		t.Error("output after the hang-up")
	}
	if err := cmd.Wait(); err == nil {
		t.Error("a hung-up command succeeded")
	}
	if cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGHUP {
		t.Errorf("ended by %v, want SIGHUP", cmd.ProcessState)
	}
	if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", child)); err == nil && strings.Contains(exe, "sleep") {
		t.Error("the child outlived its group")
	}
}

func TestSignalToAGoneGroup(t *testing.T) {
	w, _ := workspace(t, Config{}, "/bin/sh")
	w.Update(&agentpb.Manifest{}, "")
	cmd := command(t, w, "true").Cmd(t.Context())
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if err := Signal(cmd.Process, syscall.SIGHUP); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("got %v, want os.ErrProcessDone", err)
	}
}

func TestUpdateWhileCommandsStart(t *testing.T) {
	w, _ := workspace(t, Config{}, "/bin/sh")
	w.Update(&agentpb.Manifest{WorkspaceName: "0"}, "0")
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			for n := range 50 {
				if i == 0 {
					w.Update(&agentpb.Manifest{WorkspaceName: strconv.Itoa(n)}, wire.Secret(strconv.Itoa(n)))
				} else if spec, err := w.Command("true", nil); err != nil {
					t.Error(err)
				} else if v := variables(spec, "CODER_WORKSPACE_NAME", "CODER_AGENT_TOKEN"); v["CODER_WORKSPACE_NAME"] != v["CODER_AGENT_TOKEN"] {
					t.Errorf("manifest and token of two updates: %v", v)
				}
			}
		})
	}
	group.Wait()
}

// FuzzManifest takes in whatever a server might send, and starts nothing with it: what a session would
// get has proper variables only, each once.
func FuzzManifest(f *testing.F) {
	id := uuid.New()
	for _, m := range []*agentpb.Manifest{
		{},
		{WorkspaceId: id[:], WorkspaceName: "ws", AgentName: "main", OwnerUsername: "olga", Directory: "~/$HOME/${"},
		{WorkspaceId: []byte("short"), VsCodePortProxyUri: "https://{{port}}.example"},
		{EnvironmentVariables: map[string]string{"A": "$A$B${C", "PATH": "$PATH:/x", "CODER": "no", "LD_PRELOAD": "/x", "BAD=": "x", "NUL": "\x00"}},
		{Secrets: []*agentpb.WorkspaceSecret{{EnvName: "S", Value: []byte("\xff\x00")}, {EnvName: "=", Value: []byte("x")}}},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, "A=b")
	}
	w := newWorkspace(Config{Log: slog.New(slog.DiscardHandler)}, []string{"PATH=/bin", "HOME=/nonexistent"}, "/nonexistent")
	f.Fuzz(func(t *testing.T, message []byte, fromClient string) {
		m := new(agentpb.Manifest)
		if proto.Unmarshal(message, m) != nil {
			return
		}
		w.Update(m, "s3cret")
		spec, err := w.Command("true", []string{fromClient})
		if err != nil {
			return
		}
		seen := map[string]string{}
		for _, pair := range spec.Env {
			name, value, ok := strings.Cut(pair, "=")
			if _, twice := seen[name]; !ok || name == "" || twice || strings.ContainsRune(pair, 0) {
				t.Errorf("variable %q", pair)
			}
			seen[name] = value
		}
	})
}
