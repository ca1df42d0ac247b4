package containers

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"golang.org/x/sync/errgroup"

	"github.com/berthd/berth/wire"
)

const (
	// heartbeat is how often an engine that says nothing is asked whether it is still there: one that hangs keeps its connections open.
	heartbeat = 15 * time.Second
	// resync is how often the whole list is asked for in between, should an engine have kept an event to itself.
	resync = 5 * time.Minute
	// Waits between tries to reach an engine. Trying costs a connection to a socket of this machine.
	firstRetry, lastRetry = 100 * time.Millisecond, 5 * time.Second
	// settled is how long an engine must have been followed for the next loss to be a new one.
	settled = 10 * time.Second
	// refreshGap is the least time between two looks at what changed: a container that ends and is started again all the time costs no more.
	refreshGap = 100 * time.Millisecond
	// maxDirty is up to how many changed containers are looked at alone; beyond, the whole list is cheaper.
	maxDirty = 16
	// maxCatchUp is up to how many containers are looked at again at each heartbeat, after the engine had no time for them: their ids make a request.
	maxCatchUp = 100
	// inspections is how many containers are looked at in parallel.
	inspections = 4
)

// follower keeps the list of one engine's containers true by the engine's own events.
type follower struct {
	engine
	timeout time.Duration // for the engine's answer
	beat    time.Duration // between questions whether it is still there
	log     *slog.Logger
	changed func() // called after each change
	end     context.CancelFunc

	first  chan struct{} // closed once the engine has answered, or has been given up on, for the first time
	spoken func()        // closes first

	mu         sync.Mutex
	containers []wire.Container // by name; neither the slice nor what it holds is ever changed
	trouble    error            // why the engine cannot be asked now
	asOf       time.Time        // of containers, when there is trouble
}

// run follows the engine until ctx is done.
func (f *follower) run(ctx context.Context) {
	defer f.spoken()
	wait := firstRetry
	for ctx.Err() == nil {
		began := time.Now()
		err := f.follow(ctx)
		if ctx.Err() != nil {
			return
		}
		f.log.Debug("a container engine is not followed any more", "engine", f.name, "host", f.host, "error", err)
		if time.Since(began) > settled {
			wait = firstRetry
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
		wait = min(2*wait, lastRetry)
	}
}

// follow follows the engine until it is lost, and says how that came.
func (f *follower) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	// Each question has the timeout for itself: a slow engine with many containers takes longer over all of them, and answers nevertheless.
	var limit allowance
	begin, done := context.WithTimeout(ctx, f.timeout)
	api, err := f.connect(begin, looking, &limit)
	done()
	if err != nil {
		f.fail(err)
		return err
	}
	defer api.Close()

	// The events are on before the list is made, so that no change falls between.
	var news dirt
	news.bell = make(chan struct{}, 1)
	lost := make(chan error, 1)
	subscribed := make(chan struct{})
	go func() { lost <- f.listen(ctx, &news, subscribed) }()
	defer func() { cancel(); <-lost }()
	select {
	case <-subscribed:
	case err := <-lost:
		lost <- err
		if _, listErr := f.refresh(ctx, api, nil); listErr != nil {
			f.fail(listErr)
		}
		return err // an engine without events is asked for its list at every try
	case <-time.After(f.timeout):
		f.fail(context.DeadlineExceeded)
		return context.DeadlineExceeded
	case <-ctx.Done():
		return nil
	}
	unseen, err := f.refresh(ctx, api, nil)
	if err != nil {
		f.fail(err)
		return err
	}
	look := func(ids []string) error {
		again, err := f.refresh(ctx, api, ids)
		unseen = slices.DeleteFunc(unseen, func(id string) bool { return len(ids) == 0 || slices.Contains(ids, id) })
		unseen = append(unseen, again...)
		return err
	}

	beat := time.NewTicker(f.beat)
	defer beat.Stop()
	full := time.NewTicker(resync)
	defer full.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-lost:
			lost <- err
			return err
		case <-news.bell:
			ids, all := news.take()
			if len(ids) == 0 && !all {
				continue
			}
			err = look(ids)
		case <-full.C:
			err = look(nil)
		case <-beat.C:
			err = f.within(ctx, func(ctx context.Context) error {
				_, err := api.Ping(ctx, client.PingOptions{})
				return err
			})
			if err == nil && len(unseen) > 0 {
				err = look(slices.Clone(unseen[:min(len(unseen), maxCatchUp)]))
			}
		}
		if err != nil {
			f.fail(err)
			return err
		}
		select {
		case <-time.After(refreshGap):
		case <-ctx.Done():
		}
	}
}

