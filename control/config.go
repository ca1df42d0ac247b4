package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/google/uuid"
	"github.com/robfig/cron/v3"
	"go.yaml.in/yaml/v3"

	"github.com/berthd/berth/control/store"
)

// configFile is the file that declares agents.
type configFile struct {
	path string
	// reading keeps two readers from applying the file at the same time.
	reading sync.Mutex
}

// maxConfig bounds the file; a thousand agents take a few hundred KiB.
const maxConfig = 16 << 20

// settle is how long after a change the file is read: editors write in several steps.
const settle = 200 * time.Millisecond

// Reload reads the configuration file and the agent programs again. What has a mistake changes nothing.
func (s *Server) Reload(ctx context.Context) error {
	return errors.Join(s.loadConfig(ctx), s.loadPrograms())
}

func (s *Server) loadConfig(ctx context.Context) error {
	if s.file == nil {
		return nil
	}
	s.file.reading.Lock()
	defer s.file.reading.Unlock()
	text, err := readFile(s.file.path, maxConfig)
	if err != nil {
		return fmt.Errorf("cannot read the configuration file: %w", err)
	}
	if len(text) == 0 { // an editor is about to write it: its agents are not to be forgotten meanwhile
		return fmt.Errorf("the configuration file %s is empty; if no agents are meant, write \"agents: []\" into it", s.file.path)
	}
	declared, err := parseConfig(text)
	if err == nil {
		err = declared.readSecrets()
	}
	var rules *identityRules
	if err == nil {
		rules, err = newIdentityRules(s.config, declared.identity)
	}
	if err != nil {
		return fmt.Errorf("cannot use the configuration file %s: %w", s.file.path, err)
	}
	if err := s.apply(ctx, declared.agents); err != nil {
		return err
	}
	s.identity.Store(rules)
	if open := rules.openProviders(declared.agents); len(open) > 0 {
		s.log.Warn("machines of any account may be let in, if they have the id of an agent; name accounts in the configuration", "providers", open)
	}
	s.banners.Store(&declared.banners)
	s.providers.Store(&declared.providers)
	return nil
}

// readFile reads a file of at most limit bytes.
func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(text)) > limit {
		err = fmt.Errorf("%s is longer than %d KiB", path, limit>>10)
	}
	return text, err
}

// apply makes the agents that the file declares, changes those it declares otherwise, and takes away
// those it no longer declares. An agent whose duties changed gets them by a new link.
func (s *Server) apply(ctx context.Context, declared []declaration) error {
	existing, err := s.store.Agents(ctx)
	if err != nil {
		return err
	}
	byName := make(map[string]store.Agent, len(existing))
	for _, a := range existing {
		if !a.IsSubAgent() { // those are named within their workspace
			byName[strings.ToLower(a.Name)] = a
		}
	}
	known := make(map[uuid.UUID]store.Agent, len(existing))
	for _, a := range existing {
		known[a.ID] = a
	}
	var agents []store.Agent
	keep := make(map[uuid.UUID]bool)
	for _, d := range declared {
		namesake, taken := byName[strings.ToLower(d.name)]
		if taken && !namesake.FromFile {
			return fmt.Errorf("cannot declare agent %q: one of that name was made by hand; delete it or choose another name", d.name)
		}
		id := d.id
		switch {
		case id == uuid.Nil && taken:
			id = namesake.ID
		case id == uuid.Nil:
			// Any server of this deployment comes to the same id.
			id = uuid.NewSHA1(s.id, []byte("agent:"+strings.ToLower(d.name)))
		}
		if other, ok := known[id]; ok && !other.FromFile {
			return fmt.Errorf("cannot declare agent %q: its id is that of %q, which was made by hand; choose another id", d.name, other.Name)
		}
		if keep[id] {
			return fmt.Errorf("cannot declare agent %q: its id %s, which follows from what it was called before, is declared for another; give it an id of its own", d.name, id)
		}
		keep[id] = true
		now := time.Now().UTC()
		agents = append(agents, store.Agent{ID: id, Name: d.name, CreatedAt: now, UpdatedAt: now, FromFile: true, Spec: d.spec(id)})
	}
	// Those that go, go first: their names may be wanted.
	for _, a := range existing {
		if a.FromFile && !keep[a.ID] {
			if err := s.store.DeleteAgent(ctx, a.ID); err != nil && !errors.Is(err, store.ErrNotFound) {
				return fmt.Errorf("cannot take away agent %q: %w", a.Name, err)
			}
			s.log.Info("took away an agent that is no longer declared", "agent", a.Name)
		}
	}
	for _, a := range agents {
		old, ok := known[a.ID]
		if ok {
			a.CreatedAt = old.CreatedAt
		}
		if ok && old.FromFile && old.Name == a.Name && reflect.DeepEqual(old.Spec, a.Spec) {
			continue
		}
		if err := s.store.PutAgent(ctx, a); err != nil {
			return fmt.Errorf("cannot declare agent %q: %w", a.Name, err)
		}
		s.links.endWhere(func(k *link) bool { return k.agent == a.ID })
		s.log.Info("declared an agent", "agent", a.Name, "id", a.ID)
	}
	return nil
}

