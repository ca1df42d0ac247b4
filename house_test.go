// Package berth_test holds the rules of the house: who may import what, that every package says what
// it is for, and that go.mod replaces nothing.
package berth_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/berthd/berth"

// mayImport lists, for each of our packages, which others of ours its code may import; "x/..." is x and
// all below it. Every package may import those below itself. wire is allowed to all.
var mayImport = map[string][]string{
	"wire":                nil,
	"wire/agentpb":        {},
	"wire/tailnetpb":      {},
	"wire/rpc":            {},
	"identity":            {},
	"identity/attest":     {},
	"mask":                {},
	"reporter":            {"mask"},
	"account":             {},
	"oom":                 {},
	"shell":               {"account"},
	"scripts":             {"mask", "shell"},
	"scripts/hold":        {"oom"},
	"containers":          {"account"},
	"ports":               {},
	"ptyhost":             {"account", "oom"},
	"ptyhost/screen":      {},
	"sshd":                {"account", "oom", "ptyhost", "shell"},
	"tailnet":             {},
	"tailnet/relay":       {},
	"speedtest":           {},
	"resume":              {},
	"usage":               {},
	"client":              {},
	"doctor":              {"account", "agent", "client", "containers", "identity", "ports", "reporter", "tailnet", "usage"},
	"agent":               {"account", "identity", "mask", "oom", "reporter", "shell", "scripts", "scripts/hold", "containers", "ports", "ptyhost", "sshd", "tailnet", "speedtest", "resume", "usage", "client"},
	"control":             {"deploy", "identity/attest", "tailnet", "tailnet/relay"},
	"control/store":       {},
	"control/coordinator": {},
	"control/openapi":     {},
	"deploy/systemd":      {},
	"internal/service":    {"deploy/systemd"},
	"deploy":              {},
	"internal/build":      {},
	"internal/release":    {"deploy/systemd"},
	"internal/golden":     {},
	"internal/testhome":   {},
	"internal/testnet":    {},
	"internal/netlab":     {},
	"internal/judge":      {},
	"internal/enginelab":  {},
	"internal/upgrade":    {"client"},
	"internal/berthd":     {"account", "agent", "doctor", "containers", "oom", "ptyhost", "scripts/hold", "sshd", "identity", "client", "tailnet", "usage", "shell", "internal/build", "internal/service", "internal/upgrade"},
	"cmd/berthd":          {"internal/berthd"},
	"cmd/berthd-ptyhost":  {"ptyhost", "scripts/hold"},
	"cmd/berth":           {"client", "tailnet", "control", "speedtest", "resume", "identity/attest", "agent", "internal/berthd", "internal/build", "internal/testnet"},
}

// owners lists who may import what is heavy, so that swapping it is one package's work.
var owners = map[string][]string{
	"tailscale.com":                          {"tailnet", "tailnet/relay"},
	"gvisor.dev/gvisor":                      {"tailnet"},
	"github.com/hashicorp/yamux":             {"wire/rpc"},
	"github.com/coder/websocket":             {"client", "control", "agent", "tailnet", "tailnet/relay"},
	"github.com/nats-io":                     {"control/store", "control/coordinator"},
	"github.com/moby/moby":                   {"containers", "internal/enginelab"},
	"github.com/creack/pty":                  {"ptyhost"},
	"github.com/gliderlabs/ssh":              {"sshd"},
	"github.com/pkg/sftp":                    {"sshd"},
	"golang.org/x/crypto/ssh":                {"sshd", "control", "cmd/berth"},
	"github.com/aws/aws-sdk-go-v2":           {"identity"},
	"cloud.google.com/go":                    {"identity"},
	"github.com/smallstep/pkcs7":             {"identity/attest"},
	"github.com/coreos/go-oidc":              {"identity/attest"},
	"github.com/modelcontextprotocol/go-sdk": {"internal/berthd"},
	"github.com/spf13/cobra":                 {"cmd/berth"},
	"go.yaml.in/yaml/v3":                     {"control"},
	"github.com/mattn/go-runewidth":          {"ptyhost/screen", "cmd/berth"},
	"github.com/clipperhouse/uax29":          {"ptyhost/screen"},
	"github.com/robfig/cron":                 {"scripts", "control"},
	"github.com/fsnotify/fsnotify":           {"control"},
}

// separate are modules of their own, with rules of their own.
var separate = []string{"internal/protogen", "internal/tools"}

// programs never imports these: tests that drive built binaries from outside.
var outside = []string{"e2e", "bench", "conformance"}

