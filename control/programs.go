package control

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/berthd/berth/deploy"
)

// Names in a directory of agent programs, and below /bin/ of what a server hands out.
const (
	sumsFile    = "SHA256SUMS"
	versionFile = "VERSION"
)

// maxProgramsText bounds the two small files there: a line for each archive takes some 100 bytes.
const maxProgramsText = 4 << 10

// archives are the agent programs that a server may hand out; others that lie beside them stay there.
var archives = []string{"berthd-linux-amd64.tar.gz", "berthd-linux-arm64.tar.gz", "berthd-linux-armv7.tar.gz"}

// programs are the agent programs that a server hands out, as they were when they were last checked.
type programs struct {
	archives              map[string]archive
	version, sums, script text
}

// archive is a file whose sum was right.
type archive struct {
	path string
	sum  string // SHA-256 in hex
	info fs.FileInfo
}

// text is something small to hand out.
type text struct {
	body []byte
	sum  string
	made time.Time
}

func newText(body string) text {
	sum := sha256.Sum256([]byte(body))
	return text{[]byte(body), hex.EncodeToString(sum[:]), time.Now()}
}

var semanticVersion = regexp.MustCompile(`^v[0-9]+\.[0-9]+\.[0-9]+(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?$`)

// readPrograms checks the agent programs in a directory that the release command made. An archive that is not what
// SHA256SUMS says, or that it does not name, is left out and told in refused; others are handed out all the same.
func readPrograms(dir string, access *url.URL) (_ *programs, refused []error, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot hand out agent programs: %w; %s has to be what the release command makes (docs/release.md)", err, dir)
		}
	}()
	version, err := readFile(filepath.Join(dir, versionFile), maxProgramsText)
	if err != nil {
		return nil, nil, err
	}
	version = bytes.TrimSpace(version)
	if !semanticVersion.Match(version) {
		return nil, nil, fmt.Errorf("%s holds %q, which is no version like v1.2.3", versionFile, short(string(version)))
	}
	list, err := readFile(filepath.Join(dir, sumsFile), maxProgramsText)
	if err != nil {
		return nil, nil, err
	}
	p := &programs{archives: map[string]archive{}}
	var sums strings.Builder
	for line := range strings.Lines(string(list)) {
		want, name, ok := strings.Cut(strings.TrimRight(line, "\r\n"), "  ")
		if !ok || !slices.Contains(archives, name) {
			continue
		}
		a, err := checkArchive(filepath.Join(dir, name), want)
		if err != nil {
			refused = append(refused, err)
			continue
		}
		p.archives[name] = a
		fmt.Fprintf(&sums, "%s  %s\n", a.sum, name)
	}
	if len(p.archives) == 0 {
		return nil, nil, errors.Join(append([]error{fmt.Errorf("%s names no archive that is there", sumsFile)}, refused...)...)
	}
	p.version, p.sums = newText(string(version)+"\n"), newText(sums.String())
	p.script = newText(deploy.InstallScript(strings.TrimSuffix(access.String(), "/"), string(version), sums.String()))
	return p, refused, nil
}

// checkArchive reads a file for its sum, without holding it.
func checkArchive(path, want string) (archive, error) {
	f, err := os.Open(path)
	if err != nil {
		return archive{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return archive{}, err
	}
	if !info.Mode().IsRegular() {
		return archive{}, fmt.Errorf("%s is no file", path)
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, f); err != nil {
		return archive{}, err
	}
	if sum := hex.EncodeToString(hash.Sum(nil)); sum != want {
		return archive{}, fmt.Errorf("%s has the SHA-256 %s, but %s says %s", path, sum, sumsFile, short(want))
	}
	return archive{path, want, info}, nil
}

// open opens the file if it is still the one that was checked.
func (a archive) open() (*os.File, error) {
	f, err := os.Open(a.path)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && (!os.SameFile(info, a.info) || info.Size() != a.info.Size() || !info.ModTime().Equal(a.info.ModTime())) {
		err = fmt.Errorf("%s has changed since its sum was checked; SIGHUP makes the server read it again", a.path)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// loadPrograms reads the directory of agent programs again, if there is one.
func (s *Server) loadPrograms() error {
	if s.config.AgentPrograms == "" {
		return nil
	}
	p, refused, err := readPrograms(s.config.AgentPrograms, s.config.AccessURL)
	if err != nil {
		return err
	}
	for _, err := range refused {
		s.log.Error("an agent program is not handed out; make the directory anew (docs/release.md), then send SIGHUP", "error", err)
	}
	s.programs.Store(p)
	return nil
}