// watchConfig reads the file again whenever it changes. The directory is watched, because editors
// and Kubernetes put a new file in its place.
func (s *Server) watchConfig(ctx context.Context) error {
	watcher, err := fsnotify.NewWatcher()
	if err == nil {
		defer watcher.Close()
		err = watcher.Add(filepath.Dir(s.file.path))
	}
	if err != nil {
		s.log.Warn("cannot watch the configuration file; reload it by SIGHUP", "err", err)
		return nil
	}
	last, _ := readFile(s.file.path, maxConfig) // what cannot be read counts as changed
	timer := time.NewTimer(settle)
	timer.Stop()
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-watcher.Events:
			if !ok {
				return nil
			}
			timer.Reset(settle)
		case err, ok := <-watcher.Errors:
			if !ok {
				return nil
			}
			s.log.Warn("watching the configuration file", "err", err)
			timer.Reset(settle)
		case <-timer.C:
			text, err := readFile(s.file.path, maxConfig)
			if err == nil && bytes.Equal(text, last) {
				continue
			}
			if err := s.loadConfig(ctx); err != nil {
				s.log.Error("the configuration stays as it was; trying again in a minute", "err", err)
				// Not only a mistake in the file can be mended: a full disk or a lost store may be, too.
				last = nil
				timer.Reset(time.Minute)
				continue
			}
			last = text
			s.log.Info("reloaded the configuration", "file", s.file.path)
		}
	}
}

