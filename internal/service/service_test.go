package service

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/berthd/berth/deploy/systemd"
)

const token = "0d1e2f3a-planted-secret"

// system is the service of a system that does not run, in a folder of the test's. Its systemctl is this machine's.
func system(t *testing.T) (*Service, string) {
	t.Helper()
	root := t.TempDir()
	s, err := System(t.Context(), root)
	if err != nil {
		t.Fatalf("%v (install systemd)", err)
	}
	return s, root
}

// build puts a berthd into a directory, as far as installing goes.
func build(t *testing.T, dir, content string) string {
	t.Helper()
	write(t, filepath.Join(dir, "berthd-ptyhost"), "host "+content)
	return write(t, filepath.Join(dir, "berthd"), content)
}

func write(t *testing.T, path, content string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// tree is what a folder holds: the modes and contents of files.
func tree(t *testing.T, root string) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		text, err := os.ReadFile(path)
		found[strings.TrimPrefix(path, root)] = info.Mode().String() + " " + string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func shown(p *Plan) string {
	var b bytes.Buffer
	p.Show(&b)
	return b.String()
}

func install(t *testing.T, s *Service, r Request) string {
	t.Helper()
	plan, err := s.Install(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	if err := plan.Do(t.Context()); err != nil {
		t.Fatal(err)
	}
	return shown(plan)
}

func TestInstallAndUninstall(t *testing.T) {
	s, root := system(t)
	program := build(t, t.TempDir(), "one")
	request := func() Request {
		return Request{Program: program, Settings: Settings{"BERTH_URL": "https://berth.example.com", "BERTH_HEADER": "X-Key=" + token}, Token: token}
	}
	if said := install(t, s, request()); strings.Contains(said, token) {
		t.Errorf("the plan shows a secret:\n%s", said)
	}
	want := map[string]string{
		"/usr/local/bin/berthd":              "-rwxr-xr-x one",
		"/usr/local/bin/berthd-ptyhost":      "-rwxr-xr-x host one",
		"/etc/berthd/agent-token":            "-rw------- " + token + "\n",
		"/etc/berthd/berthd.env":             "-rw------- BERTH_HEADER=X-Key=" + token + "\nBERTH_TOKEN_FILE=/etc/berthd/agent-token\nBERTH_URL=https://berth.example.com\n",
		"/etc/systemd/system/berthd.service": "-rw-r--r-- " + systemd.Unit,
	}
	got := tree(t, root)
	delete(got, "/etc/berthd/installed")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if !s.is(t.Context(), "enabled") {
		t.Error("the unit is not enabled")
	}

	if plan, err := s.Install(t.Context(), request()); err != nil || !plan.Empty() {
		t.Errorf("a second time: %v\n%s", err, shown(plan))
	}
	// What a person wrote into the settings stays; a new program and a changed setting are all that is done.
	env := filepath.Join(root, "etc/berthd/berthd.env")
	text, err := os.ReadFile(env)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(env, append([]byte("# mine\nBERTH_LOG_LEVEL=debug\n"), text...), 0o600); err != nil {
		t.Fatal(err)
	}
	build(t, filepath.Dir(program), "two")
	again := request()
	again.Settings["BERTH_URL"] = "https://other.example.com"
	said := install(t, s, again)
	if strings.Count(said, "\n") != 5 || !strings.Contains(said, "-BERTH_URL=https://berth.example.com") || !strings.Contains(said, "+BERTH_URL=https://other.example.com") {
		t.Errorf("the change is\n%s", said)
	}
	got = tree(t, root)
	if !strings.HasPrefix(got["/etc/berthd/berthd.env"], "-rw------- # mine\nBERTH_LOG_LEVEL=debug\n") || got["/usr/local/bin/berthd"] != "-rwxr-xr-x two" {
		t.Errorf("it became %q", got)
	}

	write(t, filepath.Join(root, "var/lib/berthd/kept"), "")
	for _, purge := range []bool{false, true} {
		plan, err := s.Uninstall(t.Context(), purge)
		if err != nil {
			t.Fatal(err)
		}
		if err := plan.Do(t.Context()); err != nil {
			t.Fatal(err)
		}
		want := map[string]string{"/var/lib/berthd/kept": "-rwxr-xr-x "}
		if purge {
			want = map[string]string{}
		}
		if diff := cmp.Diff(want, tree(t, root)); diff != "" {
			t.Errorf("purge %v: %s", purge, diff)
		}
	}
	if plan, err := s.Uninstall(t.Context(), true); err != nil || !plan.Empty() {
		t.Errorf("a second time: %v\n%s", err, shown(plan))
	}
}

// TestPackaged: what a package brought is the package's.
func TestPackaged(t *testing.T) {
	s, root := system(t)
	unit := write(t, filepath.Join(root, "usr/lib/systemd/system/berthd.service"), "[Service]\nExecStart=/usr/bin/berthd run\n[Install]\nWantedBy=multi-user.target\n")
	if _, err := s.Install(t.Context(), Request{Program: build(t, t.TempDir(), "one"), Settings: Settings{}}); err == nil || !strings.Contains(err.Error(), unit) {
		t.Errorf("another program: %v", err)
	}
	program := build(t, filepath.Join(root, "usr/bin"), "packaged")
	install(t, s, Request{Program: program, Settings: Settings{"BERTH_URL": "https://berth.example.com"}})
	got := tree(t, root)
	if got["/etc/systemd/system/berthd.service"] != "" || got["/usr/local/bin/berthd"] != "" || got["/etc/berthd/berthd.env"] == "" {
		t.Errorf("it became %q", got)
	}
	// Without its unit, ours starts the package's program.
	if err := os.Remove(unit); err != nil {
		t.Fatal(err)
	}
	install(t, s, Request{Program: program, Settings: Settings{}})
	if got := tree(t, root)["/etc/systemd/system/berthd.service"]; !strings.Contains(got, "\nExecStart=/usr/bin/berthd run\n") {
		t.Errorf("the unit is %s", got)
	}
}

func TestSealedNeedsSystemd(t *testing.T) {
	s, _ := system(t)
	_, err := s.Install(t.Context(), Request{Program: build(t, t.TempDir(), "one"), Settings: Settings{}, Token: token, Encrypt: true})
	if err == nil || !strings.Contains(err.Error(), "--encrypt") {
		t.Errorf("%v", err)
	}
}

// TestInterrupted: what an install made before it failed, uninstall takes away.
func TestInterrupted(t *testing.T) {
	s, root := system(t)
	plan, err := s.Install(t.Context(), Request{Program: build(t, t.TempDir(), "one"), Settings: Settings{}, Token: token})
	if err != nil {
		t.Fatal(err)
	}
	blocked := write(t, filepath.Join(root, "etc/systemd/system"), "no directory")
	if err = plan.Do(t.Context()); err == nil || tree(t, root)["/usr/local/bin/berthd"] == "" {
		t.Fatalf("it did not fail midway: %v, %q", err, tree(t, root))
	}
	plan, err = s.Uninstall(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	if err := plan.Do(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := tree(t, root); len(got) != 1 || got["/etc/systemd/system"] == "" {
		t.Errorf("this is left of it: %q, and %s", got, blocked)
	}
}

// TestQuoting: what is written is read as it was meant.
func TestQuoting(t *testing.T) {
	for _, value := range []string{"", "plain", "https://berth.example.com:8443/a?b=c", "two words", `"quoted"`, `it's`, `back\slash`, "$HOME and `date`", "#no remark", "  edges  ", "ünïcode"} {
		text := Settings{"NAME": value}.apply([]byte("# first\nNAME=before\nOTHER=1\n"))
		if got := parseSettings(text); got["NAME"] != value || got["OTHER"] != "1" {
			t.Errorf("%q became %q by %q", value, got["NAME"], text)
		}
	}
	for line, want := range map[string]string{`A='x y'`: "x y", `A="x \"y\""`: `x "y"`, `A=x\ y`: "x y", ` A = x `: "x", "; A=x": "", "#A=x": "", `A="`: `"`} {
		if got := parseSettings([]byte(line))["A"]; got != want {
			t.Errorf("%s is read as %q, want %q", line, got, want)
		}
	}
}

func TestMasked(t *testing.T) {
	for line, want := range map[string]string{
		"+BERTH_URL=https://x":             "+BERTH_URL=https://x",
		"+BERTH_HEADER=a=b":                "+BERTH_HEADER=(not shown)",
		"-BERTH_HEADER_COMMAND=printf k=v": "-BERTH_HEADER_COMMAND=(not shown)",
		"-BERTH_TOKEN=x":                   "-BERTH_TOKEN=(not shown)",
		"+BERTH_TOKEN_FILE=/etc/x":         "+BERTH_TOKEN_FILE=/etc/x",
		"# a remark":                       "# a remark",
	} {
		if got := masked(line); got != want {
			t.Errorf("%s is shown as %s, want %s", line, got, want)
		}
	}
}

func FuzzSettings(f *testing.F) {
	f.Add("# x\nA=1\n", "two words")
	f.Add("A=\"x\\\"\"\nB='", `"$\`)
	f.Fuzz(func(t *testing.T, text, value string) {
		if strings.ContainsAny(value, "\n\r\x00") {
			return // they are refused before
		}
		before := parseSettings([]byte(text))
		after := parseSettings(Settings{"A": value}.apply([]byte(text)))
		if after["A"] != value {
			t.Errorf("%q became %q", value, after["A"])
		}
		for name, value := range before {
			if name != "A" && after[name] != value {
				t.Errorf("%s was %q and became %q", name, value, after[name])
			}
		}
	})
}

// TestUnits: systemd finds nothing wrong with the units.
func TestUnits(t *testing.T) {
	dir := t.TempDir()
	for name, unit := range map[string]string{"berthd.service": systemd.Unit, "berthd-user.service": systemd.UserUnit} {
		unit = strings.NewReplacer("%h/.local/bin/berthd", "/bin/true", "/usr/local/bin/berthd", "/bin/true").Replace(unit)
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(unit), 0o644); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("systemd-analyze", "verify", "--man=no", path).CombinedOutput()
		if err != nil || strings.Contains(string(out), name) {
			t.Errorf("%s: %v: %s", name, err, out)
		}
	}
}
