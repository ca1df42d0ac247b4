package ptyhost

import (
	"fmt"
	"os"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
)

// Terminal modes are numbered as in RFC 4254, section 8.
var (
	controlChars = map[uint8]uint8{
		1: unix.VINTR, 2: unix.VQUIT, 3: unix.VERASE, 4: unix.VKILL, 5: unix.VEOF, 6: unix.VEOL, 7: unix.VEOL2, 8: unix.VSTART, 9: unix.VSTOP,
		10: unix.VSUSP, 12: unix.VREPRINT, 13: unix.VWERASE, 14: unix.VLNEXT, 18: unix.VDISCARD,
	}
	inputFlags = map[uint8]uint32{
		30: unix.IGNPAR, 31: unix.PARMRK, 32: unix.INPCK, 33: unix.ISTRIP, 34: unix.INLCR, 35: unix.IGNCR, 36: unix.ICRNL, 37: unix.IUCLC,
		38: unix.IXON, 39: unix.IXANY, 40: unix.IXOFF, 41: unix.IMAXBEL, 42: unix.IUTF8,
	}
	localFlags = map[uint8]uint32{
		50: unix.ISIG, 51: unix.ICANON, 52: unix.XCASE, 53: unix.ECHO, 54: unix.ECHOE, 55: unix.ECHOK, 56: unix.ECHONL, 57: unix.NOFLSH,
		58: unix.TOSTOP, 59: unix.IEXTEN, 60: unix.ECHOCTL, 61: unix.ECHOKE, 62: unix.PENDIN,
	}
	outputFlags = map[uint8]uint32{
		70: unix.OPOST, 71: unix.OLCUC, 72: unix.ONLCR, 73: unix.OCRNL, 74: unix.ONOCR, 75: unix.ONLRET,
	}
	controlFlags = map[uint8]uint32{92: unix.PARENB, 93: unix.PARODD}
)

// disabledChar is RFC 4254's value for a control character that is switched off; Linux says it with zero.
const disabledChar = 255

// prepare gives the slave its size and modes before a program sees it. UTF-8 erase is on unless the modes say otherwise: nothing else is spoken here.
func prepare(tty *os.File, modes map[uint8]uint32, size Size) error {
	if err := pty.Setsize(tty, &pty.Winsize{Rows: size.Rows, Cols: size.Cols}); err != nil {
		return fmt.Errorf("cannot set the terminal's size: %w", err)
	}
	fd := int(tty.Fd())
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return fmt.Errorf("cannot read the terminal's modes: %w", err)
	}
	t.Iflag |= unix.IUTF8
	for op, v := range modes {
		setMode(t, op, v)
	}
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, t); err != nil {
		return fmt.Errorf("cannot set the terminal's modes: %w", err)
	}
	return nil
}

func setMode(t *unix.Termios, op uint8, v uint32) {
	if i, ok := controlChars[op]; ok {
		t.Cc[i] = uint8(v)
		if v == disabledChar {
			t.Cc[i] = 0
		}
		return
	}
	for _, set := range []struct {
		flags map[uint8]uint32
		field *uint32
	}{{inputFlags, &t.Iflag}, {localFlags, &t.Lflag}, {outputFlags, &t.Oflag}, {controlFlags, &t.Cflag}} {
		if bit, ok := set.flags[op]; ok {
			*set.field &^= bit
			if v != 0 {
				*set.field |= bit
			}
		}
	}
}
