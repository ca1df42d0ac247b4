package berthd

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"

	"github.com/berthd/berth/agent"
	"github.com/berthd/berth/wire"
)

// errNoAgent tells that nobody listens where report would report to.
var errNoAgent = errors.New("no berthd answers")

const reportHelp = `berthd report: tell what an app in this workspace is doing.

  --app SLUG       the app, as the workspace's template calls it
  --state STATE    working, idle, complete or failure (default working)
  --message TEXT   what it is doing, at most 160 bytes
  --uri URI        a link to it
  --socket PATH    berthd's socket ($BERTH_SOCKET, which sessions and scripts have)

Example:
  berthd report --app claude --state working --message "reading the tests"
  curl --unix-socket "$BERTH_SOCKET" -d '{"app_slug":"claude","state":"idle","message":"done"}' http://berthd/v1/app-status
`

// report is the verb that reports an app's status through the running agent.
func (p process) report(ctx context.Context) error {
	var status wire.PatchAppStatus
	var socket string
	fs := flag.NewFlagSet("berthd report", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&status.AppSlug, "app", "", "")
	fs.StringVar(&status.State, "state", "working", "")
	fs.StringVar(&status.Message, "message", "", "")
	fs.StringVar(&status.URI, "uri", "", "")
	fs.StringVar(&socket, "socket", "", "")
	switch err := fs.Parse(p.args); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(p.stdout, reportHelp)
		return err
	case err != nil:
		return usagef("%w: see berthd report --help", err)
	case fs.NArg() > 0:
		return usagef("%q is no flag: see berthd report --help", fs.Arg(0))
	case status.AppSlug == "":
		return usagef("--app is missing: see berthd report --help")
	}
	socket, err := p.socket(socket)
	if err != nil {
		return err
	}
	return reportTo(ctx, socket, status)
}

// reportTo hands a status to the agent that listens on socket.
func reportTo(ctx context.Context, socket string, status wire.PatchAppStatus) error {
	err := agent.ReportAppStatus(ctx, socket, status)
	var refusal *wire.Error
	var dial *net.OpError
	switch {
	case errors.As(err, &refusal):
		return usagef("cannot report: %w", refusal)
	case errors.As(err, &dial) && dial.Op == "dial":
		return fmt.Errorf("%w at %s: run this inside the workspace, or give --socket", errNoAgent, socket)
	}
	return err
}

// socket returns where the agent listens: as told, as the environment says, or where an agent of
// this user would by default.
func (p process) socket(told string) (string, error) {
	if told != "" {
		return told, nil
	}
	if path := p.env[agent.EnvSocket]; path != "" {
		return path, nil
	}
	dir, err := stateDir(p.env)
	if err != nil {
		return "", err
	}
	return agent.SocketPath(dir, agent.LocalSocket)
}
