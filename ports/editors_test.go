package ports

import (
	"strings"
	"testing"
)

func TestEditorOf(t *testing.T) {
	for line, want := range map[string]string{
		// VS Code and its kin: the server, and the connection that the launcher listens on.
		"/home/u/.vscode-server/cli/servers/Stable-0f0d/server/node /home/u/.vscode-server/cli/servers/Stable-0f0d/server/out/server-main.js --port=0": VSCode,
		"/home/u/.vscode-server-insiders/bin/0f0d/node /home/u/.vscode-server-insiders/bin/0f0d/out/server-main.js":                                    VSCode,
		"/home/u/.cursor-server/bin/0f0d/node /home/u/.cursor-server/bin/0f0d/out/server-main.js":                                                      VSCode,
		"/home/u/.vscode-server/code-0f0d command-shell --on-port":                                                                                     VSCode,
		// What a person's extension listens on.
		"/home/u/.vscode-server/bin/0f0d/node /home/u/.vscode-server/bin/0f0d/out/bootstrap-fork --type=extensionHost": "",
		// Editors that are served to a browser are what people look for.
		"/usr/lib/code-server/lib/node /usr/lib/code-server/out/node/entry":           "",
		"/home/u/.vscode/cli/serve-web/0f0d/node /home/u/x/out/server-main.js --port": "",
		"/usr/bin/node /srv/server-main.js":                                           "",
		"java -Xmx2g -Didea.vendor.name=JetBrains com.intellij.idea.Main":             JetBrains,
		"/opt/remote-dev-server/bin/remote-dev-server.sh run /work":                   JetBrains,
		"java -javaagent:/opt/idea/lib/idea_rt.jar=1:/opt/idea/bin com.example.Main":  "",
		"": "",
	} {
		if got := editorOf([]byte(strings.ReplaceAll(line, " ", "\x00"))); got != want {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
}
