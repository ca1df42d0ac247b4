package main

import (
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/creack/pty"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s: %s", path, diff)
	}
}

func TestHostsFileGolden(t *testing.T) {
	golden(t, "hosts.golden", hostsFile([]string{"/opt/berth's tools/100%/berth", "--url", "https://berth.example.com", "--token-file", "/home/me/key"}))
}

const personal = "# mine\nHost other\n\tUser me\n"

func TestWithInclude(t *testing.T) {
	once := string(withInclude([]byte(personal), `"/h/.ssh/berth_config"`))
	golden(t, "config.golden", once)
	if twice := string(withInclude([]byte(once), `"/h/.ssh/berth_config"`)); twice != once {
		t.Errorf("not idempotent: %s", cmp.Diff(once, twice))
	}
	moved := string(withInclude([]byte(once), `"/elsewhere"`))
	if strings.Count(moved, "Include") != 1 || !strings.Contains(moved, "/elsewhere") {
		t.Errorf("an older include is not replaced:\n%s", moved)
	}
	if back := string(withoutInclude([]byte(once))); back != personal {
		t.Errorf("removal is not exact: %s", cmp.Diff(personal, back))
	}
}

func TestWithoutIncludeDamaged(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{"not there", personal, personal},
		{"end line lost", includeBegin + "\nInclude \"/x\"\nHost a\n", "Host a\n"},
		{"lines added within", includeBegin + "\nInclude \"/x\"\nHost a\n" + includeEnd + "\n", "Host a\n" + includeEnd + "\n"},
		{"include lost", includeBegin + "\nHost a\n", "Host a\n"},
		{"moved down", "Host a\n" + includeBegin + "\nInclude \"/x\"\n" + includeEnd + "\nHost b\n", "Host a\nHost b\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, string(withoutInclude([]byte(tt.in)))); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestCheckName(t *testing.T) {
	for _, name := range []string{"demo", "a", "build-1.team_x", "Demo.berth", "0e9c1f5e-6f56-4b0e-8f4b-0e9c1f5e6f56"} {
		if err := checkName(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"", "-oProxyCommand=x", "a\nb", "a b", "$(x)", "a'b", "a;b", ".a", "a.", "a/b", "ä", strings.Repeat("a", 129), "a\x00"} {
		if err := checkName(name); err == nil {
			t.Errorf("%q is taken", name)
		}
	}
}

func TestSSHQuote(t *testing.T) {
	if got, err := sshQuote("/home/a b/.ssh/x"); err != nil || got != `"/home/a b/.ssh/x"` {
		t.Errorf("got %s, %v", got, err)
	}
	for _, path := range []string{"/a\nHost *", `/a"b`, "/a*", "/a%h", "/${x}"} {
		if got, err := sshQuote(path); err == nil {
			t.Errorf("%q is taken as %s", path, got)
		}
	}
}

func TestConfigSSHPlanAndApply(t *testing.T) {
	home := t.TempDir()
	real := writeFile(t, filepath.Join(home, "dotfiles", "ssh", "config"), personal, 0o640)
	link := filepath.Join(home, ".ssh", "config")
	if err := os.MkdirAll(filepath.Dir(link), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, link); err != nil {
		t.Fatal(err)
	}
	p := &program{in: devNull(t), out: devNull(t), errOut: devNull(t)}
	do := func(remove bool) (changed bool) {
		t.Helper()
		changes, err := p.planSSH(link, remove)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range changes {
			changed = changed || c.needed()
		}
		if err := p.applySSH(changes, false, false); err != nil {
			t.Fatal(err)
		}
		return changed
	}
	if !do(false) || do(false) {
		t.Error("the first run must change something and the second nothing")
	}
	if info, err := os.Lstat(link); err != nil || info.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link is gone: %v, %v", info, err)
	}
	if info, err := os.Stat(real); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("the mode changed: %v, %v", info, err)
	}
	if !do(true) || do(true) {
		t.Error("removal must change something once")
	}
	if got := readFile(t, real); got != personal {
		t.Errorf("left behind: %s", cmp.Diff(personal, got))
	}
	if entries, _ := os.ReadDir(filepath.Dir(real)); len(entries) != 1 {
		t.Errorf("files left: %v", entries)
	}
}

