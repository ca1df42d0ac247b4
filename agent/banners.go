package agent

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
	"github.com/berthd/berth/wire/rpc"
)

const (
	// bannerInterval is how often the server is asked for its announcements.
	bannerInterval = 2 * time.Minute
	// tellTimeout bounds how long a login waits to hear of terminals that were cut off.
	tellTimeout = 3 * time.Second
	// maxMOTD bounds how much of a message of the day is shown.
	maxMOTD = 64 << 10
)

// refreshBanners keeps the announcements that a login shows up to date. While the server does not tell,
// the last ones stay.
func (a *agent) refreshBanners(ctx context.Context, api agentpb.DRPCAgentClient, version wire.Version) error {
	trouble := &trouble{log: a.log}
	tick := time.NewTicker(bannerInterval)
	defer tick.Stop()
	for {
		if banners, err := fetchBanners(ctx, api, version); err == nil {
			trouble.clear()
			a.banners.Store(&banners)
		} else if ctx.Err() == nil {
			trouble.report(fmt.Sprintf("cannot get announcements: %v", err), "")
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// fetchBanners asks for what is announced; a server that has no announcements at all has none.
func fetchBanners(ctx context.Context, api agentpb.DRPCAgentClient, version wire.Version) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if version.AtLeast(1) {
		resp, err := api.GetAnnouncementBanners(ctx, &agentpb.GetAnnouncementBannersRequest{})
		if !rpc.Unimplemented(err) {
			var banners []string
			for _, b := range resp.GetAnnouncementBanners() {
				if b.GetEnabled() {
					banners = append(banners, b.GetMessage())
				}
			}
			return banners, err
		}
	}
	b, err := api.GetServiceBanner(ctx, &agentpb.GetServiceBannerRequest{})
	switch {
	case rpc.Unimplemented(err):
		return nil, nil
	case err != nil || !b.GetEnabled():
		return nil, err
	}
	return []string{b.GetMessage()}, nil
}

// greet writes what a person sees at login: the announcements, the message of the day unless they asked
// for quiet, and how to take up what was cut off.
func (a *agent) greet(w io.Writer) {
	defer a.terminals.tellCutOff(w, a.manifest.Load().GetAgentName())
	if banners := a.banners.Load(); banners != nil {
		for _, b := range *banners {
			if b = strings.TrimSpace(b); b != "" {
				fmt.Fprintf(w, "%s\r\n\r\n", strings.ReplaceAll(b, "\n", "\r\n"))
			}
		}
	}
	var motd []byte
	err := a.shell.Do(func() (err error) {
		motd, err = a.readMOTD()
		return err
	})
	if err != nil {
		a.log.Debug("cannot show the message of the day", "error", err)
	}
	for line := range strings.Lines(string(motd)) {
		fmt.Fprintf(w, "%s\r\n", strings.TrimRight(line, "\r\n"))
	}
}

// readMOTD reads the message of the day unless the user asked for quiet.
func (a *agent) readMOTD() ([]byte, error) {
	if _, err := os.Stat(filepath.Join(a.shell.Home(), ".hushlogin")); err == nil {
		return nil, nil
	}
	path := a.shell.Expand(a.manifest.Load().GetMotdPath(), a.shell.Home())
	if path == "" {
		return nil, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxMOTD))
}

// maxTold bounds how many terminals a login tells of; the list has all of them.
const maxTold = 3

// tellCutOff writes how to take up the terminals of SSH sessions that were cut off, the last ones first.
func (t *terminalHost) tellCutOff(w io.Writer, agent string) {
	ctx, cancel := context.WithTimeout(context.Background(), tellTimeout)
	defer cancel()
	all, err := t.list(ctx)
	if err != nil {
		t.log.Debug("cannot tell of terminals that were cut off", "error", err)
		return
	}
	all = slices.DeleteFunc(all, func(s shownTerminal) bool { return s.cutOff.IsZero() || s.Exited != nil })
	slices.SortFunc(all, func(a, b shownTerminal) int { return b.cutOff.Compare(a.cutOff) })
	for _, s := range all[:min(len(all), maxTold)] {
		fmt.Fprintf(w, "A terminal that was cut off %v ago is still running; take it up again with: berth shell %s %s\r\n",
			time.Since(s.cutOff).Round(time.Second), agent, cmp.Or(s.Name, s.ID))
	}
	if more := len(all) - maxTold; more > 0 {
		fmt.Fprintf(w, "There are %d more: berth shell %s --list\r\n", more, agent)
	}
}
