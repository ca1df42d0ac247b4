package sshd

import (
	"encoding/binary"
	"fmt"
	"math"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/berthd/berth/ptyhost"
)

// ptyRequest is what a client asks of its terminal (RFC 4254, section 6.2).
type ptyRequest struct {
	term  string
	size  ptyhost.Size
	modes map[uint8]uint32
}

// parsePTY decodes a pty-req.
func parsePTY(payload []byte) (*ptyRequest, error) {
	var p struct {
		Term                          string
		Cols, Rows, WidthPx, HeightPx uint32
		Modes                         string
	}
	if err := ssh.Unmarshal(payload, &p); err != nil {
		return nil, fmt.Errorf("cannot read a pty-req: %w", err)
	}
	// The longest name in terminfo's own database has 34 bytes.
	if len(p.Term) > 256 || strings.ContainsRune(p.Term, 0) {
		return nil, fmt.Errorf("cannot use a terminal type of %d bytes", len(p.Term))
	}
	return &ptyRequest{term: p.Term, size: size(p.Rows, p.Cols), modes: parseModes(p.Modes)}, nil
}

// parseWindowChange decodes a window-change (RFC 4254, section 6.7).
func parseWindowChange(payload []byte) (ptyhost.Size, error) {
	var p struct{ Cols, Rows, WidthPx, HeightPx uint32 }
	if err := ssh.Unmarshal(payload, &p); err != nil {
		return ptyhost.Size{}, fmt.Errorf("cannot read a window-change: %w", err)
	}
	return size(p.Rows, p.Cols), nil
}

func size(rows, cols uint32) ptyhost.Size {
	return ptyhost.Size{Rows: uint16(min(rows, math.MaxUint16)), Cols: uint16(min(cols, math.MaxUint16))}
}

// Opcodes in encoded terminal modes (RFC 4254, section 8).
const (
	modesEnd       = 0
	firstUndefined = 160 // from here on arguments have no known length, so reading stops
)

// parseModes decodes terminal modes. Like sshd it keeps what came whole and ignores the rest.
func parseModes(encoded string) map[uint8]uint32 {
	modes := make(map[uint8]uint32)
	for b := []byte(encoded); len(b) >= 5 && b[0] != modesEnd && b[0] < firstUndefined; b = b[5:] {
		modes[b[0]] = binary.BigEndian.Uint32(b[1:])
	}
	return modes
}
