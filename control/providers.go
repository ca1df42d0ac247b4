package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/berthd/berth/wire"
)

// provider is a service that workspaces get a credential for, such as a Git host.
type provider struct {
	id, kind string
	regex    *regexp.Regexp
	// Exactly one of these yields the token: as it is, from a file, or as what a program prints.
	token   wire.Secret
	file    string
	command []string

	mu      sync.Mutex // held while the source is asked
	asked   time.Time
	answer  credential
	failure error
}

// credential is what a source yields; without a token nobody has logged in yet.
type credential struct {
	token   wire.Secret
	extra   json.RawMessage
	expires time.Time // zero: never, or unknown
}

// errNoToken is why there is no credential yet.
var errNoToken = errors.New("nobody has logged in yet")

const (
	// askedFor is how long an answer of a source counts: those who wait for a token ask at this pace,
	// together.
	askedFor = time.Second
	// commandTimeout bounds a program that yields a token, maxToken what any source yields.
	commandTimeout = 10 * time.Second
	maxToken       = 64 << 10
)

// regexes are what providers of known kinds are for, if the configuration does not say.
var regexes = map[string]string{
	"github":          `^(https?://)?github\.com(/.*)?$`,
	"gitlab":          `^(https?://)?gitlab\.com(/.*)?$`,
	"bitbucket-cloud": `^(https?://)?bitbucket\.org(/.*)?$`,
	"azure-devops":    `^(https?://)?dev\.azure\.com(/.*)?$`,
}

// credential asks the source, at most once in askedFor. It returns errNoToken when there is no token,
// or only one that has expired.
func (p *provider) credential(ctx context.Context) (credential, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if now := time.Now(); p.asked.IsZero() || now.Sub(p.asked) >= askedFor {
		p.answer, p.failure = p.read(context.WithoutCancel(ctx)) // others wait for this answer, too
		p.asked = time.Now()
	}
	if p.failure == nil && !p.answer.expires.IsZero() && !p.answer.expires.After(time.Now()) {
		return credential{}, errNoToken
	}
	return p.answer, p.failure
}

func (p *provider) read(ctx context.Context) (credential, error) {
	switch {
	case p.file != "":
		text, err := readFile(p.file, maxToken)
		if errors.Is(err, fs.ErrNotExist) {
			return credential{}, errNoToken
		}
		if err != nil {
			return credential{}, fmt.Errorf("cannot read the token of provider %q: %w", p.id, err)
		}
		return p.parse(text)
	case p.command != nil:
		text, err := run(ctx, p.command)
		if exit := new(exec.ExitError); errors.As(err, &exit) && exit.Exited() {
			return credential{}, errNoToken // as programs say that nobody has logged in
		}
		if err != nil {
			return credential{}, fmt.Errorf("cannot get a token of provider %q: %w", p.id, err)
		}
		return p.parse(text)
	}
	return credential{token: p.token}, nil
}

func (p *provider) parse(text []byte) (credential, error) {
	c, err := parseCredential(text)
	if err != nil && !errors.Is(err, errNoToken) {
		err = fmt.Errorf("cannot use the token of provider %q: %w", p.id, err)
	}
	return c, err
}

// run returns what a program prints. What it prints to the standard error is nobody's to see: it may
// hold a secret.
func run(ctx context.Context, command []string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.WaitDelay = time.Second // what it started may keep the pipe open
	out := &limitedBuffer{limit: maxToken, end: cancel}
	cmd.Stdout = out
	err := cmd.Run()
	switch {
	case out.full:
		return nil, fmt.Errorf("%s printed more than %d bytes", command[0], maxToken)
	case err != nil && ctx.Err() != nil:
		return nil, fmt.Errorf("%s took longer than %v", command[0], commandTimeout)
	}
	return out.text, err
}

// limitedBuffer ends the program that writes to it beyond its limit. It is not made of a
// [bytes.Buffer], which would read past the limit by itself.
type limitedBuffer struct {
	text  []byte
	limit int
	end   func()
	full  bool
}

