package service

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Uninstall plans how berthd is stopped, which runs its stop scripts, and all that [Service.Install] made is taken away. What berthd keeps (its
// state and its logs) goes only by purge, and users never.
func (s *Service) Uninstall(ctx context.Context, purge bool) (*Plan, error) {
	text, err := read(s.record())
	if err != nil {
		return nil, err
	}
	var p Plan
	if text != nil {
		switch {
		case s.root != "" && s.is(ctx, "enabled"):
			p.add(s.systemctl("disable", UnitName))
		case s.root == "" && (s.is(ctx, "enabled") || s.is(ctx, "active")):
			p.add(s.systemctl("disable", "--now", UnitName))
		}
	}
	made := append(lines(text), "/"+strings.TrimPrefix(strings.TrimPrefix(s.record(), s.root), "/"))
	slices.SortFunc(made, func(a, b string) int { return strings.Compare(b, a) }) // what is in a directory before it
	for _, name := range made {
		path, isDir := filepath.Join(s.root, name), strings.HasSuffix(name, "/")
		if info, err := os.Lstat(path); err == nil && info.IsDir() == isDir {
			p.add(removal{path: path, isDir: isDir})
		}
	}
	for _, dir := range s.kept {
		switch {
		case !exists(dir):
		case purge:
			p.add(removal{path: dir, isDir: true, all: true})
		default:
			p.Notes = append(p.Notes, fmt.Sprintf("%s stays: --purge removes it", dir))
		}
	}
	if text == nil && s.is(ctx, "enabled") {
		p.Notes = append(p.Notes, "berthd install has made nothing here that it knows of; what somebody else did, systemctl disable --now berthd and the package manager undo")
	}
	if text != nil && s.root == "" {
		p.add(s.systemctl("daemon-reload"))
	}
	return &p, nil
}
