package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/berthd/berth/deploy/systemd"
)

// Names in a release. A server hands out what is in the directory of agents (control/programs.go).
const (
	agentsDir   = "agents"
	sumsFile    = "SHA256SUMS"
	versionFile = "VERSION"
)

// maker makes one release of the commit that is checked out in root.
type maker struct {
	root, out       string
	platforms       []string // as os/arch
	version, commit string
	date            time.Time // of the commit; everything bears it
}

// all makes everything: first what is for one platform, then what holds all of the agents.
func (m *maker) all(ctx context.Context) error {
	work, err := os.MkdirTemp("", "berth-build-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	agents := filepath.Join(m.out, agentsDir)
	if err := os.Mkdir(agents, 0o755); err != nil {
		return err
	}
	for _, platform := range m.platforms {
		dir := filepath.Join(work, strings.ReplaceAll(platform, "/", "-"))
		if err := m.platform(ctx, dir, platform); err != nil {
			return fmt.Errorf("%s: %w", platform, err)
		}
	}
	if err := os.WriteFile(filepath.Join(agents, versionFile), []byte(m.version+"\n"), 0o644); err != nil {
		return err
	}
	if err := writeSums(agents, "berthd-*.tar.gz"); err != nil {
		return err
	}
	// A server needs all agents beside it, whatever it runs on itself.
	hosted, err := filepath.Glob(filepath.Join(agents, "*"))
	if err != nil {
		return err
	}
	for _, platform := range m.platforms {
		system, arch, _ := strings.Cut(platform, "/")
		if system != "linux" {
			continue
		}
		dir := filepath.Join(work, system+"-"+arch)
		files := []packed{{filepath.Join(dir, "berth"), "berth"}, {filepath.Join(m.root, "LICENSE"), "LICENSE"}}
		for _, path := range hosted {
			files = append(files, packed{path, agentsDir + "/" + filepath.Base(path)})
		}
		if err := m.archive(fmt.Sprintf("berth-server-%s-linux-%s.tar.gz", m.version, arch), files); err != nil {
			return err
		}
	}
	return writeSums(m.out, "*.*", agentsDir+"/*")
}

// platform builds the programs for one platform into dir, and makes what is for that platform alone.
func (m *maker) platform(ctx context.Context, dir, platform string) error {
	system, arch, _ := strings.Cut(platform, "/")
	license := packed{filepath.Join(m.root, "LICENSE"), "LICENSE"}
	programs := []string{"berth"}
	if system == "linux" { // berthd is for nothing else so far (docs/platforms.md)
		programs = append(programs, "berthd", "berthd-ptyhost")
	}
	for _, program := range programs {
		if err := m.build(ctx, dir, system, arch, program); err != nil {
			return err
		}
		if program != "berthd-ptyhost" { // whose modules are among those of berthd
			if err := m.materials(ctx, filepath.Join(dir, program), fmt.Sprintf("%s-%s-%s-%s.cdx.json", program, m.version, system, arch)); err != nil {
				return err
			}
		}
	}
	if err := m.archive(fmt.Sprintf("berth-%s-%s-%s.tar.gz", m.version, system, arch), []packed{{filepath.Join(dir, "berth"), "berth"}, license}); err != nil {
		return err
	}
	if system != "linux" {
		return nil
	}
	agent := []packed{{filepath.Join(dir, "berthd"), "berthd"}, {filepath.Join(dir, "berthd-ptyhost"), "berthd-ptyhost"}, license}
	if err := m.archive(fmt.Sprintf("%s/berthd-linux-%s.tar.gz", agentsDir, arch), agent); err != nil {
		return err
	}
	return m.packages(ctx, dir, arch)
}

// build builds one program. The version control's state is not asked for: what matters of it is given, so that neither
// the clone's depth nor its place shows in the program.
func (m *maker) build(ctx context.Context, dir, system, arch, program string) error {
	const module = "github.com/berthd/berth/"
	flags := []string{"-s", "-w", "-X", module + "internal/build.commit=" + m.commit, "-X", module + "internal/build.date=" + m.date.Format(time.RFC3339),
		"-X", module + "internal/berthd.version=" + m.version, "-X", "main.buildVersion=" + m.version}
	tags := ""
	if program == "berthd" {
		text, err := os.ReadFile(filepath.Join(m.root, "cmd/berthd/tags.txt"))
		if err != nil {
			return err
		}
		tags = strings.TrimSpace(string(text))
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-tags", tags, "-ldflags", strings.Join(flags, " "), "-o", filepath.Join(dir, program), "./cmd/"+program)
	cmd.Dir = m.root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOOS="+system, "GOARCH="+arch)
	if arch == "armv7" {
		cmd.Env = append(cmd.Env, "GOARCH=arm", "GOARM=7")
	}
	fmt.Printf("building %s for %s/%s\n", program, system, arch)
	_, err := finish(cmd)
	return err
}

// tool is a command of a program that tools.mod pins. One of them notes its own sum, so paths of this machine must not show in it.
func (m *maker) tool(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "go", append([]string{"tool", "-modfile=internal/release/tools.mod", name}, args...)...)
	cmd.Dir = m.root
	cmd.Env = append(os.Environ(), "GOFLAGS=-trimpath")
	return cmd
}

// materials writes which modules a program is made of, with their licenses, in CycloneDX's form.
func (m *maker) materials(ctx context.Context, program, name string) error {
	_, err := finish(m.tool(ctx, "cyclonedx-gomod", "bin", "-json", "-noserial", "-notimestamp", "-std", "-version", m.version, "-output", filepath.Join(m.out, name), program))
	return err
}

// packages makes what dpkg and rpm install, of the programs in dir. deploy/package says what is in them.
func (m *maker) packages(ctx context.Context, dir, arch string) error {
	// The unit starts the berthd that a person or install.sh put there; in a package that is another place.
	unit := strings.Replace(systemd.Unit, "/usr/local/bin/berthd", "/usr/bin/berthd", 1)
	if err := os.WriteFile(filepath.Join(dir, "berthd.service"), []byte(unit), 0o644); err != nil {
		return err
	}
	license, err := os.ReadFile(filepath.Join(m.root, "LICENSE"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "LICENSE"), license, 0o644); err != nil {
		return err
	}
	for _, kind := range []string{"deb", "rpm"} {
		// The packager knows each family's own names of processors; to Go an armv7 is arm7.
		cmd := m.tool(ctx, "nfpm", "package", "--config", "deploy/package/nfpm.yaml", "--packager", kind, "--target", m.out)
		cmd.Env = append(cmd.Env, "BUILD="+dir, "VERSION="+m.version, "ARCH="+strings.Replace(arch, "armv7", "arm7", 1),
			fmt.Sprintf("SOURCE_DATE_EPOCH=%d", m.date.Unix()))
		if _, err := finish(cmd); err != nil {
			return err
		}
	}
	return nil
}
