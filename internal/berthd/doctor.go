package berthd

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/berthd/berth/agent"
	"github.com/berthd/berth/doctor"
)

const doctorHelp = `berthd doctor: find out what is wrong with this workspace's berthd, and how to mend it.

It takes the flags and variables of berthd run, and --json. It changes nothing, works beside a berthd that runs
and without one, and takes 15 seconds at most. Each check is ok, warn, fail, or skip where another says why.
It exits with 0 if no check failed, else with 1.

Example:
  berthd doctor
  berthd doctor --json | jq '.checks[] | select(.status == "fail")'

`

// headersLimit is what the command that prints headers gets here: less than all checks together.
const headersLimit = 5 * time.Second

// errUnwell tells that a check failed.
const errUnwell = exitStatus(ExitFailure)

// doctor is the verb that makes the checks.
func (p process) doctor(ctx context.Context) error {
	args := slices.DeleteFunc(slices.Clone(p.args), func(arg string) bool { return arg == "--json" || arg == "-json" })
	s, err := parseSettings(args, p.env, false)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(p.stdout, doctorHelp)
		printOptions(p.stdout)
		return err
	}
	if err != nil {
		return err
	}
	report := doctor.Run(ctx, p.patient(ctx, s))
	if len(args) < len(p.args) {
		enc := json.NewEncoder(p.stdout)
		enc.SetIndent("", "  ")
		err = enc.Encode(report)
	} else {
		err = report.Print(p.stdout)
	}
	if err != nil {
		return fmt.Errorf("cannot show what was found: %w", err)
	}
	if report.Failed() {
		return errUnwell
	}
	return nil
}

// patient is what the doctor looks at: what run would have run with, as far as it goes.
func (p process) patient(ctx context.Context, s *settings) doctor.Config {
	cfg := doctor.Config{StateDir: s.dirs.state, RelayOnly: s.services.relayOnly, NoContainers: !s.services.devcontainers}
	if cfg.User, cfg.Settings = s.findUser(); cfg.Settings != nil {
		return cfg
	}
	if socket, err := agent.SocketPath(agent.OwnDir(s.dirs.state, cfg.User), agent.LocalSocket); err == nil {
		if about, err := agent.AskAbout(ctx, socket); err == nil {
			cfg.About = &about
			if s.server.url == "" {
				s.server.url = about.Server
			}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, headersLimit)
	defer cancel()
	server, err := s.reach(ctx)
	if err != nil {
		cfg.Settings = err
		return cfg
	}
	cfg.Server = server
	exchange := exchanger(server)
	// A key is made at the first exchange, and a server takes the first that it sees: that is for run to do.
	if key := filepath.Join(s.dirs.state, proofKeyFile); exists(key) {
		exchange.ProofKey = key
	} else {
		cfg.NoToken = "this machine has not traded its identity yet, which berthd run does first"
	}
	cfg.Identity, err = s.identity.source(exchange, slog.New(slog.DiscardHandler), func(agent.Event) {})
	if cfg.Identity != nil && !cfg.Identity.Renews() {
		cfg.NoToken = ""
	}
	if err != nil && cfg.About == nil {
		cfg.Settings = err
	}
	return cfg
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// patient is what a berthd that starts looks at itself with. Its token is the link's matter.
func (s *settings) patient(cfg agent.Config) doctor.Config {
	return doctor.Config{
		Server: cfg.Server, Identity: cfg.Identity, NoToken: "the link tries it", StateDir: s.dirs.state, User: cfg.User,
		RelayOnly: s.services.relayOnly, NoContainers: !s.services.devcontainers,
	}
}

// examination makes the checks beside a berthd that starts: those that cost nothing at once, the others once it is in
// trouble, or slow. What they find goes to the log, and to the status where it says more than the trouble itself.
type examination struct {
	cfg  doctor.Config
	log  *slog.Logger
	tell func(agent.Event)

	trouble chan agent.Event // the first, or that it is linked
}

// slowStart is after how long without a link the network is looked at. A start takes a fifth of a second.
const slowStart = 10 * time.Second

func newExamination(cfg doctor.Config, log *slog.Logger, tell func(agent.Event)) *examination {
	return &examination{cfg: cfg, log: log, tell: tell, trouble: make(chan agent.Event, 1)}
}

// start makes the checks beside all else, until ctx is done or what it returns is called, which waits for their end.
func (x *examination) start(ctx context.Context) (end func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { defer close(done); x.run(ctx) }()
	return func() { cancel(); <-done }
}

// hear is an agent's Event callback. Nobody listens before there is an examination.
func (x *examination) hear(e agent.Event) {
	if x == nil {
		return
	}
	if e.Step == agent.StepTrouble || e.Step == agent.StepLinked {
		select {
		case x.trouble <- e:
		default: // only the first counts
		}
	}
}

// run makes the checks, until ctx is done.
func (x *examination) run(ctx context.Context) {
	said := map[string]bool{}
	x.say(doctor.Boot(ctx, x.cfg), said)
	slow := time.NewTimer(slowStart)
	defer slow.Stop()
	var first agent.Event
	select {
	case <-ctx.Done():
		return
	case first = <-x.trouble:
		if first.Step == agent.StepLinked {
			return
		}
	case <-slow.C:
	}
	said[first.Cause] = true
	found := doctor.Remote(ctx, x.cfg)
	if ctx.Err() != nil {
		return
	}
	if bad := x.say(found, said); len(bad) > 0 && bad[0].Status == doctor.Fail {
		x.tell(agent.Event{Step: agent.StepTrouble, Cause: bad[0].Cause, Fix: bad[0].Fix})
	}
}

// say logs what is wrong, unless that was said. It returns what it logged.
func (x *examination) say(r doctor.Report, said map[string]bool) (news []doctor.Check) {
	for _, c := range r.Bad() {
		if !said[c.Cause] {
			said[c.Cause] = true
			news = append(news, c)
			x.log.Warn(c.Cause, "check", c.Name, "fix", c.Fix)
		}
	}
	return news
}
