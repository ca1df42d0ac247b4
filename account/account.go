// Package account lends the rights of another user to parts of a process that runs as root.
//
// [Find] finds the user. [User.Credential] is for what is started, [User.Do] for what the process does itself: opening a file, or listening on a
// socket. Either way it is the kernel that checks what the user may, so a link that they laid leads nowhere that they could not go by themselves. A
// nil *User is the user that the process runs as, and every method then does what its plain counterpart does.
package account

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// User is whom commands are run as.
type User struct {
	Name        string
	UID, GID    uint32
	Groups      []uint32 // all of them, GID among them; of what [Entries] yields none
	Home, Shell string
}

// String returns the name.
func (u *User) String() string {
	if u == nil {
		return "berthd's own user"
	}
	return u.Name
}

// Credential makes a started process the user's: Go sets the groups, then the group, then the user in the child, and does not start the program if one
// of them fails.
func (u *User) Credential() *syscall.Credential {
	if u == nil {
		return nil
	}
	return &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.Groups}
}

// Find returns the user of this name or, if nobody is called so, of this number. It returns nil for the user that this process runs as. Its errors say
// what to do.
func Find(name string) (*User, error) { return find(name, os.Geteuid(), "/etc/passwd", "/etc/group") }

func find(name string, self int, passwd, group string) (*User, error) {
	u, err := named(name, passwd, group)
	switch {
	case err != nil:
		return nil, err
	case int(u.UID) == self:
		return nil, nil
	case self != 0:
		return nil, fmt.Errorf("cannot run as %s: berthd runs as user %d, and only root can become another user: start it as root, or as %s", u, self, u)
	}
	// sshd lets nobody in whose shell is not there either. One that only says no, such as nologin, gets to say so.
	if info, err := os.Stat(u.Shell); err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return nil, fmt.Errorf("cannot run as %s: their login shell %s is not there: install it, or give them another (usermod --shell /bin/sh %s)", u, u.Shell, u)
	}
	switch info, err := os.Stat(u.Home); {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("cannot run as %s: their home directory %s is not there: make it (install -d -m 700 -o %d -g %d %s)", u, u.Home, u.UID, u.GID, u.Home)
	case err != nil:
		return nil, fmt.Errorf("cannot run as %s: cannot look at their home directory: %w", u, err)
	case !info.IsDir():
		return nil, fmt.Errorf("cannot run as %s: their home %s is no directory", u, u.Home)
	}
	return u, nil
}

// Named returns the user of this name or number, whoever this process runs as.
func Named(name string) (*User, error) { return named(name, "/etc/passwd", "/etc/group") }

func named(name, passwd, group string) (*User, error) {
	var found *User
	uid, err := strconv.ParseUint(name, 10, 32)
	for u := range Entries(passwd) {
		if u.Name == name {
			found = &u
			break
		}
		if err == nil && found == nil && uint64(u.UID) == uid {
			found = &u
		}
	}
	if found == nil {
		return nil, fmt.Errorf("there is no user %q in %s: make it (useradd --create-home %s), or name another", name, passwd, name)
	}
	found.Groups = groups(group, found.Name, found.GID)
	if found.Shell == "" {
		found.Shell = "/bin/sh" // what passwd(5) says of an empty field
	}
	return found, nil
}

// groups returns the primary group and those that a file of group(5) has the user in.
func groups(path, name string, primary uint32) []uint32 {
	list := []uint32{primary}
	for field := range lines(path) {
		if len(field) != 4 || !slices.Contains(strings.Split(field[3], ","), name) {
			continue
		}
		if gid, err := strconv.ParseUint(field[2], 10, 32); err == nil && !slices.Contains(list, uint32(gid)) {
			list = append(list, uint32(gid))
		}
	}
	return list
}

// Entries yields the users in a file of passwd(5), none if it cannot be read. Lines that are none are skipped.
func Entries(passwd string) iter.Seq[User] {
	return func(yield func(User) bool) {
		for field := range lines(passwd) {
			if len(field) != 7 || field[0] == "" {
				continue
			}
			uid, uidErr := strconv.ParseUint(field[2], 10, 32)
			gid, gidErr := strconv.ParseUint(field[3], 10, 32)
			if uidErr != nil || gidErr != nil {
				continue
			}
			if !yield(User{Name: field[0], UID: uint32(uid), GID: uint32(gid), Home: field[5], Shell: field[6]}) {
				return
			}
		}
	}
}

// maxLine bounds a line: a group of ten thousand people fits.
const maxLine = 1 << 20

// lines yields the fields of each line.
func lines(path string) iter.Seq[[]string] {
	return func(yield func([]string) bool) {
		file, err := os.Open(path)
		if err != nil {
			return
		}
		defer file.Close()
		scanner := bufio.NewScanner(file)
		scanner.Buffer(nil, maxLine)
		for scanner.Scan() {
			if !yield(strings.Split(scanner.Text(), ":")) {
				return
			}
		}
	}
}
