package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/berthd/berth/agent"
	"github.com/berthd/berth/containers"
	"github.com/berthd/berth/ports"
	"github.com/berthd/berth/reporter"
	"github.com/berthd/berth/usage"
)

const (
	// littleSpace is less than the spool may come to need, noSpace less than anything needs; in bytes.
	littleSpace, noSpace = reporter.DefaultLimit, 1 << 20
	// fewFiles is less than an editor's server and a few sessions open.
	fewFiles = 1024
	// nearlyAll is the share of a limit, in percent, that is worth a word.
	nearlyAll = 90
)

func local(cfg Config) []probe {
	return []probe{
		one("settings", cfg.settings),
		one("berthd", cfg.berthd),
		one("last-end", cfg.lastEnd),
		one("memory", cfg.memory),
		one("limits", limits),
		one("disk", cfg.disk),
		one("spool", cfg.spool),
		one("terminals", terminals),
		one("ports", listening),
		one("engines", cfg.engines),
	}
}

func (cfg Config) settings(context.Context) Check {
	if cfg.Settings != nil {
		return Check{Status: Fail, Cause: cfg.Settings.Error(), Fix: "run berthd doctor with the flags and variables that berthd runs with"}
	}
	return Check{Status: OK, Detail: "server " + cfg.Server.URL.Redacted()}
}

func (cfg Config) berthd(context.Context) Check {
	a := cfg.About
	switch {
	case a == nil:
		return Check{Status: Warn, Cause: "no berthd runs here with this state directory", Fix: "start it; see its log if it does not stay", Detail: cfg.StateDir}
	case a.Trouble != nil && !a.Linked:
		return Check{Status: Fail, Cause: a.Trouble.Cause, Fix: a.Trouble.Fix, Detail: "since " + a.Trouble.Since.UTC().Format("2006-01-02T15:04:05Z")}
	case !a.Reachable:
		return Check{Status: Warn, Cause: "it is still starting, or it links anew", Fix: "wait, and see its log if it stays so", Detail: fmt.Sprintf("pid %d", a.PID)}
	}
	return Check{Status: OK, Detail: strings.TrimSuffix(fmt.Sprintf("%s, pid %d, linked, %s", a.Version, a.PID, a.Path), ", ")}
}

func (cfg Config) lastEnd(context.Context) Check {
	last := agent.LastEnding(cfg.StateDir)
	if cfg.About != nil {
		last = cfg.About.Last
	}
	switch {
	case last == nil:
		return Check{Status: OK, Detail: "no berthd has ended yet with this state directory"}
	case last.Orderly && last.Fix == "":
		return Check{Status: OK, Detail: last.String()}
	}
	return Check{Status: Warn, Cause: last.String(), Fix: last.Fix}
}

// memory tells of what is short and of what it has cost.
func (cfg Config) memory(context.Context) Check {
	if cfg.About != nil && cfg.About.Kills > 0 {
		return Check{Status: Warn, Cause: fmt.Sprintf("the OOM killer ended %d processes in this workspace", cfg.About.Kills), Fix: agent.MemoryFix}
	}
	m, err := usage.Memory()
	if err != nil {
		return Check{Status: Warn, Cause: err.Error(), Fix: "see that /proc is mounted"}
	}
	detail := fmt.Sprintf("%d of %d MiB in use", m.Used>>20, m.Total>>20)
	if share(m) >= nearlyAll {
		return Check{Status: Warn, Cause: "nearly all memory is in use, and the OOM killer is next", Fix: agent.MemoryFix, Detail: detail}
	}
	return Check{Status: OK, Detail: detail}
}

func share(a usage.Amount) int64 {
	if a.Total <= 0 {
		return 0
	}
	return int64(float64(a.Used) / float64(a.Total) * 100)
}

func limits(context.Context) Check {
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return Check{Status: Warn, Cause: fmt.Sprintf("the limit of open files cannot be read: %v", err), Fix: "see what restricts this process"}
	}
	processes, limited := usage.Processes()
	detail := fmt.Sprintf("%d open files", files.Max)
	if limited {
		detail += fmt.Sprintf(", %d of %d processes", processes.Used, processes.Total)
	}
	switch {
	case files.Max < fewFiles:
		return Check{Status: Warn, Cause: fmt.Sprintf("a process may open %d files only", files.Max), Fix: "raise the limit: LimitNOFILE= in the unit, docker run --ulimit nofile=", Detail: detail}
	case limited && share(processes) >= nearlyAll:
		return Check{Status: Fail, Cause: "there is room for hardly another process", Fix: "raise the limit: TasksMax= in the unit, docker run --pids-limit; or end what runs away", Detail: detail}
	}
	return Check{Status: OK, Detail: detail}
}

