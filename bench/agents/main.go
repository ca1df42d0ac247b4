// Command agents loads one control server, a built `berth serve`, with many agents over real sockets:
// WebSocket, yamux and dRPC, without a mesh. Each agent links as berthd does, keeps its streams open and
// sends stats, metadata and log lines at a realistic pace. Then the server is killed and started again,
// and the agents come back at the pace of berthd, or of a stock agent.
//
//	go run ./bench/agents [-agents 1000] [-for 5m] [-down 2s] [-stock]
//
// It prints what the server took for each agent, how long calls took, and when the agents came back, and
// fails on any error: a refused call, a line lost or stored twice, a warning in the server's log, an
// agent that is not back in time.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"time"
)

// settings say how much load there is.
type settings struct {
	agents int
	// steady is how long the agents are watched before the server is killed, and down how long it then
	// stays away.
	steady, down time.Duration
	// within is how soon every agent must be back after the server is.
	within time.Duration
	// metadata and logs are how often an agent sends either; stats go at the pace the server asks for.
	metadata, logs time.Duration
	// stock makes the agents come back as stock ones do after hours of uptime: 10 s after the loss,
	// all of them.
	stock bool
	// berth is the program, built if empty. keep is a directory for its files, temporary if empty.
	berth, keep string
}

func main() {
	s := settings{}
	flag.IntVar(&s.agents, "agents", 1000, "how many agents")
	flag.DurationVar(&s.steady, "for", 5*time.Minute, "how long they are watched before the server is killed")
	flag.DurationVar(&s.down, "down", 2*time.Second, "how long the server stays away")
	flag.DurationVar(&s.within, "within", time.Minute, "how soon every agent must be back")
	flag.DurationVar(&s.metadata, "metadata", 3*time.Second, "how often an agent sends metadata")
	flag.DurationVar(&s.logs, "logs", 5*time.Second, "how often an agent logs, 1 to 3 lines")
	flag.BoolVar(&s.stock, "stock", false, "come back as stock agents do: without jitter")
	flag.StringVar(&s.berth, "berth", "", "a built berth (default: build this tree's)")
	flag.StringVar(&s.keep, "dir", "", "directory for the server's data and log (default: a temporary one)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, s, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench/agents:", err)
		os.Exit(1)
	}
}
