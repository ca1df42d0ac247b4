package berthd

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/wire"
)

const gitAskpassHelp = `berthd git-askpass: answer git's question for a user name or password.

  berthd git-askpass "Username for 'https://git.example.com': "

Sessions have it as GIT_ASKPASS: git calls berthd with the question alone. The answer is what the
control server has for that host. Is somebody to log in first, berthd says where and waits: 10 minutes
at a terminal, 2 without one. Where the server has nothing for the host it fails, and git asks by itself.
`

// How long somebody may take to log in. Without a terminal it may be that nobody sees the message.
const (
	patience      = 10 * time.Minute
	patienceAlone = 2 * time.Minute
)

// Pace of asking again for a login; the server holds each question while it can.
const (
	firstPause = 250 * time.Millisecond
	lastPause  = 10 * time.Second
)

// errNotLoggedIn tells that a person has to do something first, which has been said.
var errNotLoggedIn = exitStatus(ExitFailure)

// isGitPrompt tells whether args are those of an askpass program that git calls.
func isGitPrompt(args []string) bool {
	return len(args) == 1 && (strings.HasPrefix(args[0], "Username ") || strings.HasPrefix(args[0], "Password "))
}

// gitAskpass is the verb that answers git's questions.
func (p process) gitAskpass(ctx context.Context) error {
	switch {
	case len(p.args) == 1 && (p.args[0] == "--help" || p.args[0] == "-h"):
		fmt.Fprint(p.stdout, gitAskpassHelp)
		return nil
	case !isGitPrompt(p.args):
		return usagef("git-askpass needs git's question: see berthd git-askpass --help")
	}
	asked, err := parsePrompt(p.args[0])
	if err != nil {
		return err
	}
	match := asked.Scheme + "://" + asked.Host
	server, err := p.server(ctx)
	if err != nil {
		return err
	}
	auth, err := askOnce(ctx, server, client.ExternalAuthQuery{Match: match})
	var answer *wire.Error
	switch {
	case errors.As(err, &answer) && answer.StatusCode == http.StatusNotFound:
		return fmt.Errorf("the control server has no login for %s", match)
	case err != nil:
		return fmt.Errorf("cannot ask the control server for a login for %s: %w", match, err)
	case auth.URL != "":
		limit := patienceAlone
		if atTerminal() {
			limit = patience
		}
		if auth, err = p.awaitLogin(ctx, server, match, auth.URL, limit); err != nil {
			return err
		}
	}
	p.hide(ctx, auth.AccessToken, auth.Password)
	// git takes one line, and a user name that holds a token is all some providers want.
	say := auth.Username
	if auth.Password != "" && asked.User != nil {
		say = auth.Password
	}
	fmt.Fprintln(p.stdout, say)
	return nil
}

// askOnce asks for a login; the error is in plain words, and wraps the server's answer.
func askOnce(ctx context.Context, server *client.Client, q client.ExternalAuthQuery) (wire.ExternalAuth, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	auth, err := server.ExternalAuth(ctx, q)
	if err != nil {
		return wire.ExternalAuth{}, client.Explain(err)
	}
	return auth, nil
}

// awaitLogin sends a person to a page and waits until they have logged in there, or limit has passed.
func (p process) awaitLogin(ctx context.Context, server *client.Client, match, page string, limit time.Duration) (wire.ExternalAuth, error) {
	if err := checkPage(page); err != nil {
		return wire.ExternalAuth{}, err
	}
	fmt.Fprintf(p.stderr, "berthd: to give git access to %s, log in at\n\n  %s\n\n", match, page)
	if p.env["CODER_CHAT_AGENT"] == "true" { // nobody to wait for: a program passes the message on
		return wire.ExternalAuth{}, errNotLoggedIn
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		auth, err := server.ExternalAuth(ctx, client.ExternalAuthQuery{Match: match, Listen: true})
		if err == nil && auth.URL == "" {
			return auth, nil
		}
		var answer *wire.Error
		if errors.As(err, &answer) && answer.StatusCode < http.StatusInternalServerError {
			return wire.ExternalAuth{}, client.Explain(err) // it will not be otherwise the next time
		}
		select {
		case <-ctx.Done():
			return wire.ExternalAuth{}, fmt.Errorf("nobody logged in within %v: log in at the page above, and try again", limit)
		case <-time.After(pause):
		}
	}
}

// parsePrompt returns the URL that git asks a user name or password for.
func parsePrompt(prompt string) (*url.URL, error) {
	_, rest, ok := strings.Cut(prompt, " for '")
	text, _, closed := strings.Cut(rest, "'")
	u, err := url.Parse(text)
	if !ok || !closed || err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" {
		return nil, errors.New("cannot answer git: its question is for no web address")
	}
	return u, nil
}

// checkPage refuses what is no link to a web page, as it is shown in a terminal and clicked on.
func checkPage(page string) error {
	u, err := url.Parse(page)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || wire.Line(page) != page {
		return errors.New("the control server named a page for the login that is no web address")
	}
	return nil
}

// atTerminal tells whether a person sits in front of this process.
func atTerminal() bool {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	return tty.Close() == nil
}