// disk looks at the file systems of the state directory and of temporary files, without writing there.
func (cfg Config) disk(context.Context) Check {
	state := existing(cfg.StateDir)
	detail := ""
	worst := Check{Status: OK}
	for _, dir := range slices.Compact([]string{state, os.TempDir()}) {
		v, err := usage.Volume(dir)
		if err != nil {
			return Check{Status: Fail, Cause: err.Error(), Fix: "see whether its file system is mounted and answers"}
		}
		free := v.Total - v.Used
		detail = strings.TrimPrefix(detail+fmt.Sprintf(", %d MiB free at %s", free>>20, dir), ", ")
		switch err := syscall.Access(dir, 2); { // 2 is W_OK
		case err != nil:
			worst = Check{Status: Fail, Cause: fmt.Sprintf("nothing can be written to %s: %v", dir, err), Fix: "make it writable for berthd, or choose another --state-dir (TMPDIR for temporary files)"}
		case v.Total == 0: // a file system that has no such figures
		case free < noSpace:
			worst = Check{Status: Fail, Cause: fmt.Sprintf("the disk of %s is full", dir), Fix: "make room there, or choose another --state-dir (TMPDIR for temporary files)"}
		case free < littleSpace && worst.Status == OK:
			worst = Check{Status: Warn, Cause: fmt.Sprintf("the disk of %s is nearly full: log lines may be lost while the server is away", dir), Fix: "make room there, or choose another --state-dir"}
		}
		if worst.Status == Fail {
			break
		}
	}
	worst.Detail = detail
	return worst
}

// existing is the nearest directory above a path that is there.
func existing(dir string) string {
	for {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) || dir == filepath.Dir(dir) {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

func (cfg Config) spool(context.Context) Check {
	dir := filepath.Join(cfg.StateDir, "spool")
	var size int64
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Check{Status: OK, Detail: "nothing waits"}
	case err != nil:
		return Check{Status: Fail, Cause: fmt.Sprintf("the spool cannot be read: %v", err), Fix: "run this as the user that berthd runs as"}
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && info.Mode().IsRegular() {
			size += info.Size()
		}
	}
	if cfg.About != nil {
		size = cfg.About.Backlog
	}
	detail := fmt.Sprintf("%d KiB wait", size>>10)
	if size > reporter.DefaultLimit*nearlyAll/100 {
		return Check{Status: Warn, Cause: "the spool is full: log lines are dropped until the server takes some", Fix: "see why the server is away (server, token), or what writes so much", Detail: detail}
	}
	return Check{Status: OK, Detail: detail}
}

// terminals opens one and closes it.
func terminals(context.Context) Check {
	f, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		c := Check{Status: Fail, Cause: fmt.Sprintf("no terminal can be opened: %v", err), Fix: "mount devpts (mount -t devpts devpts /dev/pts -o newinstance,ptmxmode=0666) and see that /dev/ptmx leads to it"}
		if errors.Is(err, syscall.ENOSPC) {
			c.Fix = "close terminals, or raise kernel.pty.max (sysctl)"
		}
		return c
	}
	f.Close()
	return Check{Status: OK, Detail: "/dev/ptmx opens"}
}

func listening(ctx context.Context) Check {
	l := ports.New(ports.Config{})
	list, err := l.List(ctx)
	switch {
	case err != nil:
		return Check{Status: Fail, Cause: fmt.Sprintf("listening ports cannot be listed: %v", err), Fix: "see that /proc is mounted"}
	case l.Source() != "netlink":
		return Check{Status: Warn, Cause: "listening ports come from " + l.Source(), Fix: "let berthd use netlink's sock_diag (a seccomp profile may forbid it), or live with a slower list", Detail: fmt.Sprintf("%d ports", len(list))}
	}
	return Check{Status: OK, Detail: fmt.Sprintf("%d ports, from %s", len(list), l.Source())}
}

func (cfg Config) engines(ctx context.Context) Check {
	if cfg.NoContainers {
		return Check{Status: OK, Detail: "switched off"}
	}
	ctx, cancel := context.WithTimeout(ctx, answerLimit+answerLimit)
	defer cancel()
	l := containers.New(containers.Config{User: cfg.User, Timeout: answerLimit})
	running, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() { defer close(ended); _ = l.Run(running) }()
	list, err := l.List(ctx)
	stop()
	<-ended
	switch {
	case err != nil:
		return Check{Status: Warn, Cause: fmt.Sprintf("containers cannot be listed: %v", err), Fix: "see whether the engine answers"}
	case len(list.Warnings) > 0:
		return Check{Status: Warn, Cause: strings.Join(list.Warnings, "; "), Fix: "start the engine and let berthd's user use its socket, or set --devcontainers=false", Detail: strings.Join(list.Engines, ", ")}
	case len(list.Engines) == 0:
		return Check{Status: OK, Detail: "no engine is here"}
	}
	return Check{Status: OK, Detail: strings.Join(list.Engines, ", ")}
}
