package wire

import (
	"time"

	"github.com/google/uuid"
)

// What stock clients ask for on their way to an agent. A berth server knows agents only, and shows each
// as a workspace that runs: one build, one resource, the agent and its sub-agents.

// User answers GET users/{user}.
type User struct {
	ID              uuid.UUID   `json:"id"`
	Username        string      `json:"username"`
	Name            string      `json:"name"`
	Email           string      `json:"email"`
	AvatarURL       string      `json:"avatar_url"`
	CreatedAt       time.Time   `json:"created_at"`
	UpdatedAt       time.Time   `json:"updated_at"`
	LastSeenAt      time.Time   `json:"last_seen_at"`
	Status          string      `json:"status"`
	LoginType       string      `json:"login_type"`
	OrganizationIDs []uuid.UUID `json:"organization_ids"`
	Roles           []Role      `json:"roles"`
}

// Role is what a user may do.
type Role struct {
	Name        string `json:"name"`
	DisplayName string `json:"display_name"`
}

// UserSSHKey answers GET users/{user}/gitsshkey: the half of the owner's key pair that anybody may see.
type UserSSHKey struct {
	UserID    uuid.UUID `json:"user_id"`
	PublicKey string    `json:"public_key"`
}

// Workspaces answers GET workspaces. Count is how many match, of which Workspaces may be a part.
type Workspaces struct {
	Workspaces []Workspace `json:"workspaces"`
	Count      int         `json:"count"`
}

// Workspace answers GET workspaces/{id}.
type Workspace struct {
	ID                      uuid.UUID       `json:"id"`
	CreatedAt               time.Time       `json:"created_at"`
	UpdatedAt               time.Time       `json:"updated_at"`
	OwnerID                 uuid.UUID       `json:"owner_id"`
	OwnerName               string          `json:"owner_name"`
	OrganizationID          uuid.UUID       `json:"organization_id"`
	OrganizationName        string          `json:"organization_name"`
	TemplateID              uuid.UUID       `json:"template_id"`
	TemplateName            string          `json:"template_name"`
	TemplateDisplayName     string          `json:"template_display_name"`
	TemplateActiveVersionID uuid.UUID       `json:"template_active_version_id"`
	LatestBuild             WorkspaceBuild  `json:"latest_build"`
	Outdated                bool            `json:"outdated"`
	Name                    string          `json:"name"`
	LastUsedAt              time.Time       `json:"last_used_at"`
	DeletingAt              *time.Time      `json:"deleting_at"`
	DormantAt               *time.Time      `json:"dormant_at"`
	Health                  WorkspaceHealth `json:"health"`
	AutomaticUpdates        string          `json:"automatic_updates"`
	AllowRenames            bool            `json:"allow_renames"`
	Favorite                bool            `json:"favorite"`
}

// WorkspaceHealth names the agents that are not well.
type WorkspaceHealth struct {
	Healthy       bool        `json:"healthy"`
	FailingAgents []uuid.UUID `json:"failing_agents"`
}

// WorkspaceBuild is how a workspace came to be.
type WorkspaceBuild struct {
	ID                  uuid.UUID           `json:"id"`
	CreatedAt           time.Time           `json:"created_at"`
	UpdatedAt           time.Time           `json:"updated_at"`
	WorkspaceID         uuid.UUID           `json:"workspace_id"`
	WorkspaceName       string              `json:"workspace_name"`
	WorkspaceOwnerID    uuid.UUID           `json:"workspace_owner_id"`
	WorkspaceOwnerName  string              `json:"workspace_owner_name"`
	TemplateVersionID   uuid.UUID           `json:"template_version_id"`
	TemplateVersionName string              `json:"template_version_name"`
	BuildNumber         int32               `json:"build_number"`
	Transition          string              `json:"transition"`
	InitiatorID         uuid.UUID           `json:"initiator_id"`
	InitiatorName       string              `json:"initiator_name"`
	Reason              string              `json:"reason"`
	Status              string              `json:"status"`
	Job                 Job                 `json:"job"`
	Resources           []WorkspaceResource `json:"resources"`
	Deadline            *time.Time          `json:"deadline"`
	MaxDeadline         *time.Time          `json:"max_deadline"`
	DailyCost           int32               `json:"daily_cost"`
}

// Job is the work behind a build or a template version; here there was none to do.
type Job struct {
	ID          uuid.UUID         `json:"id"`
	CreatedAt   time.Time         `json:"created_at"`
	StartedAt   time.Time         `json:"started_at"`
	CompletedAt time.Time         `json:"completed_at"`
	Status      string            `json:"status"`
	Tags        map[string]string `json:"tags"`
}

// WorkspaceResource is what a build made.
type WorkspaceResource struct {
	ID                  uuid.UUID `json:"id"`
	CreatedAt           time.Time `json:"created_at"`
	JobID               uuid.UUID `json:"job_id"`
	WorkspaceTransition string    `json:"workspace_transition"`
	Type                string    `json:"type"`
	Name                string    `json:"name"`
	Hide                bool      `json:"hide"`
	Icon                string    `json:"icon"`
	Agents              []Agent   `json:"agents"`
	DailyCost           int32     `json:"daily_cost"`
}

// TemplateVersion answers GET templateversions/{id}.
type TemplateVersion struct {
	ID             uuid.UUID `json:"id"`
	TemplateID     uuid.UUID `json:"template_id"`
	OrganizationID uuid.UUID `json:"organization_id"`
	CreatedAt      time.Time `json:"created_at"`
	UpdatedAt      time.Time `json:"updated_at"`
	Name           string    `json:"name"`
	Message        string    `json:"message"`
	Job            Job       `json:"job"`
	Readme         string    `json:"readme"`
	CreatedBy      User      `json:"created_by"`
	Archived       bool      `json:"archived"`
}

// Appearance answers GET appearance.
type Appearance struct {
	ApplicationName     string   `json:"application_name"`
	LogoURL             string   `json:"logo_url"`
	DocsURL             string   `json:"docs_url"`
	AnnouncementBanners []Banner `json:"announcement_banners"`
	SupportLinks        []string `json:"support_links"`
}

// Banner is a message that sessions begin with.
type Banner struct {
	Enabled         bool   `json:"enabled"`
	Message         string `json:"message"`
	BackgroundColor string `json:"background_color"`
}

// WorkspaceUsage is the body of POST workspaces/{id}/usage.
type WorkspaceUsage struct {
	AgentID uuid.UUID `json:"agent_id"`
	// AppName is ssh, vscode, jetbrains or reconnecting-pty.
	AppName string `json:"app_name"`
}

// AppHost answers GET applications/host. Host is empty where there are no host names for apps.
type AppHost struct {
	Host string `json:"host"`
}