// TestOpenSSH has the real ssh read the configuration and call a stand-in for berth.
func TestOpenSSH(t *testing.T) {
	ssh, err := exec.LookPath("ssh")
	if err != nil {
		t.Fatal("this test drives OpenSSH, which is not installed; ./test.sh installs it")
	}
	dir := t.TempDir()
	called := filepath.Join(dir, "called")
	fake := writeFile(t, filepath.Join(dir, "it's 100% berth"), "#!/bin/sh\nfor a; do printf '<%s>' \"$a\"; done >>"+called+"\n", 0o700)
	hosts := writeFile(t, filepath.Join(dir, "berth_config"), hostsFile([]string{fake, "--url", "http://x"}), 0o600)
	config := writeFile(t, filepath.Join(dir, "config"), string(withInclude([]byte(personal), `"`+hosts+`"`)), 0o600)
	for _, tt := range []struct{ host, want string }{
		{"demo.berth", "<--url><http://x><ssh><--stdio><--><demo.berth>"},
		{"$(touch evil).berth", "<--url><http://x><ssh><--stdio><--><$(touch evil).berth>"},
		{"x'$(touch evil)'.berth", ""},
		{"other", ""},
	} {
		os.Remove(called)
		cmd := exec.Command(ssh, "-F", config, "-o", "BatchMode=yes", "-o", "ConnectTimeout=1", "--", tt.host)
		cmd.Dir = dir
		cmd.Run() // it fails in any case: nothing there speaks SSH, and newer versions refuse odd names themselves
		got, _ := os.ReadFile(called)
		if string(got) != tt.want && !(len(got) == 0 && strings.Contains(tt.host, "$")) {
			t.Errorf("host %q: berth was called with %q, want %q", tt.host, got, tt.want)
		}
		if _, err := os.Stat(filepath.Join(dir, "evil")); err == nil {
			t.Fatalf("host %q ran a command", tt.host)
		}
	}
}

// TestConfigSSHByHand goes the whole way as a person does, and has the real ssh say what it understood.
func TestConfigSSHByHand(t *testing.T) {
	ssh, err := exec.LookPath("ssh")
	if err != nil {
		t.Fatal("this test drives OpenSSH, which is not installed; ./test.sh installs it")
	}
	const everywhere = personal + "Host *\n\tServerAliveInterval 5\n\tServerAliveCountMax 2\n\tLogLevel DEBUG\n"
	dir := filepath.Join(t.TempDir(), "a b", ".ssh")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	config := writeFile(t, filepath.Join(dir, "config"), everywhere, 0o600)
	do := func(args ...string) string {
		t.Helper()
		code, out, errOut := berth(t, append([]string{"--url", "https://berth.example.com", "config-ssh", "--ssh-config-file", config}, args...)...)
		if code != 0 {
			t.Fatalf("%q exits with %d: %s", args, code, errOut)
		}
		return out
	}
	// understood is what ssh takes for a host, of the options that matter here.
	understood := func(host string) map[string]string {
		t.Helper()
		out, err := exec.Command(ssh, "-G", "-F", config, host).Output()
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		for _, line := range strings.Split(string(out), "\n") {
			switch key, value, _ := strings.Cut(line, " "); key {
			case "user", "proxycommand", "serveraliveinterval", "serveralivecountmax", "stricthostkeychecking", "userknownhostsfile", "loglevel":
				got[key] = value
			}
		}
		return got
	}
	other, stranger := understood("other"), understood("stranger")

	shown := do("--dry-run")
	if !strings.Contains(shown, "+ Include ") || !strings.Contains(shown, "+ Host *.berth") || strings.Contains(shown, "Host other") {
		t.Errorf("it shows:\n%s", shown)
	}
	if got := readFile(t, config); got != everywhere {
		t.Errorf("--dry-run changed something: %s", cmp.Diff(everywhere, got))
	}
	if got := do(); got != shown {
		t.Errorf("what is done is not what was shown: %s", cmp.Diff(shown, got))
	}
	if got := do("--yes"); got != "" {
		t.Errorf("a second time it changes:\n%s", got)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"user":         understood("stranger")["user"],
		"proxycommand": exe + " --url https://berth.example.com ssh --stdio -- '%h'", "stricthostkeychecking": "false",
		"userknownhostsfile": "/dev/null", "loglevel": "ERROR", "serveraliveinterval": "60", "serveralivecountmax": "15",
	}
	for _, host := range []string{"demo.berth", "box.team_1.berth"} {
		if diff := cmp.Diff(want, understood(host)); diff != "" {
			t.Errorf("%s: %s", host, diff)
		}
	}
	for host, before := range map[string]map[string]string{"other": other, "stranger": stranger} {
		if diff := cmp.Diff(before, understood(host)); diff != "" {
			t.Errorf("%s is touched: %s", host, diff)
		}
	}
	do("--remove")
	if diff := cmp.Diff(stranger, understood("demo.berth")); diff != "" {
		t.Errorf("after it was taken out: %s", diff)
	}
	if got := readFile(t, config); got != everywhere {
		t.Errorf("left behind: %s", cmp.Diff(everywhere, got))
	}
}

// On a terminal nothing changes until a person says so.
func TestConfigSSHAsks(t *testing.T) {
	for answer, makes := range map[string]bool{"n\n": false, "no way\n": false, "\n": true, "y\n": true, "\x04": false} {
		master, tty, err := pty.Open()
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "config")
		p := &program{in: tty, out: devNull(t), errOut: devNull(t)}
		changes, err := p.planSSH(path, false)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := master.WriteString(answer); err != nil {
			t.Fatal(err)
		}
		err = p.applySSH(changes, false, false)
		if _, statErr := os.Stat(path); (err == nil) != makes || (statErr == nil) != makes {
			t.Errorf("after %q: %v, %v", answer, err, statErr)
		}
		master.Close()
		tty.Close()
	}
}