func (f *follower) within(ctx context.Context, ask func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	return ask(ctx)
}

// listen notes what the engine's events tell of, until the engine ends them. It closes subscribed once they are on.
func (f *follower) listen(ctx context.Context, news *dirt, subscribed chan<- struct{}) error {
	var limit allowance
	api, err := f.connect(ctx, looking, &limit)
	if err != nil {
		return err
	}
	defer api.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream := api.Events(ctx, client.EventsListOptions{Filters: make(client.Filters).Add("type", string(events.ContainerEventType))})
	close(subscribed)
	for {
		select {
		case event := <-stream.Messages:
			limit.renew()
			if tells(event.Action) {
				news.add(event.Actor.ID)
			}
		case err := <-stream.Err:
			return cmp.Or(err, errors.New("its events ended"))
		}
	}
}

// tells reports whether an event may be about something that is shown. What engines will say tomorrow is taken to be.
func tells(a events.Action) bool {
	word, _, _ := strings.Cut(string(a), ":")
	switch events.Action(word) {
	case events.ActionExecCreate, events.ActionExecStart, events.ActionExecDie, events.ActionExecDetach, // a health check runs them all the time
		events.ActionAttach, events.ActionDetach, events.ActionResize, events.ActionTop, events.ActionCommit, events.ActionExport,
		events.ActionCopy, events.ActionArchivePath, events.ActionExtractToDir:
		return false
	}
	return true
}

// dirt is which containers have changed since one looked.
type dirt struct {
	bell chan struct{} // has a value while there are any

	mu  sync.Mutex
	ids []string
}

// add notes a change.
func (d *dirt) add(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.ids) <= maxDirty && !slices.Contains(d.ids, id) {
		d.ids = append(d.ids, id)
	}
	select {
	case d.bell <- struct{}{}:
	default:
	}
}

// take returns the containers that have changed, or that it may be any.
func (d *dirt) take() (ids []string, all bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	ids, d.ids = d.ids, nil
	if len(ids) > maxDirty {
		return nil, true
	}
	return ids, false
}

// refresh asks the engine for the containers with these ids, or for all if there are none. unseen are those that it did not tell everything of: there was
// no time, or it failed. They are shown by what is known of them.
func (f *follower) refresh(ctx context.Context, api *client.Client, ids []string) (unseen []string, err error) {
	options := client.ContainerListOptions{All: true}
	if len(ids) > 0 {
		options.Filters = make(client.Filters).Add("id", ids...)
	}
	var found client.ContainerListResult
	err = f.within(ctx, func(ctx context.Context) (err error) {
		found, err = api.ContainerList(ctx, options)
		return err
	})
	if err != nil {
		return nil, err
	}
	list := make([]wire.Container, len(found.Items))
	failed := make([]bool, len(list))
	known := f.known()
	inspecting, done := context.WithTimeout(ctx, f.timeout)
	defer done()
	var looks errgroup.Group
	looks.SetLimit(inspections)
	for i, c := range found.Items {
		list[i] = convert(c, f.name)
		// Docker's list runs a little behind its events; a look at the container itself does not.
		if len(ids) == 0 && !worthLook(list[i]) {
			continue
		}
		looks.Go(func() error {
			details, err := api.ContainerInspect(inspecting, c.ID, client.ContainerInspectOptions{})
			switch old := known[c.ID]; {
			case err == nil:
				detail(&list[i], details.Container, f.local())
			case errdefs.IsNotFound(err): // it went meanwhile, and an event says so
			default:
				failed[i] = true
				if old.Running && list[i].Running {
					list[i].PID, list[i].Health = old.PID, old.Health
				}
			}
			return nil
		})
	}
	looks.Wait() // no look returns an error
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	for i, c := range list {
		if failed[i] {
			unseen = append(unseen, c.ID)
		}
	}
	f.set(list, ids)
	return unseen, nil
}

