package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/berthd/berth/wire/agentpb"
)

// editorSettings keep VS Code and its kin from answering git themselves, so that git asks our askpass.
var editorSettings = []string{"git.useIntegratedAskPass", "github.gitAuthentication"}

// maxEditorSettings bounds a settings file that is looked at; people's have a few KiB.
const maxEditorSettings = 1 << 20

// editorFiles are where such editors keep the settings of a machine that they are a guest on.
func editorFiles(home, data string) []string {
	files := []string{filepath.Join(data, "code-server", "Machine", "settings.json")}
	for _, server := range []string{".vscode-server", ".vscode-insiders-server", ".cursor-server", ".windsurf-server", ".vscodium-server"} {
		files = append(files, filepath.Join(home, server, "data", "Machine", "settings.json"))
	}
	return files
}

// settleEditors makes editors leave git's logins to us, where the server has any and we answer git.
// What a person has set stays as it is.
func (a *agent) settleEditors(m *agentpb.Manifest) {
	if m.GetGitAuthConfigs() == 0 || a.cfg.Helpers.Program == "" {
		return
	}
	data := a.shell.Expand("$XDG_DATA_HOME", filepath.Join(a.shell.Home(), ".local", "share"))
	for _, path := range editorFiles(a.shell.Home(), data) {
		if err := a.shell.Do(func() error { return settleEditor(path) }); err != nil {
			a.log.Warn("editors may ask for git logins themselves", "error", err)
			return
		}
	}
}

// settleEditor adds what is not set to one settings file.
func settleEditor(path string) error {
	info, err := os.Stat(path)
	mode := fs.FileMode(0o600)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case info.Size() > maxEditorSettings:
		return fmt.Errorf("cannot add settings to %s: it is too large", path)
	default:
		mode = info.Mode().Perm()
	}
	old, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	next, err := withSettings(old)
	if err != nil {
		return fmt.Errorf("cannot add settings to %s: %w", path, err)
	}
	if bytes.Equal(next, old) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return os.WriteFile(path, next, mode)
}

// withSettings adds each of editorSettings that is absent, as false, in front of what is there. The rest
// of the text stays as a person wrote it.
func withSettings(old []byte) ([]byte, error) {
	if len(bytes.TrimSpace(old)) == 0 {
		old = []byte("{\n}\n")
	}
	var set map[string]json.RawMessage
	if err := json.Unmarshal(old, &set); err != nil {
		return nil, err
	}
	if set == nil {
		return nil, errors.New("it holds no settings but null")
	}
	var added []byte
	for _, name := range editorSettings {
		if _, ok := set[name]; ok {
			continue
		}
		if len(added) > 0 {
			added = append(added, ',')
		}
		added = fmt.Appendf(added, "\n\t%q: false", name)
	}
	if len(added) == 0 {
		return old, nil
	}
	if len(set) > 0 {
		added = append(added, ',')
	}
	at := bytes.IndexByte(old, '{') + 1
	return bytes.Join([][]byte{old[:at], added, old[at:]}, nil), nil
}
