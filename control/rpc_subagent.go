package control

import (
	"context"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/wire/agentpb"
)

// A sub-agent runs in a container of a workspace. The agent there makes it, hands it its token, and
// takes it away again; it may not be made from anywhere else, nor found by what a machine is. Its ids
// are the server's to choose, and what binds its parent binds it.
const (
	// maxSubAgents is how many sub-agents one agent may have. Each is a container on one machine.
	maxSubAgents = 256
	// maxSubAgentName is twice what stock agents make of a folder's name.
	maxSubAgentName = 128
	// maxSubAgentApps bounds the apps of one sub-agent, so that its record fits where it is kept.
	maxSubAgentApps = 100
)

// subAgentName and subAgentSlug are what the protocol lets sub-agents and their apps be called.
var (
	subAgentName = regexp.MustCompile(`^(?i)[a-z0-9](-?[a-z0-9])*$`)
	subAgentSlug = regexp.MustCompile(`^[a-z0-9](-?[a-z0-9])*$`)
)

var displayAppNames = map[agentpb.CreateSubAgentRequest_DisplayApp]string{
	agentpb.CreateSubAgentRequest_VSCODE:                 "vscode",
	agentpb.CreateSubAgentRequest_VSCODE_INSIDERS:        "vscode_insiders",
	agentpb.CreateSubAgentRequest_WEB_TERMINAL:           "web_terminal",
	agentpb.CreateSubAgentRequest_SSH_HELPER:             "ssh_helper",
	agentpb.CreateSubAgentRequest_PORT_FORWARDING_HELPER: "port_forwarding_helper",
}

func (a *agentService) CreateSubAgent(ctx context.Context, req *agentpb.CreateSubAgentRequest) (*agentpb.CreateSubAgentResponse, error) {
	parent, err := a.store.Agent(ctx, a.id)
	if err != nil {
		return nil, fmt.Errorf("cannot read the agent: %w", err)
	}
	shown, err := displayAppsOf(req)
	if err != nil {
		return nil, err
	}
	if req.Id != nil {
		return a.updateSubAgent(ctx, req, shown)
	}
	if err := checkSubAgent(parent, req); err != nil {
		return nil, err
	}
	siblings, err := a.store.SubAgents(ctx, a.id)
	if err != nil {
		return nil, fmt.Errorf("cannot read the sub-agents: %w", err)
	}
	if len(siblings) >= maxSubAgents {
		return nil, fmt.Errorf("cannot make a sub-agent: this agent has %d already", len(siblings))
	}
	now := time.Now().UTC()
	child := store.Agent{
		ID: uuid.New(), Name: req.GetName(), CreatedAt: now, UpdatedAt: now, ParentID: parent.ID,
		Spec: store.Spec{
			OS: req.GetOperatingSystem(), Arch: req.GetArchitecture(), Directory: req.GetDirectory(), DisplayApps: shown,
		},
	}
	resp := &agentpb.CreateSubAgentResponse{}
	child.Apps, resp.AppCreationErrors = subAgentApps(req)
	switch err := a.store.CreateSubAgent(ctx, child); {
	case errors.Is(err, store.ErrExists):
		return nil, nameTaken(req.GetName())
	case err != nil:
		return nil, fmt.Errorf("cannot make a sub-agent: %w", err)
	}
	a.log.Info("made a sub-agent", "agent", child.Name, "id", child.ID, "parent", parent.Name)
	resp.Agent, err = a.subAgent(ctx, child)
	return resp, err
}