func (b *limitedBuffer) Write(p []byte) (int, error) {
	if len(b.text)+len(p) > b.limit {
		b.full = true
		b.end()
		return 0, io.ErrShortBuffer
	}
	b.text = append(b.text, p...)
	return len(p), nil
}

// parseCredential reads a token: one line, or a JSON object that also says when it ends.
func parseCredential(text []byte) (credential, error) {
	text = bytes.TrimSpace(text)
	var c credential
	if bytes.HasPrefix(text, []byte("{")) {
		var found struct {
			AccessToken string          `json:"access_token"`
			TokenExtra  json.RawMessage `json:"token_extra"`
			ExpiresAt   time.Time       `json:"expires_at"`
		}
		if json.Unmarshal(text, &found) != nil { // the error may quote what it could not read
			return credential{}, errors.New("it begins like JSON, but is none with access_token, token_extra and expires_at")
		}
		c = credential{wire.Secret(found.AccessToken), found.TokenExtra, found.ExpiresAt.UTC()}
		if extra := bytes.TrimSpace(found.TokenExtra); len(extra) > 0 && extra[0] != '{' && string(extra) != "null" {
			return credential{}, errors.New("token_extra is no object")
		}
	} else {
		c.token = wire.Secret(text)
	}
	switch token := c.token.Reveal(); {
	case token == "":
		return credential{}, errNoToken
	case strings.ContainsFunc(token, func(r rune) bool { return unicode.IsControl(r) || r == unicode.ReplacementChar }):
		return credential{}, errors.New("it holds more than one line, or control characters")
	}
	return c, nil
}

// gitLogin is a token in the form that git wants for a kind of provider.
func gitLogin(kind string, token wire.Secret) (username, password string) {
	switch kind {
	case "gitlab":
		return "oauth2", token.Reveal()
	case "bitbucket-cloud", "bitbucket-server":
		return "x-token-auth", token.Reveal()
	}
	return token.Reveal(), ""
}

// What the file says of providers. See docs/config.md.
type fileProvider struct {
	ID        string   `yaml:"id"`
	Type      string   `yaml:"type"`
	Regex     string   `yaml:"regex"`
	Token     string   `yaml:"token"`
	TokenFile string   `yaml:"token_file"`
	Command   []string `yaml:"command"`
}

// checkProviders reads what the file says of providers.
func (m *mistakes) checkProviders(files []fileProvider) []*provider {
	var providers []*provider
	ids := map[string]bool{}
	for i, f := range files {
		at := func(format string, args []any, rest ...any) {
			m.at(format, args, append([]any{"external_auth", i}, rest...)...)
		}
		switch {
		case !validName(f.ID):
			at("provider id %q: use letters and digits with single dashes between, at most %d", []any{f.ID, maxName}, "id")
		case ids[f.ID]:
			at("provider id %q is used twice", []any{f.ID}, "id")
		}
		ids[f.ID] = true
		p := &provider{id: f.ID, kind: f.Type, token: wire.Secret(f.Token), file: f.TokenFile, command: f.Command}
		if p.kind == "" {
			p.kind = f.ID
		}
		sources := 0
		for _, given := range []bool{f.Token != "", f.TokenFile != "", f.Command != nil} {
			if given {
				sources++
			}
		}
		if sources != 1 || f.Command != nil && (len(f.Command) == 0 || f.Command[0] == "") {
			at("a provider needs a token, a token_file or a command, and only one of them", nil)
		}
		expr := f.Regex
		if expr == "" {
			expr = regexes[p.kind]
		}
		var err error
		switch p.regex, err = regexp.Compile(expr); {
		case expr == "":
			at("a provider of type %q needs a regex, to say which URLs it is for", []any{p.kind})
		case err != nil:
			at("regex %q: %w", []any{expr, err}, "regex")
		}
		if f.Token != "" {
			if _, err := parseCredential([]byte(f.Token)); err != nil {
				at("cannot use the token: %w", []any{err}, "token")
			}
		}
		providers = append(providers, p)
	}
	return providers
}
