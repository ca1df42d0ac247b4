package berthd

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"

	"github.com/google/jsonschema-go/jsonschema"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/berthd/berth/agent"
	"github.com/berthd/berth/wire"
)

const mcpHelp = `berthd mcp: let a coding assistant tell what it is doing, by the Model Context Protocol.

  --app SLUG       the app that it is, as the workspace's template calls it
  --socket PATH    berthd's socket ($BERTH_SOCKET, which sessions and scripts have)

It speaks MCP on standard input and output, with one tool, ` + reportTool + `. An assistant starts it as its
configuration says, for example:
  {"mcpServers": {"berth": {"command": "berthd", "args": ["mcp", "--app", "claude"]}}}
`

const (
	reportTool = "report_status"
	// maxMCPLine bounds one message of the assistant, all of which are short.
	maxMCPLine = wire.MaxJSONBody
)

const mcpInstructions = `The person who gave you work may be elsewhere and sees what you report with ` + reportTool + `.
Report when you begin a task, at each new step of it, as soon as you need them, and when you are done or cannot go on.`

const reportDescription = `Tell the person who gave you work what you are doing, and whether you need them. Of states the last one counts:
"working" while you go on by yourself, "idle" when you wait for their answer or permission, "complete" when the task
is done, "failure" when you cannot go on.`

// statusReport is what the tool takes.
type statusReport struct {
	State   string `json:"state" jsonschema:"working: you go on by yourself; idle: you need the person; complete: the task is done; failure: you cannot go on"`
	Message string `json:"message" jsonschema:"what you are doing, or what you need, in a few words; at most 160 bytes"`
	URI     string `json:"uri,omitempty" jsonschema:"a link to what this is about, such as a pull request"`
}

// mcp is the verb that serves a coding assistant.
func (p process) mcp(ctx context.Context) error {
	var app, socket string
	fs := flag.NewFlagSet("berthd mcp", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&app, "app", "", "")
	fs.StringVar(&socket, "socket", "", "")
	switch err := fs.Parse(p.args); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(p.stdout, mcpHelp)
		return err
	case err != nil:
		return usagef("%w: see berthd mcp --help", err)
	case fs.NArg() > 0:
		return usagef("%q is no flag: see berthd mcp --help", fs.Arg(0))
	case app == "":
		return usagef("--app is missing: see berthd mcp --help")
	}
	socket, err := p.socket(socket)
	if err != nil {
		return err
	}
	server, err := mcpServer(app, socket)
	if err != nil {
		return err
	}
	// It ends with its input, which is the assistant's to close.
	transport := &mcp.IOTransport{Reader: io.NopCloser(p.stdin), Writer: outputCloser{p.stdout}, MaxLineLength: maxMCPLine}
	if err := server.Run(ctx, transport); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("cannot serve the assistant: %w", err)
	}
	return nil
}

// outputCloser leaves standard output open: it is not ours to close.
type outputCloser struct{ io.Writer }

func (outputCloser) Close() error { return nil }

// mcpServer returns a server whose tool reports the status of an app to the agent that listens on socket.
func mcpServer(app, socket string) (*mcp.Server, error) {
	input, err := jsonschema.For[statusReport](nil)
	if err != nil {
		return nil, fmt.Errorf("cannot describe the tool: %w", err)
	}
	for _, state := range agent.AppStates() {
		input.Properties["state"].Enum = append(input.Properties["state"].Enum, state)
	}
	server := mcp.NewServer(&mcp.Implementation{Name: "berthd", Title: "Status in berth", Version: version},
		&mcp.ServerOptions{Instructions: mcpInstructions, Capabilities: &mcp.ServerCapabilities{}})
	harmless := false
	tool := &mcp.Tool{
		Name: reportTool, Description: reportDescription, InputSchema: input,
		Annotations: &mcp.ToolAnnotations{Title: "Report status", DestructiveHint: &harmless, OpenWorldHint: &harmless, IdempotentHint: true},
	}
	mcp.AddTool(server, tool, func(ctx context.Context, _ *mcp.CallToolRequest, in statusReport) (*mcp.CallToolResult, any, error) {
		status := wire.PatchAppStatus{AppSlug: app, State: in.State, Message: in.Message, URI: in.URI}
		if err := reportTo(ctx, socket, status); err != nil {
			return nil, nil, err // the assistant reads it as the tool's answer
		}
		return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: "Reported: " + strings.TrimSpace(in.State+" "+in.Message)}}}, nil, nil
	})
	return server, nil
}