// What the file holds, as it is written. See docs/config.md.
type (
	fileConfig struct {
		Agents   []fileAgent  `yaml:"agents"`
		Banners  []fileBanner `yaml:"banners"`
		Identity fileIdentity `yaml:"identity"`

		ExternalAuth []fileProvider `yaml:"external_auth"`
	}
	fileBanner struct {
		Message string `yaml:"message"`
		Color   string `yaml:"color"`
	}
	fileAgent struct {
		Name        string            `yaml:"name"`
		ID          string            `yaml:"id"`
		OS          string            `yaml:"os"`
		Arch        string            `yaml:"arch"`
		Directory   string            `yaml:"directory"`
		Environment map[string]string `yaml:"environment"`
		MOTD        string            `yaml:"motd"`
		Prebuilt    bool              `yaml:"prebuilt"`
		Instance    *fileInstance     `yaml:"instance"`
		Apps        []fileApp         `yaml:"apps"`
		Scripts     []fileScript      `yaml:"scripts"`
		Metadata    []fileMetadata    `yaml:"metadata"`

		Devcontainers   []fileDevcontainer `yaml:"devcontainers"`
		Secrets         []fileSecret       `yaml:"secrets"`
		Resources       *fileResources     `yaml:"resources"`
		MaxShare        string             `yaml:"max_share"`
		VSCodePortProxy string             `yaml:"vscode_port_proxy"`
	}
	fileDevcontainer struct {
		Name            string `yaml:"name"`
		WorkspaceFolder string `yaml:"workspace_folder"`
		ConfigPath      string `yaml:"config_path"`
	}
	fileSecret struct {
		Env       string `yaml:"env"`
		File      string `yaml:"file"`
		Value     string `yaml:"value"`
		ValueFile string `yaml:"value_file"`
	}
	fileResources struct {
		Memory  bool     `yaml:"memory"`
		Volumes []string `yaml:"volumes"`
	}
	fileInstance struct {
		Provider string `yaml:"provider"`
		ID       string `yaml:"id"`
		Account  string `yaml:"account"`
		Region   string `yaml:"region"`
	}
	fileApp struct {
		Slug        string           `yaml:"slug"`
		DisplayName string           `yaml:"display_name"`
		URL         string           `yaml:"url"`
		Command     string           `yaml:"command"`
		Icon        string           `yaml:"icon"`
		External    bool             `yaml:"external"`
		Hidden      bool             `yaml:"hidden"`
		Healthcheck *fileHealthcheck `yaml:"healthcheck"`
	}
	fileHealthcheck struct {
		URL       string        `yaml:"url"`
		Interval  time.Duration `yaml:"interval"`
		Threshold int32         `yaml:"threshold"`
	}
	fileScript struct {
		DisplayName string        `yaml:"display_name"`
		Script      string        `yaml:"script"`
		LogPath     string        `yaml:"log_path"`
		RunOnStart  bool          `yaml:"run_on_start"`
		RunOnStop   bool          `yaml:"run_on_stop"`
		BlocksLogin bool          `yaml:"blocks_login"`
		Cron        string        `yaml:"cron"`
		Timeout     time.Duration `yaml:"timeout"`
	}
	fileMetadata struct {
		Key         string        `yaml:"key"`
		DisplayName string        `yaml:"display_name"`
		Script      string        `yaml:"script"`
		Interval    time.Duration `yaml:"interval"`
		Timeout     time.Duration `yaml:"timeout"`
	}
)

// declarations are what a file says, checked.
type declarations struct {
	agents    []declaration
	banners   []fileBanner
	providers []*provider
	identity  fileIdentity
}

// declaration is an agent of the file, checked.
type declaration struct {
	name string
	id   uuid.UUID // nil: derived from the name
	file fileAgent
}

// maxSecret in bytes: all that an agent is told at once has to fit into one RPC message.
const maxSecret = 64 << 10

// readSecrets reads those secrets that stand in files of their own.
func (d declarations) readSecrets() error {
	for _, agent := range d.agents {
		for i, secret := range agent.file.Secrets {
			if secret.ValueFile == "" {
				continue
			}
			value, err := readFile(secret.ValueFile, maxSecret)
			if err != nil {
				return fmt.Errorf("cannot read a secret of agent %q: %w", agent.name, err)
			}
			agent.file.Secrets[i].Value = strings.TrimSuffix(string(value), "\n")
		}
	}
	return nil
}

