package main

import (
	"archive/tar"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// packed is a file in an archive, under another name.
type packed struct{ path, name string }

// archive packs files into out/name: in this order, as root's and of the commit's date, so that nothing of this machine shows.
func (m *maker) archive(name string, files []packed) (err error) {
	f, err := os.Create(filepath.Join(m.out, name))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	z, err := gzip.NewWriterLevel(f, gzip.BestCompression)
	if err != nil {
		return err
	}
	w := tar.NewWriter(z)
	for _, file := range files {
		if err := m.pack(w, file); err != nil {
			return fmt.Errorf("cannot pack %s: %w", file.path, err)
		}
	}
	return errors.Join(w.Close(), z.Close())
}

func (m *maker) pack(w *tar.Writer, file packed) error {
	f, err := os.Open(file.path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	mode := int64(0o644)
	if info.Mode()&0o100 != 0 {
		mode = 0o755
	}
	if err := w.WriteHeader(&tar.Header{Name: file.name, Mode: mode, Size: info.Size(), ModTime: m.date, Uname: "root", Gname: "root", Format: tar.FormatUSTAR}); err != nil {
		return err
	}
	_, err = io.Copy(w, f)
	return err
}

// writeSums writes the sums of the files in dir that match, as sha256sum(1) does.
func writeSums(dir string, patterns ...string) error {
	var paths []string
	for _, pattern := range patterns {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return err
		}
		paths = append(paths, found...)
	}
	slices.Sort(paths)
	var sums strings.Builder
	for _, path := range paths {
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		sum, err := sumOf(path)
		if err != nil {
			return err
		}
		fmt.Fprintf(&sums, "%x  %s\n", sum, filepath.ToSlash(name))
	}
	return os.WriteFile(filepath.Join(dir, sumsFile), []byte(sums.String()), 0o644)
}

func sumOf(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	hash := sha256.New()
	if _, err := io.Copy(hash, f); err != nil {
		return nil, err
	}
	return hash.Sum(nil), nil
}
