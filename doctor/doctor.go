// Package doctor finds out what keeps a workspace's berthd from doing its work, and says how to mend it.
//
// [Run] looks at everything; [Boot] and [Remote] are the parts of it for a berthd that starts. They change nothing, take no lock and end in time
// whatever hangs. Failures of the server's side are put into words by [client.Explain], as everywhere.
package doctor

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/berthd/berth/account"
	"github.com/berthd/berth/agent"
	"github.com/berthd/berth/identity"
	"github.com/berthd/berth/wire"
)

// Status is how a check came out.
type Status string

// The outcomes of a check.
const (
	OK   Status = "ok"
	Warn Status = "warn" // it works, but not as well as it could, or not for long
	Fail Status = "fail" // it does not work
	Skip Status = "skip" // it could not be looked at, for a reason that another check names
)

// Check is what was found of one thing.
type Check struct {
	Name   string `json:"name"`
	Status Status `json:"status"`
	// Cause says what is wrong and Fix what to do about it, for Warn and Fail; Detail what is so. They are free of secrets.
	Cause  string `json:"cause,omitempty"`
	Fix    string `json:"fix,omitempty"`
	Detail string `json:"detail,omitempty"`
}

// Report is all that was found, in the order in which it is to be read.
type Report struct {
	Checks []Check `json:"checks"`
}

// names are all the checks, in the order in which they are shown: from what is nearest to what builds on it.
var names = []string{
	"settings", "berthd", "last-end", "memory", "limits", "disk", "spool", "terminals", "ports", "engines",
	"dns", "proxy", "server", "ca", "clock", "websocket", "identity", "token", "relay", "udp", "mtu",
}

// Config says what to look at: what berthd runs with.
type Config struct {
	// Server is the control server and the way to it; without a URL the checks that need one are skipped.
	Server agent.Server
	// Identity is nil where nothing says who this machine is.
	Identity identity.Source
	// NoToken, if it is set, says why the identity is not traded for a token here.
	NoToken string
	// Settings is what is wrong with the settings; nil if nothing is.
	Settings error
	StateDir string
	// User is whom the workspace belongs to; nil is the user that this process runs as.
	User         *account.User
	RelayOnly    bool
	NoContainers bool
	// About is what the berthd says that runs here; nil if none does.
	About *agent.About
}

const (
	// total bounds a run, in which probes may wait for others.
	total = 14 * time.Second
	// answerLimit bounds what should take milliseconds over any usable network.
	answerLimit = 5 * time.Second
	// lastMoment is more than a probe needs to put into words that there is no time left.
	lastMoment = 500 * time.Millisecond
)

// probe makes some of the checks.
type probe struct {
	names []string
	run   func(context.Context) []Check
}

// Run makes all checks. It takes 14 s at most.
func Run(ctx context.Context, cfg Config) Report {
	return run(ctx, append(local(cfg), remote(cfg)...))
}

// Boot makes those of them that cost nothing and tell a berthd that starts what it does not find out by itself.
func Boot(ctx context.Context, cfg Config) Report {
	return run(ctx, []probe{one("limits", limits), one("disk", cfg.disk)})
}

// Remote makes the checks that need the network.
func Remote(ctx context.Context, cfg Config) Report { return run(ctx, remote(cfg)) }

// run runs probes side by side. What does not end in time, such as a look at a file system whose server is away, is left
// behind and said to hang.
func run(ctx context.Context, probes []probe) Report {
	ctx, cancel := context.WithTimeout(ctx, total)
	defer cancel()
	type made struct {
		of     int
		checks []Check
	}
	done := make(chan made, len(probes))
	for i, p := range probes {
		go func() { done <- made{i, p.run(ctx)} }()
	}
	// A probe that minds its context is given a moment to say what it knows.
	late := make(chan struct{})
	defer context.AfterFunc(ctx, func() { time.AfterFunc(lastMoment, func() { close(late) }) })()
	var r Report
	ended := make([]bool, len(probes))
	for range probes {
		select {
		case m := <-done:
			ended[m.of] = true
			r.Checks = append(r.Checks, m.checks...)
			continue
		case <-late:
		}
		break
	}
	for i, p := range probes {
		for _, name := range p.names {
			if !ended[i] {
				r.Checks = append(r.Checks, Check{Name: name, Status: Fail, Cause: fmt.Sprintf("no answer in %v", total), Fix: "see whether a file system or a program that it needs hangs"})
			}
		}
	}
	for i := range r.Checks {
		c := &r.Checks[i]
		c.Cause, c.Fix, c.Detail = wire.Line(c.Cause), wire.Line(c.Fix), wire.Line(c.Detail)
	}
	slices.SortStableFunc(r.Checks, func(a, b Check) int {
		return cmp.Compare(slices.Index(names, a.Name), slices.Index(names, b.Name))
	})
	return r
}

// Failed tells whether a check failed.
func (r Report) Failed() bool {
	return slices.ContainsFunc(r.Checks, func(c Check) bool { return c.Status == Fail })
}

// Bad are the checks that failed or warn, the failed first.
func (r Report) Bad() (bad []Check) {
	for _, status := range []Status{Fail, Warn} {
		for _, c := range r.Checks {
			if c.Status == status {
				bad = append(bad, c)
			}
		}
	}
	return bad
}

// Print writes a line for each check, and below it how to mend what is wrong.
func (r Report) Print(w io.Writer) error {
	var text strings.Builder
	for _, c := range r.Checks {
		said := c.Cause
		switch {
		case said == "":
			said = c.Detail
		case c.Detail != "":
			said += " (" + c.Detail + ")"
		}
		fmt.Fprintf(&text, "%-5s %-10s %s\n", c.Status, c.Name, said)
		if c.Fix != "" {
			fmt.Fprintf(&text, "%17sfix: %s\n", "", c.Fix)
		}
	}
	_, err := io.WriteString(w, text.String())
	return err
}

func ok(name, format string, args ...any) Check {
	return Check{Name: name, Status: OK, Detail: fmt.Sprintf(format, args...)}
}

func skip(name, format string, args ...any) Check {
	return Check{Name: name, Status: Skip, Detail: fmt.Sprintf(format, args...)}
}

// one makes a probe of a single check.
func one(name string, run func(context.Context) Check) probe {
	return probe{[]string{name}, func(ctx context.Context) []Check {
		c := run(ctx)
		c.Name = name
		return []Check{c}
	}}
}
