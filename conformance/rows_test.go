package conformance

import (
	"regexp"
	"strings"
)

// rows are the lines of the table: the route table of http-api.md, the methods of rpc-agent.md and
// rpc-tailnet.md, and the ports of agent-services.md.
var rows = strings.Split(strings.TrimSpace(`
GET ws /api/v2/derp-map
GET ws /api/v2/tailnet
POST /api/v2/workspaceagents/aws-instance-identity
POST /api/v2/workspaceagents/azure-instance-identity
POST /api/v2/workspaceagents/google-instance-identity
GET /api/v2/workspaceagents/connection
GET ws /api/v2/workspaceagents/me/rpc
PATCH /api/v2/workspaceagents/me/logs
POST /api/v2/workspaceagents/me/log-source
PATCH /api/v2/workspaceagents/me/app-status
GET /api/v2/workspaceagents/me/external-auth
GET /api/v2/workspaceagents/me/gitauth
GET /api/v2/workspaceagents/me/gitsshkey
GET sse /api/v2/workspaceagents/me/reinit
POST /api/v2/workspaceagents/me/experimental/chat-context/refresh
POST /api/v2/workspaceagents/me/tasks/{task}/log-snapshot
GET /api/v2/workspaceagents/{id}
GET /api/v2/workspaceagents/{id}/connection
GET ws /api/v2/workspaceagents/{id}/coordinate
GET /api/v2/workspaceagents/{id}/logs
GET /api/v2/workspaceagents/{id}/startup-logs
GET /api/v2/workspaceagents/{id}/listening-ports
GET /api/v2/workspaceagents/{id}/containers
GET ws /api/v2/workspaceagents/{id}/containers/watch
POST /api/v2/workspaceagents/{id}/containers/devcontainers/{dc}/recreate
DELETE /api/v2/workspaceagents/{id}/containers/devcontainers/{dc}
GET ws /api/v2/workspaceagents/{id}/pty
GET sse /api/v2/workspaceagents/{id}/watch-metadata
GET ws /api/v2/workspaceagents/{id}/watch-metadata-ws
GET /api/v2/buildinfo
GET /derp
GET /derp/latency-check
GET /latency-check
GET /healthz
GET /bin/coder-{os}-{arch}
GET /api/v2/init-script/{os}/{arch}
GET /api/v2/applications/host
GET /api/v2/applications/auth-redirect
POST /api/v2/applications/reconnecting-pty-signed-token
removed endpoints
what the CLI calls
Agent.GetManifest
Agent.GetServiceBanner
Agent.UpdateStats
Agent.UpdateLifecycle
Agent.BatchUpdateAppHealths
Agent.UpdateStartup
Agent.BatchUpdateMetadata
Agent.BatchCreateLogs
Agent.GetAnnouncementBanners
Agent.ScriptCompleted
Agent.GetResourcesMonitoringConfiguration
Agent.PushResourcesMonitoringUsage
Agent.ReportConnection
Agent.CreateSubAgent
Agent.DeleteSubAgent
Agent.ListSubAgents
Agent.ReportBoundaryLogs
Agent.UpdateAppStatus
Agent.PushContextState
Tailnet.Coordinate
Tailnet.StreamDERPMaps
Tailnet.PostTelemetry
Tailnet.RefreshResumeToken
Tailnet.WorkspaceUpdates
port 1: SSH
port 22: SSH
port 2: reconnecting PTY
port 3: speed test
port 4: GET /
port 4: GET /api/v0/listening-ports
port 4: GET /api/v0/netcheck
port 4: POST /api/v0/list-directory
port 4: GET /api/v0/read-file
port 4: POST /api/v0/write-file
port 4: POST /api/v0/edit-files
port 4: GET /api/v0/resolve-path, /api/v0/read-file-lines
port 4: GET /api/v0/containers
port 4: GET ws /api/v0/containers/watch
port 4: POST /api/v0/containers/devcontainers/{id}/recreate
port 4: DELETE /api/v0/containers/devcontainers/{id}
port 4: POST, GET /api/v0/processes
port 4: GET /debug/logs
port 4: GET /debug/magicsock
port 4: GET /debug/magicsock/debug-logging/{state}
port 4: GET /debug/manifest
port 4: GET /debug/prometheus
ports 5-8: reserved
any other port: forwarded to loopback
TSMP
berthd: order of a session
berthd: lifecycle
berthd: scripts and logs
berthd: stats
berthd: metadata
berthd: app health
berthd: resources
berthd: connection reports
berthd: banners
berthd: environment
berthd: reinit
berthd: redial
berthd: shutdown
berthd: relay
berthd: block options
`), "\n")

const sharedConfig = `agents:
  - name: full
    directory: ~/src
    environment:
      EDITOR: vim
    motd: /etc/motd
    apps:
      - slug: web
        display_name: Web
        url: http://localhost:8080
        healthcheck:
          url: http://localhost:8080/healthz
          interval: 10s
          threshold: 3
      - slug: assistant
    scripts:
      - display_name: Install
        script: echo installed
        run_on_start: true
        blocks_login: true
        timeout: 10m
      - display_name: Nightly
        script: ./backup
        cron: "0 30 3 * * *"
    metadata:
      - key: load
        display_name: Load
        script: cut -d' ' -f1 /proc/loadavg
        interval: 10s
        timeout: 2s
    resources:
      memory: true
      volumes: [/]
    secrets:
      - env: FROM_SECRET
        value: whispered
  - name: claimed
    prebuilt: true
banners:
  - message: Maintenance on Friday
    color: "#b45309"
  - message: And on Saturday
external_auth:
  - id: github
    token_file: HOME/github-token
  - id: gitlab
    token: gl-token
  - id: bitbucket-cloud
    token: bb-token
  - id: work
    type: azure-devops
    regex: ^https://git\.example\.com
    command: [/bin/echo, '{"access_token":"minted","expires_at":"2099-01-02T03:04:05Z","token_extra":{"scope":"all"}}']
`

// semver is a semantic version with a leading v.
var semver = regexp.MustCompile(`^v(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?$`)
