package sshd

import (
	"io"
	"testing"

	"golang.org/x/crypto/ssh"
)

// BenchmarkBulk sends what a command writes to OpenSSH's client, with the cipher that it prefers.
func BenchmarkBulk(b *testing.B) {
	f := serve(b, nil)
	const size = 256 << 20
	b.SetBytes(size)
	for b.Loop() {
		cmd := f.command(b, "ssh", "ws", "dd if=/dev/zero bs=1M count=256 2>/dev/null")
		n := new(counter)
		cmd.Stdout = n
		if err := cmd.Run(); err != nil || *n != size {
			b.Fatal(*n, err)
		}
	}
}

// BenchmarkExec runs a command on a connection that is open.
func BenchmarkExec(b *testing.B) {
	c := serve(b, nil).dial(b)
	for b.Loop() {
		s, err := c.NewSession()
		if err != nil {
			b.Fatal(err)
		}
		if err := s.Run("true"); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkForward sends bytes through a direct-tcpip channel and back.
func BenchmarkForward(b *testing.B) {
	f := serve(b, nil)
	c := f.dial(b)
	echo := echoer(b)
	conn, err := c.Dial("tcp", echo.String())
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	buf := make([]byte, 1<<20)
	b.SetBytes(2 * int64(len(buf)))
	for b.Loop() {
		go conn.Write(buf)
		if _, err := io.ReadFull(conn, buf); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkConnect opens a connection and runs one command on it.
func BenchmarkConnect(b *testing.B) {
	f := serve(b, nil)
	for b.Loop() {
		c, err := ssh.Dial("tcp", f.addr.String(), &ssh.ClientConfig{User: "x", HostKeyCallback: ssh.FixedHostKey(f.cfg.HostKey.PublicKey())})
		if err != nil {
			b.Fatal(err)
		}
		s, err := c.NewSession()
		if err != nil {
			b.Fatal(err)
		}
		if err := s.Run("true"); err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
}
