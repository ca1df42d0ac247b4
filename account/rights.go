package account

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Do runs f with the user's rights: on a thread of its own that has their user, groups and no capability as long as f runs. What f opens may be used
// everywhere afterwards. What f leaves to other goroutines is done by root, so f is to be short and plain.
func (u *User) Do(f func() error) error {
	if u == nil {
		return f()
	}
	runtime.LockOSThread()
	if syscall.Geteuid() == int(u.UID) { // within another Do
		defer runtime.UnlockOSThread()
		return f()
	}
	before, err := current()
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer func() {
		if err := before.regain(); err != nil {
			// The thread stays this goroutine's, so that nobody else gets fewer rights than they count on, and ends with it.
			panic(err)
		}
		runtime.UnlockOSThread()
	}()
	if err := (rights{u.UID, u.GID, u.Groups}).take(); err != nil {
		return fmt.Errorf("cannot act as %s: %w", u, err)
	}
	return f()
}

// rights are what the kernel checks a thread's doings by.
type rights struct {
	uid, gid uint32
	groups   []uint32
}

// current returns those of this thread.
func current() (rights, error) {
	list, err := unix.Getgroups()
	if err != nil {
		return rights{}, fmt.Errorf("cannot tell the process's groups: %w", err)
	}
	r := rights{uid: uint32(syscall.Geteuid()), gid: uint32(syscall.Getegid())}
	for _, gid := range list {
		r.groups = append(r.groups, uint32(gid))
	}
	return r, nil
}

// take gives this thread the rights of another user, the groups first: with the user goes the right to set them. The thread's real and saved user stay
// root, which is why the user can neither signal nor trace it, and the way back.
func (r rights) take() error {
	if err := r.setGroups(); err != nil {
		return err
	}
	if err := setEffective(unix.SYS_SETRESGID, r.gid); err != nil {
		return fmt.Errorf("cannot take group %d: %w", r.gid, err)
	}
	if err := setEffective(unix.SYS_SETRESUID, r.uid); err != nil {
		return fmt.Errorf("cannot take user %d: %w", r.uid, err)
	}
	return r.hold()
}

// regain gives a thread back the rights that it had.
func (r rights) regain() error {
	if err := setEffective(unix.SYS_SETRESUID, r.uid); err != nil {
		return fmt.Errorf("cannot get user %d back: %w", r.uid, err)
	}
	if err := setEffective(unix.SYS_SETRESGID, r.gid); err != nil {
		return fmt.Errorf("cannot get group %d back: %w", r.gid, err)
	}
	return r.setGroups()
}

func (r rights) setGroups() error {
	list := make([]int, len(r.groups))
	for i, gid := range r.groups {
		list[i] = int(gid)
	}
	if err := unix.Setgroups(list); err != nil {
		return fmt.Errorf("cannot set the groups: %w", err)
	}
	return nil
}

// hold checks that the thread has these rights now, no others, and no capability in effect.
func (r rights) hold() error {
	now, err := current()
	if err != nil {
		return err
	}
	if now.uid != r.uid || now.gid != r.gid || !sameGroups(now.groups, r.groups) {
		return fmt.Errorf("this is user %d of group %d (%v), not %d of %d (%v)", now.uid, now.gid, now.groups, r.uid, r.gid, r.groups)
	}
	effective, _, err := capabilities()
	if err == nil && effective {
		err = errors.New("the rights of root are still in effect")
	}
	return err
}

// sameGroups compares sets.
func sameGroups(a, b []uint32) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(slices.Compact(a), slices.Compact(b))
}

// setEffective sets the effective user or group of this thread alone; package syscall would set every thread's.
func setEffective(call uintptr, id uint32) error {
	const same = ^uintptr(0)
	if _, _, errno := unix.RawSyscall(call, same, uintptr(id), same); errno != 0 {
		return errno
	}
	return nil
}

// capabilities tells whether this thread has any in effect, and whether it may bring any into effect.
func capabilities() (effective, permitted bool, err error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false, false, fmt.Errorf("cannot tell the process's capabilities: %w", err)
	}
	return data[0].Effective|data[1].Effective != 0, data[0].Permitted|data[1].Permitted != 0, nil
}

// Verify checks, in a process that was started with [User.Credential], that it has the user's rights and that there is no way back. It tries: nothing
// but the kernel's refusal is taken for one.
func (u *User) Verify() error {
	if err := (rights{u.UID, u.GID, u.Groups}).hold(); err != nil {
		return err
	}
	if real, _, saved := unix.Getresuid(); real != int(u.UID) || saved != int(u.UID) {
		return fmt.Errorf("the process could become user %d or %d again", real, saved)
	}
	if real, _, saved := unix.Getresgid(); real != int(u.GID) || saved != int(u.GID) {
		return fmt.Errorf("the process could take group %d or %d again", real, saved)
	}
	switch _, permitted, err := capabilities(); {
	case err != nil:
		return err
	case permitted:
		return errors.New("the process could take rights of root up again")
	case syscall.Setuid(0) == nil, syscall.Setresuid(-1, 0, -1) == nil:
		return errors.New("the process could become root again")
	case u.GID != 0 && syscall.Setgid(0) == nil, unix.Setgroups([]int{0}) == nil:
		return errors.New("the process could take root's group")
	}
	return nil
}

// DialUnix connects to a Unix socket as the user; the other side is told that it is them.
func (u *User) DialUnix(ctx context.Context, path string) (conn net.Conn, err error) {
	err = u.Do(func() (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, "unix", path)
		return err
	})
	return conn, err
}

// ListenUnix listens on a Unix socket that belongs to the user. Closing the listener removes it.
func (u *User) ListenUnix(path string) (net.Listener, error) {
	if u == nil {
		return net.Listen("unix", path)
	}
	l := &listener{user: u, path: path}
	err := u.Do(func() (err error) {
		l.UnixListener, err = net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		return err
	})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	return l, nil
}

// listener removes its socket as the user: a directory of theirs may have become a link to another place meanwhile.
type listener struct {
	*net.UnixListener
	user   *User
	path   string
	remove sync.Once
}

func (l *listener) Close() error {
	err := l.UnixListener.Close()
	l.remove.Do(func() {
		err = errors.Join(err, l.user.Do(func() error { return os.Remove(l.path) }))
	})
	return err
}
