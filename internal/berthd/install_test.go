package berthd

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestInstallSettings: flags and variables become the settings of the service, as run would read them.
func TestInstallSettings(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root installs a service of the machine")
	}
	const url = "BERTH_URL=https://berth.example.com"
	tests := map[string]struct {
		args []string
		env  []string
		want string // of the settings; empty: refused
		says string
	}{
		"flags": {args: []string{"--url", "https://berth.example.com", "--auth", "auto", "--exit-on-refused=false", "--relay-only", "--ssh-max-timeout", "5m"},
			want: "BERTH_AUTH=auto\nBERTH_EXIT_ON_REFUSED=false\nBERTH_RELAY_ONLY=true\nBERTH_SSH_MAX_TIMEOUT=5m\n" + url + "\n"},
		"headers": {args: []string{"--header", "A=1", "--header", "B=2"}, env: []string{url, "BERTH_AUTH=auto"},
			want: "BERTH_AUTH=auto\nBERTH_HEADER=A=1,B=2\n" + url + "\n", says: "BERTH_HEADER=(not shown)"},
		"the stock agent's variables": {env: []string{"CODER_AGENT_URL=https://berth.example.com", "CODER_AGENT_AUTH=auto"}, want: "BERTH_AUTH=auto\n" + url + "\n"},
		"a terminal's variables are not the service's": {env: []string{url, "BERTH_AUTH=auto", "BERTH_STATE_DIR=/x", "BERTH_LOG_LEVEL=debug", "CODER_AGENT_TOKEN=" + secretToken},
			want: "BERTH_AUTH=auto\n" + url + "\n"},
		"a token":           {env: []string{url, "BERTH_TOKEN=" + secretToken}, want: "BERTH_TOKEN_FILE=/etc/berthd/agent-token\n" + url + "\n", says: "a secret: it is not shown"},
		"another user":      {args: []string{"--user", "root"}, env: []string{url, "BERTH_AUTH=auto"}, want: "BERTH_AUTH=auto\nBERTH_LOG_DIR=\n" + url + "\nBERTH_USER=root\n"},
		"a file":            {args: []string{"--ca-file", "/etc/../etc/ca.pem"}, env: []string{url, "BERTH_AUTH=auto"}, want: "BERTH_AUTH=auto\nBERTH_CA_FILE=/etc/ca.pem\n" + url + "\n"},
		"no such user":      {args: []string{"--user", "nobody-here"}, env: []string{url, "BERTH_AUTH=auto"}, says: "--create-user"},
		"a wrong value":     {args: []string{"--log-level", "loud"}, env: []string{url}, says: "loud"},
		"a wrong address":   {args: []string{"--auth", "auto"}, env: []string{"BERTH_URL=berth.example.com"}, says: "does not begin with http"},
		"a wrong header":    {args: []string{"--header", secretToken}, env: []string{url, "BERTH_AUTH=auto"}, says: "key=value"},
		"no token":          {env: []string{url}, says: "--auth auto"},
		"not for a service": {args: []string{"--status-json", "3"}, env: []string{url}, says: "status-json"},
		"two lines":         {args: []string{"--agent-name", "a\nb"}, env: []string{url, "BERTH_AUTH=auto"}, says: "more than one line"},
		"half a token":      {env: []string{url, "BERTH_TOKEN=" + secretToken + "\nmore"}, says: "it is one line"},
		"nobody to ask":     {args: []string{"--yes=false"}, env: []string{url, "BERTH_AUTH=auto"}, says: "--yes"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			if err := os.Mkdir(filepath.Join(root, "etc"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("root:x:0:0:root:/root:/bin/sh\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			var said bytes.Buffer
			args := append([]string{"install", "--root", root, "--yes"}, tt.args...)
			code := Main(t.Context(), args, tt.env, strings.NewReader(""), &said, &said)
			if !strings.Contains(said.String(), tt.says) || strings.Contains(said.String(), secretToken) {
				t.Errorf("it says\n%s", &said)
			}
			got, err := os.ReadFile(filepath.Join(root, "etc/berthd/berthd.env"))
			switch {
			case tt.want == "" && (code != ExitUsage || err == nil):
				t.Errorf("exit code %d, settings %q:\n%s", code, got, &said)
			case tt.want != "" && (code != ExitOK || string(got) != tt.want):
				t.Errorf("exit code %d, settings %q, want %q:\n%s", code, got, tt.want, &said)
			}
		})
	}
}
