package agent

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/berthd/berth/wire"
)

// maxListed bounds one directory listing: what a person can look through, and about 10 MB of JSON.
const maxListed = 50_000

// listDirectoryRequest is the body of POST list-directory.
type listDirectoryRequest struct {
	Path []string `json:"path"`
	// Relativity is "root" or "home".
	Relativity string `json:"relativity"`
}

// directory answers it.
type directory struct {
	AbsolutePath       []string         `json:"absolute_path"`
	AbsolutePathString string           `json:"absolute_path_string"`
	Contents           []directoryEntry `json:"contents"`
}

type directoryEntry struct {
	Name               string `json:"name"`
	AbsolutePathString string `json:"absolute_path_string"`
	IsDir              bool   `json:"is_dir"`
}

func (a *api) listDirectory(w http.ResponseWriter, r *http.Request) {
	if !onlyQuery(w, r, "path") {
		return
	}
	var req listDirectoryRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, wire.MaxJSONBody)).Decode(&req); err != nil {
		writeError(w, http.StatusBadRequest, "Request body must be valid JSON.", err)
		return
	}
	path, err := req.resolve(r.URL.Query().Get("path"), a.home)
	if err != nil {
		writeError(w, http.StatusInternalServerError, err.Error(), nil)
		return
	}
	var dir *directory
	err = a.user.Do(func() error {
		dir, err = listDirectory(path)
		return err
	})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		writeError(w, http.StatusNotFound, err.Error(), nil)
	case errors.Is(err, fs.ErrPermission):
		writeError(w, http.StatusForbidden, err.Error(), nil)
	case err != nil:
		writeError(w, http.StatusInternalServerError, err.Error(), nil)
	default:
		writeJSON(w, http.StatusOK, dir)
	}
}

// resolve returns the absolute path that is asked for; one given in the query wins over the body.
func (req listDirectoryRequest) resolve(query string, home func() (string, error)) (string, error) {
	if query != "" {
		if !filepath.IsAbs(query) {
			return "", fmt.Errorf("path must be absolute: %q", query)
		}
		return filepath.Clean(query), nil
	}
	switch req.Relativity {
	case "root":
		return filepath.Join(append([]string{string(filepath.Separator)}, req.Path...)...), nil
	case "home":
		home, err := home()
		if err != nil {
			return "", fmt.Errorf("cannot find the home directory: %w", err)
		}
		return filepath.Join(append([]string{home}, req.Path...)...), nil
	}
	return "", fmt.Errorf("unsupported relativity %q", req.Relativity)
}

func (a *api) home() (string, error) {
	if a.user != nil {
		return a.user.Home, nil
	}
	return os.UserHomeDir()
}

// listDirectory lists a directory: directories first, then by name.
func listDirectory(path string) (*directory, error) {
	// Opening a FIFO as a file would wait for its writer, for ever.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot list directory: %w", err)
	}
	defer f.Close()
	entries, err := f.ReadDir(maxListed)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("cannot list directory: %w", err)
	}
	dir := &directory{
		AbsolutePath:       []string{},
		AbsolutePathString: path,
		Contents:           make([]directoryEntry, 0, len(entries)),
	}
	if trimmed := strings.Trim(path, string(filepath.Separator)); trimmed != "" {
		dir.AbsolutePath = strings.Split(trimmed, string(filepath.Separator))
	}
	for _, e := range entries {
		full := filepath.Join(path, e.Name())
		isDir := e.IsDir()
		if e.Type()&fs.ModeSymlink != 0 {
			if info, err := os.Stat(full); err == nil {
				isDir = info.IsDir()
			}
		}
		dir.Contents = append(dir.Contents, directoryEntry{Name: e.Name(), AbsolutePathString: full, IsDir: isDir})
	}
	slices.SortFunc(dir.Contents, func(x, y directoryEntry) int {
		if x.IsDir != y.IsDir {
			if x.IsDir {
				return -1
			}
			return 1
		}
		return cmp.Compare(x.Name, y.Name)
	})
	return dir, nil
}