// updateSubAgent takes up a sub-agent that is there already.
func (a *agentService) updateSubAgent(ctx context.Context, req *agentpb.CreateSubAgentRequest, shown []string) (*agentpb.CreateSubAgentResponse, error) {
	child, err := a.child(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	moved := req.GetDirectory() != "" && req.GetDirectory() != child.Directory
	if moved {
		child.Directory = req.GetDirectory()
	}
	if moved || !slices.Equal(child.DisplayApps, shown) {
		child.DisplayApps, child.UpdatedAt = shown, time.Now().UTC()
		if err := a.store.PutAgent(ctx, child); err != nil {
			return nil, fmt.Errorf("cannot change a sub-agent: %w", err)
		}
	}
	if moved {
		a.links.endWhere(func(k *link) bool { return k.agent == child.ID })
	}
	resp := &agentpb.CreateSubAgentResponse{}
	resp.Agent, err = a.subAgent(ctx, child)
	return resp, err
}

func (a *agentService) DeleteSubAgent(ctx context.Context, req *agentpb.DeleteSubAgentRequest) (*agentpb.DeleteSubAgentResponse, error) {
	child, err := a.child(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	if err := a.store.DeleteAgent(ctx, child.ID); err != nil && !errors.Is(err, store.ErrNotFound) {
		return nil, fmt.Errorf("cannot delete a sub-agent: %w", err)
	}
	a.log.Info("deleted a sub-agent", "agent", child.Name, "id", child.ID)
	return &agentpb.DeleteSubAgentResponse{}, nil
}

func (a *agentService) ListSubAgents(ctx context.Context, _ *agentpb.ListSubAgentsRequest) (*agentpb.ListSubAgentsResponse, error) {
	children, err := a.store.SubAgents(ctx, a.id)
	if err != nil {
		return nil, fmt.Errorf("cannot read the sub-agents: %w", err)
	}
	resp := &agentpb.ListSubAgentsResponse{}
	for _, child := range children {
		sub, err := a.subAgent(ctx, child)
		if err != nil {
			return nil, err
		}
		resp.Agents = append(resp.Agents, sub)
	}
	return resp, nil
}

// child finds a sub-agent of this agent. One that is another's is as unknown as one that is not there.
func (a *agentService) child(ctx context.Context, id []byte) (store.Agent, error) {
	childID, err := uuid.FromBytes(id)
	if err != nil {
		return store.Agent{}, fmt.Errorf("cannot read sub-agent id: %w", err)
	}
	child, err := a.store.Agent(ctx, childID)
	switch {
	case errors.Is(err, store.ErrNotFound), err == nil && child.ParentID != a.id:
		return store.Agent{}, errors.New("subagent does not belong to this parent agent")
	case err != nil:
		return store.Agent{}, fmt.Errorf("cannot read the sub-agent: %w", err)
	}
	return child, nil
}

func (a *agentService) subAgent(ctx context.Context, child store.Agent) (*agentpb.SubAgent, error) {
	held, err := a.store.HeldToken(ctx, child.ID)
	if err != nil {
		return nil, fmt.Errorf("cannot read the token of a sub-agent: %w", err)
	}
	token, err := uuid.Parse(held.Reveal())
	if err != nil {
		return nil, errors.New("cannot read the token of a sub-agent: it is no UUID")
	}
	return &agentpb.SubAgent{Name: child.Name, Id: child.ID[:], AuthToken: token[:]}, nil
}

func nameTaken(name string) error {
	return fmt.Errorf("workspace agent name %q already exists in this workspace", short(name))
}

func checkSubAgent(parent store.Agent, req *agentpb.CreateSubAgentRequest) error {
	name := req.GetName()
	switch {
	case parent.IsSubAgent():
		return errors.New("a sub-agent cannot have sub-agents")
	case name == "":
		return errors.New("agent name cannot be empty")
	case len(name) > maxSubAgentName:
		return fmt.Errorf("agent name %q is longer than %d bytes", short(name), maxSubAgentName)
	case !subAgentName.MatchString(name):
		return fmt.Errorf("agent name %q does not match %s", short(name), subAgentName)
	case strings.EqualFold(name, parent.Name):
		return nameTaken(name)
	case len(req.GetApps()) > maxSubAgentApps:
		return fmt.Errorf("%d apps are more than %d", len(req.GetApps()), maxSubAgentApps)
	}
	for field, text := range map[string]string{
		"directory": req.GetDirectory(), "architecture": req.GetArchitecture(), "operating system": req.GetOperatingSystem(),
	} {
		if len(text) > maxText {
			return fmt.Errorf("%s is longer than %d bytes", field, maxText)
		}
	}
	return nil
}

func displayAppsOf(req *agentpb.CreateSubAgentRequest) ([]string, error) {
	var names []string
	for _, app := range req.GetDisplayApps() {
		name, ok := displayAppNames[app]
		if !ok {
			return nil, fmt.Errorf("unexpected display app: %q", app)
		}
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names, nil
}

// subAgentApps makes the apps of a request. One that cannot be is reported and left out.
func subAgentApps(req *agentpb.CreateSubAgentRequest) ([]store.App, []*agentpb.CreateSubAgentResponse_AppCreationError) {
	var apps []store.App
	var failed []*agentpb.CreateSubAgentResponse_AppCreationError
	taken := make(map[string]bool)
	for i, in := range req.GetApps() {
		app, field, err := subAgentApp(in)
		if err == nil && taken[in.GetSlug()] {
			field, err = "slug", fmt.Errorf("app slug %q is already in use", short(in.GetSlug()))
		}
		if err != nil {
			failed = append(failed, &agentpb.CreateSubAgentResponse_AppCreationError{Index: int32(i), Field: &field, Error: err.Error()})
			continue
		}
		taken[in.GetSlug()] = true
		app.Slug = storedSlug(req.GetName(), in.GetSlug())
		apps = append(apps, app)
	}
	return apps, failed
}

// storedSlug keeps apart the apps of one workspace's agents.
func storedSlug(agent, slug string) string {
	sum := sha256.Sum256([]byte(agent + "/" + slug))
	return strings.ToLower(base32.HexEncoding.EncodeToString(sum[:]))[:8] + "-" + slug
}

var openIns = map[agentpb.CreateSubAgentRequest_App_OpenIn]string{
	agentpb.CreateSubAgentRequest_App_SLIM_WINDOW: openInSlimWindow,
	agentpb.CreateSubAgentRequest_App_TAB:         openInTab,
}

var shareLevels = map[agentpb.CreateSubAgentRequest_App_SharingLevel]store.Share{
	agentpb.CreateSubAgentRequest_App_OWNER:         store.ShareOwner,
	agentpb.CreateSubAgentRequest_App_AUTHENTICATED: store.ShareAuthenticated,
	agentpb.CreateSubAgentRequest_App_PUBLIC:        store.SharePublic,
	agentpb.CreateSubAgentRequest_App_ORGANIZATION:  store.ShareOrganization,
}

// subAgentApp checks one app. The error is about the field.
func subAgentApp(in *agentpb.CreateSubAgentRequest_App) (app store.App, field string, err error) {
	share, knownShare := shareLevels[in.GetShare()]
	openIn, knownOpenIn := openIns[in.GetOpenIn()]
	check := in.GetHealthcheck()
	switch {
	case in.GetSlug() == "":
		return app, "slug", errors.New("must not be empty")
	case len(in.GetSlug()) > maxText || !subAgentSlug.MatchString(in.GetSlug()):
		return app, "slug", fmt.Errorf("%q does not match %s", short(in.GetSlug()), subAgentSlug)
	case !knownShare:
		return app, "share", fmt.Errorf("%q is not a valid app sharing level", in.GetShare())
	case !knownOpenIn:
		return app, "open_in", fmt.Errorf("%q is not an open_in value", in.GetOpenIn())
	case check.GetInterval() < 0 || check.GetThreshold() < 0:
		return app, "healthcheck", errors.New("interval and threshold cannot be negative")
	case in.GetExternal() && in.GetUrl() != "" && statusURI(in.GetUrl()) == "":
		return app, "url", errors.New("is no link that can be shown")
	}
	for _, f := range []struct{ name, text string }{
		{"command", in.GetCommand()}, {"display_name", in.GetDisplayName()}, {"group", in.GetGroup()},
		{"icon", in.GetIcon()}, {"url", in.GetUrl()}, {"healthcheck", check.GetUrl()},
	} {
		if len(f.text) > maxText {
			return app, f.name, fmt.Errorf("is longer than %d bytes", maxText)
		}
	}
	return store.App{
		ID: uuid.New(), DisplayName: in.GetDisplayName(), URL: in.GetUrl(), Command: in.GetCommand(), Icon: in.GetIcon(),
		External: in.GetExternal(), Hidden: in.GetHidden(), Group: in.GetGroup(), Order: in.GetOrder(),
		Subdomain: in.GetSubdomain(), Share: share, OpenIn: openIn,
		HealthURL: check.GetUrl(), HealthInterval: time.Duration(check.GetInterval()) * time.Second, HealthThreshold: check.GetThreshold(),
	}, "", nil
}