// blackBoxes know berth by what it says on the wire only: they import nothing of it, not even in tests.
var blackBoxes = []string{"e2e", "conformance"}

type source struct {
	dir, file string
	test      bool
	ast       *ast.File
}

func sources(t *testing.T) []source {
	t.Helper()
	var all []source
	fset := token.NewFileSet()
	err := filepath.WalkDir(".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if p != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || slices.Contains(separate, filepath.ToSlash(p))) {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(p, ".go") {
			return nil
		}
		f, err := parser.ParseFile(fset, p, nil, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			return err
		}
		all = append(all, source{filepath.ToSlash(filepath.Dir(p)), filepath.ToSlash(p), strings.HasSuffix(p, "_test.go"), f})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 20 {
		t.Fatalf("found only %d Go files: is this the root of the repository?", len(all))
	}
	return all
}

func within(dir, top string) bool { return dir == top || strings.HasPrefix(dir, top+"/") }

func allowed(from, to string) bool {
	if within(to, "wire") && !within(from, "wire") || within(to, from) {
		return true
	}
	if within(from, "wire") {
		return from != "wire/agentpb" && from != "wire/tailnetpb" || to == "wire/tailnetpb"
	}
	return slices.Contains(mayImport[from], to)
}

func TestImports(t *testing.T) {
	for _, s := range sources(t) {
		if s.test || slices.ContainsFunc(outside, func(top string) bool { return within(s.dir, top) }) {
			continue
		}
		if _, ok := mayImport[s.dir]; !ok {
			t.Errorf("%s: package %s stands in no room: add it to mayImport and to docs/architecture.md", s.file, s.dir)
			continue
		}
		for _, spec := range s.ast.Imports {
			p, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			if to, ok := strings.CutPrefix(p, module+"/"); ok && !allowed(s.dir, to) {
				t.Errorf("%s imports %s: %s may import %v", s.file, to, s.dir, mayImport[s.dir])
			}
			for dep, who := range owners {
				if within(p, dep) && !slices.Contains(who, s.dir) {
					t.Errorf("%s imports %s, which belongs to %v", s.file, p, who)
				}
			}
		}
	}
}

func TestBlackBoxes(t *testing.T) {
	for _, s := range sources(t) {
		if !slices.ContainsFunc(blackBoxes, func(top string) bool { return within(s.dir, top) }) {
			continue
		}
		for _, spec := range s.ast.Imports {
			if p, err := strconv.Unquote(spec.Path.Value); err != nil || within(p, module) {
				t.Errorf("%s imports %s (%v): it has to be independent of it", s.file, p, err)
			}
		}
	}
}

func TestPackageDocs(t *testing.T) {
	documented := map[string]bool{}
	for _, s := range sources(t) {
		if s.test && !slices.ContainsFunc(outside, func(top string) bool { return within(s.dir, top) }) || s.dir == "." {
			continue
		}
		documented[s.dir] = documented[s.dir] || s.ast.Doc != nil && len(s.ast.Doc.Text()) > 40
	}
	for dir, ok := range documented {
		if generated := path.Base(dir) == "agentpb" || path.Base(dir) == "tailnetpb"; !ok && !generated {
			t.Errorf("package %s does not say what it is for", dir)
		}
	}
}

func TestNoReplace(t *testing.T) {
	for _, f := range []string{"go.mod", "internal/protogen/go.mod", "internal/tools/go.mod", "internal/release/tools.mod"} {
		body, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for i, line := range strings.Split(string(body), "\n") {
			if fields := strings.Fields(line); len(fields) > 0 && fields[0] == "replace" || strings.Contains(line, "=>") {
				t.Errorf("%s:%d replaces a module: %s", f, i+1, line)
			}
		}
	}
}

// TestTerminalHostIsSmall: the process of the terminals holds nothing but them, whatever its packages come to import.
func TestTerminalHostIsSmall(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-f", "{{with .Module}}{{.Path}}{{end}}", "./cmd/berthd-ptyhost").Output()
	if err != nil {
		t.Fatal(err)
	}
	got := slices.Compact(slices.Sorted(slices.Values(strings.Fields(string(out)))))
	want := []string{"github.com/berthd/berth", "github.com/clipperhouse/uax29/v2", "github.com/creack/pty", "github.com/google/uuid", "github.com/mattn/go-runewidth", "golang.org/x/sys"}
	if !slices.Equal(got, want) {
		t.Errorf("cmd/berthd-ptyhost links %v, want %v", got, want)
	}
}
