package berthd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/wire"
)

const externalAuthHelp = `berthd external-auth: use a login that the control server keeps for this workspace's owner.

  berthd external-auth access-token ID [--extra PATH] [--output text|json]

It prints the access token of the provider ID and exits with 0. Is somebody to log in first, it
prints where and exits with 1.

  --extra PATH     print what the provider said beside the token, such as authed_user.id
  --output json    print all there is, as JSON

Example:
  curl -H "Authorization: Bearer $(berthd external-auth access-token github)" https://api.github.com/user
`

// externalAuth is the verb that prints access tokens.
func (p process) externalAuth(ctx context.Context) error {
	if len(p.args) == 0 || p.args[0] == "--help" || p.args[0] == "-h" {
		fmt.Fprint(p.stdout, externalAuthHelp)
		return nil
	}
	if p.args[0] != "access-token" {
		return usagef("external-auth has no verb %q: see berthd external-auth --help", p.args[0])
	}
	var extra, output string
	fs := flag.NewFlagSet("berthd external-auth access-token", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&extra, "extra", "", "")
	fs.StringVar(&output, "output", "text", "")
	ids, err := parseMixed(fs, p.args[1:])
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(p.stdout, externalAuthHelp)
		return err
	case err != nil:
		return usagef("%w: see berthd external-auth --help", err)
	case len(ids) != 1:
		return usagef("external-auth access-token needs the id of one provider: see berthd external-auth --help")
	case output != "text" && output != "json":
		return usagef("--output %q is neither text nor json", output)
	}
	server, err := p.server(ctx)
	if err != nil {
		return err
	}
	auth, err := askOnce(ctx, server, client.ExternalAuthQuery{ID: ids[0]})
	if err != nil {
		return fmt.Errorf("cannot get the access token of %q: %w", ids[0], err)
	}
	return p.showAuth(ctx, auth, extra, output)
}

func (p process) showAuth(ctx context.Context, auth wire.ExternalAuth, extra, output string) error {
	var loggedIn error
	say := auth.AccessToken
	switch {
	case auth.URL != "":
		if err := checkPage(auth.URL); err != nil {
			return err
		}
		say, loggedIn = auth.URL, errNotLoggedIn
	case extra != "":
		var err error
		if say, err = lookUp(auth.TokenExtra, extra); err != nil {
			return err
		}
	}
	if loggedIn == nil {
		p.hide(ctx, auth.AccessToken, auth.Password, say)
	}
	if output == "json" {
		body, err := json.Marshal(auth)
		if err != nil {
			return fmt.Errorf("cannot show the login: %w", err)
		}
		say = string(body)
	}
	fmt.Fprintln(p.stdout, say)
	return loggedIn
}

// lookUp returns what is at a path of names and indexes, joined by dots: a string as it is, anything
// else as JSON.
func lookUp(data json.RawMessage, path string) (string, error) {
	missing := fmt.Errorf("the provider said nothing named %q beside the token", path)
	for name := range strings.SplitSeq(path, ".") {
		var object map[string]json.RawMessage
		var array []json.RawMessage
		if json.Unmarshal(data, &object) == nil {
			data = object[name]
		} else if i, err := strconv.Atoi(name); err == nil && json.Unmarshal(data, &array) == nil && i >= 0 && i < len(array) {
			data = array[i]
		} else {
			return "", missing
		}
	}
	if len(data) == 0 {
		return "", missing
	}
	var text string
	if json.Unmarshal(data, &text) == nil {
		return text, nil
	}
	return string(bytes.TrimSpace(data)), nil
}

// parseMixed parses flags that may stand before and after other arguments, which it returns.
func parseMixed(fs *flag.FlagSet, args []string) ([]string, error) {
	var others []string
	for {
		if err := fs.Parse(args); err != nil {
			return nil, err
		}
		if fs.NArg() == 0 {
			return others, nil
		}
		others = append(others, fs.Arg(0))
		args = fs.Args()[1:]
	}
}
