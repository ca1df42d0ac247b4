//go:build deps

// Package wip keeps dependencies in go.mod while packages are being written.
package wip

import (
	_ "github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	_ "github.com/cakturk/go-netstat/netstat"
	_ "github.com/charmbracelet/x/vt"
	_ "github.com/coder/websocket"
	_ "github.com/creack/pty"
	_ "github.com/fsnotify/fsnotify"
	_ "github.com/gliderlabs/ssh"
	_ "github.com/google/go-cmp/cmp"
	_ "github.com/google/uuid"
	_ "github.com/hashicorp/yamux"
	_ "github.com/mdlayher/netlink"
	_ "github.com/moby/moby/api/types/container"
	_ "github.com/moby/moby/client"
	_ "github.com/nats-io/nats-server/v2/server"
	_ "github.com/nats-io/nats.go"
	_ "github.com/nats-io/nats.go/jetstream"
	_ "github.com/pkg/sftp"
	_ "github.com/robfig/cron/v3"
	_ "github.com/spf13/cobra"
	_ "go.uber.org/goleak"
	_ "go.yaml.in/yaml/v3"
	_ "golang.org/x/crypto/ssh"
	_ "golang.org/x/sync/errgroup"
	_ "golang.org/x/sys/unix"
	_ "golang.org/x/term"
	_ "google.golang.org/protobuf/proto"
	_ "storj.io/drpc/drpcmux"
	_ "tailscale.com/derp/derphttp"
	_ "tailscale.com/derp/derpserver"
	_ "tailscale.com/net/stunserver"
	_ "tailscale.com/wgengine"
	_ "tailscale.com/wgengine/netstack"
)
