// Package deploy holds what machines are set up with, for programs that hand it out. [InstallScript] makes the script
// that installs berthd from one control server; the units of systemd are in deploy/systemd.
package deploy

import (
	_ "embed"
	"strings"
)

//go:embed install.sh
var installScript string

// InstallScript returns the script that installs berthd from the control server at url, which holds this version in
// archives with these sums, as sha256sum(1) prints them.
func InstallScript(url, version, sums string) string {
	return strings.NewReplacer(
		"server_url=\n", "server_url="+quote(url)+"\n",
		"server_version=\n", "server_version="+quote(version)+"\n",
		"server_sums=\n", "server_sums="+quote(sums)+"\n",
	).Replace(installScript)
}

// quote makes one word of a shell of any text without NUL.
func quote(text string) string { return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'" }
