// Package upgrade puts another berthd into the place of one that is installed.
//
// [Source.Fetch] downloads what a control server hosts, checks it and unpacks it into a [Candidate];
// [Candidate.Install] swaps the programs in one step each, and gives the way back.
package upgrade

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/wire"
)

// Where a control server hosts berthd.
const (
	pathVersion = "/bin/VERSION"    // the version of all of it, in one line
	pathSums    = "/bin/SHA256SUMS" // as of sha256sum(1)
	pathBin     = "/bin/"           // the archives
)

// Limits on what a server may send.
const (
	maxVersion = 128
	maxSums    = 64 << 10  // several hundred archives
	maxArchive = 256 << 20 // ten times what berthd takes
)

const (
	// attempts is how often a download is taken up again, after pauses of 1, 2, 4 and 8 s.
	attempts   = 5
	firstPause = time.Second
	// stall bounds how long a download may stand still.
	stall = 30 * time.Second
)

// Source is a control server that hosts berthd.
type Source struct {
	URL    *url.URL
	HTTP   *http.Client
	Header http.Header // for each request
}

// Version asks which version is hosted.
func (s Source) Version(ctx context.Context) (string, error) {
	text, err := s.read(ctx, pathVersion, maxVersion)
	if err != nil {
		return "", err
	}
	version := strings.TrimSpace(string(text))
	if !isVersion(version) {
		return "", fmt.Errorf("cannot use %s: it holds no version; check the URL", s.url(pathVersion))
	}
	return version, nil
}

// isVersion tells whether text may be a version: what is none, a page of a proxy, is not to be shown as one.
func isVersion(text string) bool {
	return strings.HasPrefix(text, "v") && strings.Trim(text, versionLetters) == ""
}

// versionLetters are those of a semantic version.
const versionLetters = "0123456789.-+abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

// Archive is the name of the archive for this machine.
func Archive() string {
	arch := runtime.GOARCH
	if arch == "arm" {
		arch = "armv7"
	}
	return "berthd-" + runtime.GOOS + "-" + arch + ".tar.gz"
}

// Fetch downloads the archive for this machine, checks its SHA-256, which is pin, or what the server says where that is
// empty, and unpacks it beside program. The error says what is wrong and what helps.
func (s Source) Fetch(ctx context.Context, program, pin string) (*Candidate, error) {
	if pin == "" {
		sums, err := s.read(ctx, pathSums, maxSums)
		if err != nil {
			return nil, err
		}
		if pin = sumOf(sums, Archive()); pin == "" {
			return nil, fmt.Errorf("%s hosts no %s: let its operator add it, or give another archive with --file", s.URL, Archive())
		}
	}
	f, err := os.CreateTemp("", "berthd-*.tar.gz")
	if err != nil {
		return nil, fmt.Errorf("cannot keep the download: %w", err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := s.download(ctx, pathBin+Archive(), f); err != nil {
		return nil, err
	}
	return Open(f.Name(), program, pin)
}

// sumOf finds the SHA-256 of a file in what sha256sum(1) prints; "" if it is not there.
func sumOf(sums []byte, name string) string {
	lines := bufio.NewScanner(bytes.NewReader(sums))
	for lines.Scan() {
		sum, file, ok := strings.Cut(lines.Text(), " ")
		if ok && strings.TrimLeft(file, " *") == name && validSum(sum) {
			return strings.ToLower(sum)
		}
	}
	return ""
}

func validSum(sum string) bool {
	raw, err := hex.DecodeString(sum)
	return err == nil && len(raw) == sha256.Size
}

func (s Source) url(path string) string { return s.URL.JoinPath(path).String() }

// get makes one request, for what comes after the first from bytes of the version that tag names.
func (s Source) get(ctx context.Context, path string, from int64, tag string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url(path), nil)
	if err != nil {
		return nil, err
	}
	if s.Header != nil {
		req.Header = s.Header.Clone()
	}
	if from > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", from))
		req.Header.Set("If-Range", tag)
	}
	resp, err := s.HTTP.Do(req)
	if err != nil {
		return nil, client.Explain(err)
	}
	media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	served := resp.StatusCode == http.StatusOK || from > 0 && resp.StatusCode == http.StatusPartialContent
	if !served || media == "text/html" { // a login page
		defer resp.Body.Close()
		return nil, client.Explain(wire.ReadError(resp))
	}
	return resp, nil
}

// read reads a small file.
func (s Source) read(ctx context.Context, path string, limit int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, stall)
	defer cancel()
	resp, err := s.get(ctx, path, 0, "")
	if err != nil {
		return nil, fmt.Errorf("cannot get %s: %w", s.url(path), err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(http.MaxBytesReader(nil, resp.Body, limit))
	if err != nil {
		return nil, fmt.Errorf("cannot get %s: %w", s.url(path), err)
	}
	return body, nil
}

// download writes a file to f. What breaks off is taken up where it did, as far as the server lets that be.
func (s Source) download(ctx context.Context, path string, f *os.File) error {
	var have int64
	var tag string
	var err error
	pause := firstPause
	for range attempts {
		if err != nil {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(pause):
			}
			pause *= 2
		}
		if have, tag, err = s.fetchRest(ctx, path, f, have, tag); err == nil {
			return nil
		}
		if permanent(err) {
			break
		}
	}
	return fmt.Errorf("cannot get %s: %w", s.url(path), err)
}

// permanent tells whether an answer will be the same again.
func permanent(err error) bool {
	status := http.StatusInternalServerError // no answer at all may be another the next time
	if e, ok := errors.AsType[*wire.UnexpectedResponse](err); ok {
		status = e.StatusCode
	} else if e, ok := errors.AsType[*wire.Error](err); ok {
		status = e.StatusCode
	}
	return status < http.StatusInternalServerError && status != http.StatusTooManyRequests
}

// fetchRest makes one attempt at what f lacks, and returns how much it has then.
func (s Source) fetchRest(ctx context.Context, path string, f *os.File, have int64, tag string) (int64, string, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := time.AfterFunc(stall, func() { cancel(fmt.Errorf("nothing came for %s", stall)) })
	defer watch.Stop()
	if tag == "" {
		have = 0
	}
	resp, err := s.get(ctx, path, have, tag)
	if err != nil {
		return have, tag, cmp.Or(context.Cause(ctx), err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		have = 0
		if err := f.Truncate(0); err != nil {
			return 0, "", fmt.Errorf("cannot keep the download: %w", err)
		}
	}
	if _, err := f.Seek(have, io.SeekStart); err != nil {
		return 0, "", fmt.Errorf("cannot keep the download: %w", err)
	}
	tag = resp.Header.Get("ETag")
	if strings.HasPrefix(tag, "W/") {
		tag = "" // it does not promise the same bytes
	}
	body := http.MaxBytesReader(nil, resp.Body, maxArchive-have)
	n, err := io.Copy(f, progress{body, func() { watch.Reset(stall) }})
	if err != nil {
		err = cmp.Or(context.Cause(ctx), err)
	}
	return have + n, tag, err
}

// progress tells of what is read.
type progress struct {
	io.Reader
	moved func()
}

func (p progress) Read(b []byte) (int, error) {
	n, err := p.Reader.Read(b)
	if n > 0 {
		p.moved()
	}
	return n, err
}