// known returns the containers that are in force, by id.
func (f *follower) known() map[string]wire.Container {
	f.mu.Lock()
	defer f.mu.Unlock()
	byID := make(map[string]wire.Container, len(f.containers))
	for _, c := range f.containers {
		byID[c.ID] = c
	}
	return byID
}

// set puts a list in force: the whole if ids is empty, else in place of these containers.
func (f *follower) set(list []wire.Container, ids []string) {
	defer f.spoken()
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(ids) > 0 {
		for _, c := range f.containers {
			if !slices.Contains(ids, c.ID) {
				list = append(list, c)
			}
		}
	}
	slices.SortFunc(list, func(a, b wire.Container) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	f.containers, f.trouble = list, nil
	f.changed()
}

// fail notes that the engine cannot be asked. Of one that hangs the containers may well go on, and stay in the list; of one that is gone they do not.
func (f *follower) fail(err error) {
	defer f.spoken()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.trouble == nil {
		f.asOf = time.Now()
	}
	same := f.trouble != nil && f.trouble.Error() == err.Error()
	f.trouble = err
	if !errors.Is(err, context.DeadlineExceeded) {
		f.containers = nil
	}
	if !same {
		f.changed()
	}
}

// state is what is known of the engine now.
func (f *follower) state() (containers []wire.Container, warning string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.trouble == nil {
		return f.containers, ""
	}
	warning = f.explain("list the containers of", f.trouble, f.timeout)
	if len(f.containers) > 0 {
		warning += "; they are shown as they were at " + f.asOf.UTC().Format(time.TimeOnly) + " UTC"
	}
	return f.containers, warning
}

// worthLook reports whether an engine knows more of a container than its list says.
func worthLook(c wire.Container) bool {
	return c.Running || c.Status == exited || strings.HasPrefix(c.Status, exitedWithCode)
}

// detail puts in what a look at the container itself tells. local says that its process ids are this machine's.
func detail(c *wire.Container, is container.InspectResponse, local bool) {
	if is.State == nil {
		return
	}
	if name := strings.TrimPrefix(is.Name, "/"); name != "" {
		c.Name = name
	}
	c.Running = running(is.State.Status)
	c.Status = string(is.State.Status)
	if ended(is.State.Status) {
		c.Status = exitStatus(is.State.ExitCode, is.State.Error)
	}
	c.PID, c.Health, c.NetworkMode = 0, "", ""
	if c.Running {
		if local {
			c.PID = is.State.Pid
		}
		if h := is.State.Health; h != nil && h.Status != container.NoHealthcheck {
			c.Health = string(h.Status)
		}
		if is.HostConfig != nil {
			c.NetworkMode = networkMode(string(is.HostConfig.NetworkMode))
		}
	}
	if is.NetworkSettings != nil && len(is.NetworkSettings.Ports) > 0 {
		c.Ports = ports(is.NetworkSettings.Ports)
	}
}

// ports puts a look's ports into the protocol's words, in order.
func ports(m network.PortMap) []wire.ContainerPort {
	var all []wire.ContainerPort
	for port, bindings := range m {
		p := wire.ContainerPort{Port: port.Num(), Network: string(port.Proto())}
		if len(bindings) == 0 {
			all = append(all, p)
		}
		for _, b := range bindings {
			host, err := strconv.ParseUint(b.HostPort, 10, 16)
			if err == nil && host != 0 {
				p.HostPort = uint16(host)
				if b.HostIP.IsValid() {
					p.HostIP = b.HostIP.String()
				}
			}
			all = append(all, p)
		}
	}
	slices.SortFunc(all, comparePorts)
	return all
}

func comparePorts(a, b wire.ContainerPort) int {
	return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Network, b.Network), cmp.Compare(a.HostIP, b.HostIP), cmp.Compare(a.HostPort, b.HostPort))
}
