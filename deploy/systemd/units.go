// Package systemd holds the units of berthd, which `berthd install` writes. docs/systemd.md explains each line of them.
//
// [Unit] is for a machine, [UserUnit] for one user without root.
package systemd

import _ "embed"

var (
	//go:embed berthd.service
	Unit string
	//go:embed berthd-user.service
	UserUnit string
)