// spec is what the agent is to do. Ids of its parts follow from its own and their names, so that they
// stay the same whatever else changes.
func (d declaration) spec(id uuid.UUID) store.Spec {
	derive := func(kind, name string) uuid.UUID { return uuid.NewSHA1(id, []byte(kind+":"+name)) }
	f := d.file
	spec := store.Spec{
		OS: f.OS, Arch: f.Arch, Directory: f.Directory, MOTD: f.MOTD, Prebuilt: f.Prebuilt,
		MaxShare: store.Share(f.MaxShare), VSCodePortProxy: f.VSCodePortProxy,
	}
	if len(f.Environment) > 0 {
		spec.Environment = f.Environment
	}
	if f.Instance != nil {
		spec.Instance = f.Instance.instance()
	}
	for _, app := range f.Apps {
		a := store.App{
			ID: derive("app", app.Slug), Slug: app.Slug, DisplayName: app.DisplayName, URL: app.URL, Command: app.Command,
			Icon: app.Icon, External: app.External, Hidden: app.Hidden,
		}
		if h := app.Healthcheck; h != nil {
			a.HealthURL, a.HealthInterval, a.HealthThreshold = h.URL, h.Interval, h.Threshold
		}
		spec.Apps = append(spec.Apps, a)
	}
	for _, script := range f.Scripts {
		spec.Scripts = append(spec.Scripts, store.Script{
			ID: derive("script", script.DisplayName), LogSourceID: derive("log", script.DisplayName),
			DisplayName: script.DisplayName, Script: script.Script, LogPath: script.LogPath, Cron: script.Cron,
			RunOnStart: script.RunOnStart, RunOnStop: script.RunOnStop, StartBlocksLogin: script.BlocksLogin, Timeout: script.Timeout,
		})
	}
	for _, dev := range f.Devcontainers {
		spec.Devcontainers = append(spec.Devcontainers, store.Devcontainer{
			ID: derive("devcontainer", dev.Name), LogSourceID: derive("log devcontainer", dev.Name),
			Name: dev.Name, WorkspaceFolder: dev.WorkspaceFolder, ConfigPath: dev.ConfigPath,
		})
	}
	for _, secret := range f.Secrets {
		spec.Secrets = append(spec.Secrets, store.Secret{Env: secret.Env, File: secret.File, Value: store.Sealed(secret.Value)})
	}
	if r := f.Resources; r != nil {
		spec.Resources = &store.Resources{Memory: r.Memory, Volumes: r.Volumes}
	}
	for _, m := range f.Metadata {
		spec.Metadata = append(spec.Metadata, store.Metadata{
			Key: m.Key, DisplayName: m.DisplayName, Script: m.Script, Interval: m.Interval, Timeout: m.Timeout,
		})
	}
	return spec
}

// mistakes gathers what is wrong with a file, each with its line.
type mistakes struct {
	root  *yaml.Node
	found []error
}

// at notes a mistake about the value at a path of keys and indexes.
func (m *mistakes) at(format string, args []any, path ...any) {
	m.found = append(m.found, fmt.Errorf("line %d: %w", lineOf(m.root, path), fmt.Errorf(format, args...)))
}

// lineOf finds where a value stands, or the nearest thing around it.
func lineOf(n *yaml.Node, path []any) int {
	line := 1
	if n.Kind == yaml.DocumentNode && len(n.Content) > 0 {
		n = n.Content[0]
	}
	for _, step := range path {
		var next *yaml.Node
		switch step := step.(type) {
		case int:
			if n.Kind == yaml.SequenceNode && step < len(n.Content) {
				next = n.Content[step]
			}
		case string:
			if n.Kind == yaml.MappingNode {
				for i := 0; i+1 < len(n.Content); i += 2 {
					if n.Content[i].Value == step {
						next = n.Content[i+1]
					}
				}
			}
		}
		if next == nil {
			break
		}
		n = next
		line = n.Line
	}
	return line
}

// unknownKey matches how the YAML package names the Go type that lacks a key.
var unknownKey = regexp.MustCompile(`field (\S+) not found in type \S+`)

