package containers

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/berthd/berth/account"
)

// engine is a container engine that may be there.
type engine struct {
	name       string // what people call it
	host       string // as in DOCKER_HOST
	tlsFromEnv bool   // DOCKER_TLS_VERIFY and DOCKER_CERT_PATH apply
	user       *account.User
}

// surroundings is what tells where engines are.
type surroundings struct {
	getenv func(string) string
	home   string
	uid    int
	run    []string // where the system keeps sockets
}

// machine returns those of user, or of this process.
func machine(user *account.User) surroundings {
	s := surroundings{getenv: os.Getenv, uid: os.Getuid(), run: []string{"/run", "/var/run"}}
	if user == nil {
		s.home, _ = os.UserHomeDir()
		return s
	}
	s.home, s.uid = user.Home, int(user.UID)
	s.getenv = func(name string) string {
		if name == "XDG_RUNTIME_DIR" { // where this process's own user has theirs
			return ""
		}
		return os.Getenv(name)
	}
	return s
}

// enginesOf returns what finds the engines that user can see. They are asked as that user, too.
func enginesOf(user *account.User) func() ([]engine, []string) {
	s := machine(user)
	return func() (found []engine, warnings []string) {
		err := user.Do(func() error {
			found, warnings = s.engines()
			return nil
		})
		if err != nil {
			return nil, []string{fmt.Sprintf("cannot list containers: %v", err)}
		}
		for i := range found {
			found[i].user = user
		}
		return found, warnings
	}
}

// engines returns every engine whose socket exists, and those that the environment names whether they exist or not. Each socket comes once, under
// the first name that leads to it. Sockets that cannot even be looked at are left out: that the folder exists does not mean that an engine does.
func (s surroundings) engines() (found []engine, warnings []string) {
	var sockets []os.FileInfo
	add := func(e engine, named bool) {
		path, ok := strings.CutPrefix(e.host, "unix://")
		if !ok {
			found = append(found, e)
			return
		}
		info, err := os.Stat(path)
		switch {
		case err != nil && !named, err == nil && info.Mode()&os.ModeSocket == 0:
			return
		case err == nil:
			if slices.ContainsFunc(sockets, func(other os.FileInfo) bool { return os.SameFile(info, other) }) {
				return
			}
			sockets = append(sockets, info)
		}
		found = append(found, e)
	}

	for _, v := range []struct{ variable, name string }{{"DOCKER_HOST", "docker"}, {"CONTAINER_HOST", "podman"}} {
		switch host := s.getenv(v.variable); {
		case host == "":
		case strings.HasPrefix(host, "unix://"), strings.HasPrefix(host, "tcp://"):
			add(engine{name: v.name, host: host, tlsFromEnv: v.variable == "DOCKER_HOST" && strings.HasPrefix(host, "tcp://")}, true)
		default:
			warnings = append(warnings, fmt.Sprintf("cannot list the containers of the engine in %s: only unix:// and tcp:// are understood", v.variable))
		}
	}

	own := s.getenv("XDG_RUNTIME_DIR")
	if own == "" {
		own = filepath.Join(s.run[0], "user", strconv.Itoa(s.uid))
	}
	// Podman first: where docker.sock is a link to its socket, it goes by its own name.
	for _, run := range s.run {
		add(engine{name: "podman (root)", host: "unix://" + filepath.Join(run, "podman/podman.sock")}, false)
	}
	add(engine{name: "podman (user)", host: "unix://" + filepath.Join(own, "podman/podman.sock")}, false)
	for _, run := range s.run {
		add(engine{name: "docker", host: "unix://" + filepath.Join(run, "docker.sock")}, false)
	}
	add(engine{name: "docker (rootless)", host: "unix://" + filepath.Join(own, "docker.sock")}, false)
	if s.uid == 0 {
		for _, e := range s.ofUsers() {
			add(e, false)
		}
	}
	for _, desktop := range []string{".docker/desktop/docker.sock", ".docker/run/docker.sock"} {
		add(engine{name: "docker (desktop)", host: "unix://" + filepath.Join(s.home, desktop)}, false)
	}
	for _, e := range s.contexts() {
		add(e, false)
	}
	return found, warnings
}

// maxUsers bounds how many users' engines of one kind are followed: each takes two connections.
const maxUsers = 32

// ofUsers returns the rootless engines of this machine's users, which root may use, by the names of those who own their sockets.
func (s surroundings) ofUsers() []engine {
	var found []engine
	for _, kind := range []struct{ name, socket string }{{"podman", "podman/podman.sock"}, {"docker", "docker.sock"}} {
		sockets, _ := filepath.Glob(filepath.Join(s.run[0], "user/*", kind.socket)) // the pattern is well-formed; what it finds is in order
		for _, socket := range sockets[:min(len(sockets), maxUsers)] {
			info, err := os.Stat(socket)
			if err != nil {
				continue // it has just gone
			}
			if is, ok := info.Sys().(*syscall.Stat_t); ok {
				found = append(found, engine{name: fmt.Sprintf("%s (%s)", kind.name, userName(is.Uid)), host: "unix://" + socket})
			}
		}
	}
	return found
}

func userName(uid uint32) string {
	id := strconv.FormatUint(uint64(uid), 10)
	if u, err := user.LookupId(id); err == nil {
		return inert(u.Username)
	}
	return "uid " + id
}

// contexts returns the engines on this machine that the docker command knows by name (`docker context ls`). Those on other machines are not beside the
// agent.
func (s surroundings) contexts() []engine {
	config := s.getenv("DOCKER_CONFIG")
	if config == "" {
		config = filepath.Join(s.home, ".docker")
	}
	files, _ := filepath.Glob(filepath.Join(config, "contexts/meta/*/meta.json")) // the pattern is well-formed
	var found []engine
	for _, file := range files {
		name, host, err := readContext(file)
		if err == nil && strings.HasPrefix(host, "unix://") {
			found = append(found, engine{name: fmt.Sprintf("docker (%s)", inert(name)), host: host})
		}
	}
	return found
}

func readContext(file string) (name, host string, err error) {
	f, err := os.Open(file)
	if err != nil {
		return "", "", err
	}
	defer f.Close()
	return parseContext(f)
}

// parseContext decodes what the docker command keeps of a context. 64 KiB are far more than one takes.
func parseContext(r io.Reader) (name, host string, err error) {
	var meta struct {
		Name      string
		Endpoints map[string]struct{ Host string }
	}
	if err := json.NewDecoder(io.LimitReader(r, 64<<10)).Decode(&meta); err != nil {
		return "", "", fmt.Errorf("cannot read a docker context: %w", err)
	}
	return meta.Name, meta.Endpoints["docker"].Host, nil
}
