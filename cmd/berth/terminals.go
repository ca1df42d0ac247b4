package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/mattn/go-runewidth"
	"github.com/spf13/cobra"

	"github.com/berthd/berth/wire"
)

// errNoTerminals says that an agent has no list of terminals: it is a stock one, or an older berthd.
var errNoTerminals = errors.New("the agent does not list terminals: it is no berthd, or an older one; a newer berthd does")

// terminalsAPI reads and changes the terminals of an agent, over the mesh.
type terminalsAPI struct {
	agent string
	id    uuid.UUID
	http  *http.Client
}

func newTerminalsAPI(m *mesh) *terminalsAPI {
	return &terminalsAPI{agent: m.agent.Name, id: m.agent.ID, http: &http.Client{
		Timeout: attachTimeout,
		Transport: &http.Transport{
			DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return m.dial(ctx, wire.PortHTTP) },
			DisableKeepAlives: true, // each is one question
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// do asks one question about the terminal with this id or name, or about all if key is empty.
func (a *terminalsAPI) do(ctx context.Context, method, key string, body, answer any) error {
	var sent []byte
	if body != nil {
		var err error
		if sent, err = json.Marshal(body); err != nil {
			return err
		}
	}
	target := url.URL{Scheme: "http", Host: wire.AgentAddr(a.id).String(), Path: wire.PathAgentTerminals}
	if target.Host = "[" + target.Host + "]"; key != "" {
		target.Path += "/" + key
		target.RawPath = wire.PathAgentTerminals + "/" + url.PathEscape(key)
	}
	req, err := http.NewRequestWithContext(ctx, method, target.String(), bytes.NewReader(sent))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := a.http.Do(req)
	if err != nil {
		return fmt.Errorf("agent %s does not answer: %w", a.agent, err)
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusNotFound && key == "":
		return errNoTerminals
	case resp.StatusCode == http.StatusNoContent:
		return nil
	}
	return wire.ReadJSON(resp, http.StatusOK, answer)
}

// list returns the terminals, or errNoTerminals.
func (a *terminalsAPI) list(ctx context.Context) ([]wire.Terminal, error) {
	var all wire.Terminals
	err := a.do(ctx, http.MethodGet, "", nil, &all)
	return all.Terminals, err
}

// change does what needs a terminal that is there: unlike do it tells an agent without terminals from one without this one.
func (a *terminalsAPI) change(ctx context.Context, method, key string, body any) error {
	var answer wire.Terminal
	err := a.do(ctx, method, key, body, &answer)
	var refused *wire.Error
	var other *wire.UnexpectedResponse
	missing := errors.As(err, &refused) && refused.StatusCode == http.StatusNotFound || errors.As(err, &other) && other.StatusCode == http.StatusNotFound
	if !missing {
		return err
	}
	if _, err := a.list(ctx); err != nil {
		return err
	}
	return fmt.Errorf("there is no such session; berth shell %s --list shows those there are", shellQuote(a.agent))
}

// withTerminals joins the mesh of an agent to ask about its terminals.
func (p *program) withTerminals(ctx context.Context, name string, wait time.Duration, f func(context.Context, *terminalsAPI) error) error {
	ctx, stop := untilInterrupt(ctx)
	defer stop()
	m, err := p.reach(ctx, name, wait)
	if err != nil {
		return err
	}
	defer m.Close()
	return f(ctx, newTerminalsAPI(m))
}

func (p *program) listTerminals(ctx context.Context, name string, wait time.Duration, output format) error {
	return p.withTerminals(ctx, name, wait, func(ctx context.Context, api *terminalsAPI) error {
		all, err := api.list(ctx)
		if err != nil {
			return fmt.Errorf("cannot list the sessions of %s: %w", api.agent, err)
		}
		if output == formatJSON {
			return printJSON(p.out, append([]wire.Terminal{}, all...))
		}
		return p.printTable(terminalTable(all, time.Now()), "no session is open on "+clean(api.agent)+`; "berth shell `+clean(api.agent)+`" opens one`)
	})
}

func (p *program) renameTerminal(ctx context.Context, name, session, to string, wait time.Duration) error {
	return p.withTerminals(ctx, name, wait, func(ctx context.Context, api *terminalsAPI) error {
		if err := api.change(ctx, http.MethodPatch, session, wire.TerminalChange{Name: &to}); err != nil {
			return fmt.Errorf("cannot rename session %s of %s: %w", session, api.agent, err)
		}
		fmt.Fprintf(p.errOut, "session %s of %s is called %s now\n", clean(session), clean(api.agent), clean(to))
		return nil
	})
}

func (p *program) closeTerminal(ctx context.Context, name, session string, wait time.Duration) error {
	return p.withTerminals(ctx, name, wait, func(ctx context.Context, api *terminalsAPI) error {
		if err := api.change(ctx, http.MethodDelete, session, nil); err != nil {
			return fmt.Errorf("cannot close session %s of %s: %w", session, api.agent, err)
		}
		fmt.Fprintf(p.errOut, "closed session %s of %s\n", clean(session), clean(api.agent))
		return nil
	})
}

// maxRunning is how much of a command line the table shows.
const maxRunning = 32

// terminalTable lists terminals as people want to see them: what is long comes last.
func terminalTable(all []wire.Terminal, now time.Time) *table {
	t := &table{head: []string{"SESSION", "AGE", "IDLE", "VIEWERS", "SIZE", "ENDS", "RUNNING", "TITLE"}}
	for _, s := range all {
		ends := ""
		switch {
		case s.Exited != nil && s.Exited.Signal != "":
			ends = "ended, SIG" + s.Exited.Signal
		case s.Exited != nil:
			ends = fmt.Sprintf("ended, code %d", s.Exited.Code)
		case !s.EndsAt.IsZero():
			ends = "in " + strings.TrimSuffix(ago(s.EndsAt, now), " ago")
		}
		running := cmp.Or(s.Running, s.Command)
		if s.Container != "" {
			running = s.Container + ": " + running
		}
		title := s.Title
		if !s.CutOffAt.IsZero() {
			title = strings.TrimSpace("ssh, cut off " + ago(now, s.CutOffAt) + "  " + title)
		}
		add := t.add
		if s.Exited != nil {
			add = t.addFaint
		}
		add(cmp.Or(s.Name, s.ID.String()), strings.TrimSuffix(ago(now, s.CreatedAt), " ago"), strings.TrimSuffix(ago(now, s.ActiveAt), " ago"),
			strconv.Itoa(s.Viewers), fmt.Sprintf("%dx%d", s.Cols, s.Rows), ends, runewidth.Truncate(clean(running), maxRunning, "…"), title)
	}
	return t
}

// sessionNames completes the first argument with agents and the second with sessions of that agent.
func (p *program) sessionNames(cmd *cobra.Command, args []string, toComplete string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) != 1 {
		return p.agentNames(cmd, args, toComplete)
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
	defer cancel()
	s, agent, err := p.find(ctx, args[0])
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	m, err := joinMesh(ctx, s, agent, p.log())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer m.Close()
	all, err := newTerminalsAPI(m).list(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []cobra.Completion
	for _, t := range all {
		if name := cmp.Or(t.Name, t.ID.String()); strings.HasPrefix(name, toComplete) && plain.MatchString(name) {
			names = append(names, cobra.CompletionWithDesc(name, runewidth.Truncate(clean(cmp.Or(t.Running, t.Command)), maxRunning, "…")))
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