// parseConfig reads a file. Unknown keys, keys or names given twice, and values that cannot be are
// errors with their lines; all of them are reported at once.
func parseConfig(text []byte) (declarations, error) {
	var root yaml.Node
	if err := yaml.Unmarshal(text, &root); err != nil {
		return declarations{}, plainYAML(err)
	}
	var file fileConfig
	dec := yaml.NewDecoder(bytes.NewReader(text))
	dec.KnownFields(true)
	if err := dec.Decode(&file); err != nil && !errors.Is(err, io.EOF) {
		return declarations{}, plainYAML(err)
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return declarations{}, errors.New("more than one YAML document; put all agents into one")
	}
	m := &mistakes{root: &root}
	names, ids := map[string]bool{}, map[uuid.UUID]bool{}
	declared := declarations{banners: file.Banners}
	m.checkBanners(file.Banners)
	declared.providers = m.checkProviders(file.ExternalAuth)
	declared.identity = m.checkIdentity(file.Identity)
	for i, f := range file.Agents {
		d := declaration{name: f.Name, file: f}
		switch {
		case f.Name == "":
			m.at("an agent needs a name", nil, "agents", i)
		case !validName(f.Name):
			m.at("agent name %q: use letters and digits with single dashes between, at most %d", []any{f.Name, maxName}, "agents", i, "name")
		case names[strings.ToLower(f.Name)]:
			m.at("agent name %q is used twice", []any{f.Name}, "agents", i, "name")
		}
		names[strings.ToLower(f.Name)] = true
		if f.ID != "" {
			id, err := uuid.Parse(f.ID)
			switch {
			case err != nil || id == uuid.Nil:
				m.at("agent id %q is not a UUID", []any{f.ID}, "agents", i, "id")
			case ids[id]:
				m.at("agent id %q is used twice", []any{f.ID}, "agents", i, "id")
			}
			d.id = id
			ids[id] = true
		}
		m.checkAgent(f, "agents", i)
		declared.agents = append(declared.agents, d)
	}
	return declared, errors.Join(m.found...)
}

// plainYAML words an error of the YAML package for people.
func plainYAML(err error) error {
	text := strings.ReplaceAll(err.Error(), "yaml: unmarshal errors:\n", "")
	text = strings.TrimPrefix(unknownKey.ReplaceAllString(text, "unknown key $1"), "yaml: ")
	var parts []string
	for line := range strings.SplitSeq(text, "\n") {
		parts = append(parts, strings.TrimSpace(line))
	}
	return errors.New(strings.Join(parts, "\n"))
}

var envName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// cronParser reads schedules as agents do: seconds first.
var cronParser = cron.NewParser(cron.Second | cron.Minute | cron.Hour | cron.Dom | cron.Month | cron.Dow | cron.Descriptor)

func (m *mistakes) checkAgent(f fileAgent, path ...any) {
	at := func(format string, args []any, rest ...any) {
		m.at(format, args, append(append([]any{}, path...), rest...)...)
	}
	for name := range f.Environment {
		if !envName.MatchString(name) {
			at("%q is no name of an environment variable", []any{name}, "environment", name)
		}
	}
	if in := f.Instance; in != nil {
		switch {
		case !slices.Contains(clouds, in.Provider):
			at("instance provider %q: use one of %s", []any{in.Provider, strings.Join(clouds, ", ")}, "instance", "provider")
		case in.ID == "":
			at("an instance needs an id", nil, "instance")
		}
	}
	slugs := map[string]bool{}
	for i, app := range f.Apps {
		switch {
		case !validName(app.Slug):
			at("app slug %q: use letters and digits with single dashes between, at most %d", []any{app.Slug, maxName}, "apps", i, "slug")
		case slugs[app.Slug]:
			at("app slug %q is used twice", []any{app.Slug}, "apps", i, "slug")
		}
		slugs[app.Slug] = true
		if h := app.Healthcheck; h != nil && (h.URL == "" || h.Interval < time.Second || h.Threshold < 1) {
			at("a health check needs a url, an interval of a second or more, and a threshold of 1 or more", nil, "apps", i, "healthcheck")
		}
	}
	scripts := map[string]bool{}
	for i, s := range f.Scripts {
		switch {
		case s.DisplayName == "" || s.Script == "":
			at("a script needs a display_name and a script", nil, "scripts", i)
		case scripts[s.DisplayName]:
			at("script %q is there twice", []any{s.DisplayName}, "scripts", i, "display_name")
		case !s.RunOnStart && !s.RunOnStop && s.Cron == "":
			at("script %q never runs: set run_on_start, run_on_stop or cron", []any{s.DisplayName}, "scripts", i)
		}
		scripts[s.DisplayName] = true
		if s.Timeout < 0 {
			at("a timeout cannot be negative", nil, "scripts", i, "timeout")
		}
		if s.Cron != "" {
			if _, err := cronParser.Parse(s.Cron); err != nil {
				at("cron %q: %w (six fields, seconds first)", []any{s.Cron, err}, "scripts", i, "cron")
			}
		}
	}
	keys := map[string]bool{}
	for i, d := range f.Metadata {
		switch {
		case d.Key == "" || d.Script == "":
			at("metadata needs a key and a script", nil, "metadata", i)
		case keys[d.Key]:
			at("metadata key %q is used twice", []any{d.Key}, "metadata", i, "key")
		case d.Interval < 0 || d.Timeout < 0 || d.Interval%time.Second != 0 || d.Timeout%time.Second != 0:
			at("metadata intervals and timeouts are whole seconds", nil, "metadata", i)
		}
		keys[d.Key] = true
	}
	m.checkExtras(f, at)
}

