package agent

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/berthd/berth/shell"
	"github.com/berthd/berth/sshd"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// shells are commands in containers of a workspace that is real, whose token is "planted".
func shells(t *testing.T) *containerShells {
	t.Helper()
	workspace := shell.New(shell.Config{})
	workspace.Update(&agentpb.Manifest{WorkspaceName: "ws"}, "planted")
	return &containerShells{
		program: "/bin/berthd", command: workspace.Command,
		find: func(_ context.Context, name string) (wire.Container, string, error) {
			switch name {
			case "web":
				return wire.Container{ID: "abc", Name: "web", Running: true}, "unix:///run/docker.sock", nil
			case "db":
				return wire.Container{ID: "def", Name: "db", Engine: "docker", Status: "exited with code 3: \x1b[2J"}, "unix:///run/docker.sock", nil
			}
			return wire.Container{}, "", errors.New("no engine knows it")
		},
	}
}

func TestContainerShell(t *testing.T) {
	s := shells(t)
	client := []string{"LANG=C.UTF-8", "PATH=/evil", "HOME=/h", "A,B=1", "CODER_AGENT_TOKEN=guess", "EDITOR=vi", "EDITOR=vi", "LD_PRELOAD=/x"}
	spec, err := s.spec(t.Context(), sshd.Container{Name: "web", User: "dev"}, "make 'it'", client)
	if err != nil {
		t.Fatal(err)
	}
	names := strings.Join(append(slices.Clone(containerVariables), "LANG", "EDITOR"), ",")
	want := []string{"/bin/berthd", "container-exec", "--engine", "unix:///run/docker.sock", "--container", "abc", "--user", "dev", "--env", names, "--", "make 'it'"}
	if diff := cmp.Diff(want, spec.Argv); diff != "" {
		t.Error(diff)
	}
	if !slices.Contains(spec.Env, "CODER_WORKSPACE_NAME=ws") || !slices.Contains(spec.Env, "LANG=C.UTF-8") || spec.Dir == "" {
		t.Errorf("runs in %q with %q", spec.Dir, spec.Env)
	}
	if strings.Contains(strings.Join(spec.Argv, " "), "planted") {
		t.Error("the token is in the command line")
	}

	spec, err = s.spec(t.Context(), sshd.Container{Name: "web"}, "", nil)
	if err != nil || slices.Contains(spec.Argv, "--") || slices.Contains(spec.Argv, "--user") {
		t.Errorf("a login shell is %q, %v", spec.Argv, err)
	}
	// Even a client that knows the name and the value of what is not for containers does not get it there by guessing the name alone.
	spec, err = s.spec(t.Context(), sshd.Container{Name: "web"}, "", []string{"BERTH_AGENT_TOKEN=wrong"})
	if err != nil || strings.Contains(strings.Join(spec.Argv, " "), "BERTH_AGENT_TOKEN") {
		t.Errorf("%q, %v", spec.Argv, err)
	}
}

func TestContainerShellRefused(t *testing.T) {
	off, lost := shells(t), shells(t)
	off.refusal, lost.program = "off", ""
	for name, tt := range map[string]struct {
		shells *containerShells
		in     string
		want   string
	}{
		"switched off": {off, "web", "containers are switched off here (--devcontainers=false)"},
		"no program":   {lost, "web", "berthd does not know its own program"},
		"stopped":      {shells(t), "db", `cannot run in container "docker/db": it does not run, its state is "exited with code 3: \x1b[2J"`},
		"unknown":      {shells(t), "x", "no engine knows it"},
	} {
		if _, err := tt.shells.spec(t.Context(), sshd.Container{Name: tt.in}, "", nil); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}
