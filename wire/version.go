package wire

import (
	"fmt"
	"strconv"
	"strings"
)

// Version is a version of the agent API.
type Version struct{ Major, Minor int }

// CurrentVersion is the newest version spoken here; OldestVersion the oldest that is accepted (docs/protocol.md#names).
var (
	CurrentVersion = Version{2, 10}
	OldestVersion  = Version{2, 0}
)

// String returns "major.minor".
func (v Version) String() string { return fmt.Sprintf("%d.%d", v.Major, v.Minor) }

// AtLeast tells whether v has what came with the given minor version of API 2.
func (v Version) AtLeast(minor int) bool { return v.Major > 2 || v.Major == 2 && v.Minor >= minor }

// ParseVersion reads "major.minor". Its error texts are those of the protocol.
func ParseVersion(s string) (Version, error) {
	major, minor, ok := strings.Cut(s, ".")
	if !ok || strings.Contains(minor, ".") {
		return Version{}, fmt.Errorf("invalid version string: %s", s)
	}
	ma, err := strconv.Atoi(major)
	if err != nil || ma < 0 {
		return Version{}, fmt.Errorf("invalid major version: %s", major)
	}
	mi, err := strconv.Atoi(minor)
	if err != nil || mi < 0 {
		return Version{}, fmt.Errorf("invalid minor version: %s", minor)
	}
	return Version{ma, mi}, nil
}

// Accept tells whether a server of CurrentVersion serves a caller that asks for v. Its error texts
// are those of the protocol: agents fall back by reading them.
func (v Version) Accept() error {
	switch {
	case v.Major > CurrentVersion.Major:
		return fmt.Errorf("server is at version %s, behind requested major version %s", CurrentVersion, v)
	case v.Major < CurrentVersion.Major:
		return fmt.Errorf("version %s is no longer supported", v)
	case v.Minor > CurrentVersion.Minor:
		return fmt.Errorf("server is at version %s, behind requested minor version %s", CurrentVersion, v)
	}
	return nil
}

// ServerVersion reads the server's version from the text of [Version.Accept] about a minor version.
func ServerVersion(detail string) (Version, bool) {
	rest, ok := strings.CutPrefix(detail, "server is at version ")
	if !ok {
		return Version{}, false
	}
	version, rest, ok := strings.Cut(rest, ", ")
	if !ok || !strings.HasPrefix(rest, "behind requested minor version") {
		return Version{}, false
	}
	v, err := ParseVersion(version)
	return v, err == nil
}