// shares are the words for who may open an app.
var shares = []string{string(store.ShareOwner), string(store.ShareOrganization), string(store.ShareAuthenticated), string(store.SharePublic)}

func (m *mistakes) checkExtras(f fileAgent, at func(string, []any, ...any)) {
	names := map[string]bool{}
	for i, d := range f.Devcontainers {
		switch {
		case d.Name == "" || d.WorkspaceFolder == "":
			at("a dev container needs a name and a workspace_folder", nil, "devcontainers", i)
		case names[d.Name]:
			at("dev container %q is there twice", []any{d.Name}, "devcontainers", i, "name")
		}
		names[d.Name] = true
	}
	for i, secret := range f.Secrets {
		switch {
		case secret.Env == "" && secret.File == "":
			at("a secret needs an env or a file, to say where it goes", nil, "secrets", i)
		case secret.Env != "" && !envName.MatchString(secret.Env):
			at("%q is no name of an environment variable", []any{secret.Env}, "secrets", i, "env")
		case (secret.Value == "") == (secret.ValueFile == ""):
			at("a secret needs either a value or a value_file", nil, "secrets", i)
		case len(secret.Value) > maxSecret:
			at("a secret has at most %d bytes", []any{maxSecret}, "secrets", i)
		}
	}
	if r := f.Resources; r != nil {
		for i, volume := range r.Volumes {
			if !strings.HasPrefix(volume, "/") {
				at("volume %q: give the absolute path of a mount point", []any{volume}, "resources", "volumes", i)
			}
		}
	}
	if f.MaxShare != "" && !slices.Contains(shares, f.MaxShare) {
		at("max_share %q: use one of %s", []any{f.MaxShare, strings.Join(shares, ", ")}, "max_share")
	}
	if f.VSCodePortProxy != "" && !strings.Contains(f.VSCodePortProxy, "{{port}}") {
		at("vscode_port_proxy %q: {{port}} must stand where the port goes", []any{f.VSCodePortProxy}, "vscode_port_proxy")
	}
}

// color is what a terminal or a page can make of a CSS colour.
var color = regexp.MustCompile(`^(#([0-9A-Fa-f]{3}|[0-9A-Fa-f]{6})|[A-Za-z]+)$`)

func (m *mistakes) checkBanners(banners []fileBanner) {
	for i, b := range banners {
		switch {
		case b.Message == "" || len(b.Message) > maxText:
			m.at("a banner needs a message of at most %d bytes", []any{maxText}, "banners", i)
		case b.Color != "" && !color.MatchString(b.Color):
			m.at("banner color %q: use #rrggbb or the name of a color", []any{b.Color}, "banners", i, "color")
		}
	}
}
