package tailnet

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// loopbackTCP serves f on a loopback address and returns the port.
func loopbackTCP(t *testing.T, host string, f func(*net.TCPConn)) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatalf("this test needs loopback on %s: %v", host, err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				f(c.(*net.TCPConn))
			}()
		}
	}()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

func TestForwardTCP(t *testing.T) {
	r := startRelay(t, nil)
	agent, client := pair(t, mapOf(r.region(1)), Config{ForwardLoopback: true}, Config{})
	awaited(t, client, agent)

	for _, host := range []string{"127.0.0.1", "::1"} {
		t.Run(host, func(t *testing.T) {
			// The answer is given only when the question has ended, which takes
			// a connection that can close one way.
			port := loopbackTCP(t, host, func(c *net.TCPConn) {
				all, _ := io.ReadAll(c)
				io.WriteString(c, strings.ToUpper(string(all)))
			})
			c, err := client.DialTCP(within(t, 5*time.Second), agent.port(port))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			io.WriteString(c, "question")
			if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			c.SetReadDeadline(time.Now().Add(5 * time.Second))
			if got, err := io.ReadAll(c); err != nil || string(got) != "QUESTION" {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}

	t.Run("refused", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := uint16(l.Addr().(*net.TCPAddr).Port)
		l.Close()
		start := time.Now()
		_, err = client.DialTCP(within(t, 5*time.Second), agent.port(port))
		if !errors.Is(err, syscall.ECONNREFUSED) || time.Since(start) > 2*time.Second {
			t.Errorf("dial of a closed port: %v after %v", err, time.Since(start))
		}
	})

	t.Run("reset", func(t *testing.T) {
		port := loopbackTCP(t, "127.0.0.1", func(c *net.TCPConn) {
			io.WriteString(c, "half of an answ")
			io.ReadFull(c, make([]byte, 1))
			c.SetLinger(0)
		})
		c, err := client.DialTCP(within(t, 5*time.Second), agent.port(port))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.ReadFull(c, make([]byte, 15)); err != nil {
			t.Fatal(err)
		}
		c.Write([]byte{0})
		if _, err := io.ReadAll(c); errors.Is(err, syscall.ETIMEDOUT) {
			t.Errorf("a reset service left the connection open: %v", err)
		}
	})

	t.Run("client", func(t *testing.T) {
		// A client does not open its loopback services to the agent.
		port := loopbackTCP(t, "127.0.0.1", func(c *net.TCPConn) { io.WriteString(c, "secret") })
		if c, err := agent.DialTCP(within(t, 5*time.Second), client.port(port)); err == nil {
			c.Close()
			t.Error("a client forwarded a loopback service")
		}
	})
}

func TestForwardUDP(t *testing.T) {
	r := startRelay(t, nil)
	agent, client := pair(t, mapOf(r.region(1)), Config{ForwardLoopback: true}, Config{})
	awaited(t, client, agent)
	for _, host := range []string{"127.0.0.1", "::1"} {
		t.Run(host, func(t *testing.T) {
			l, err := net.ListenPacket("udp", net.JoinHostPort(host, "0"))
			if err != nil {
				t.Fatalf("this test needs loopback on %s: %v", host, err)
			}
			defer l.Close()
			go func() {
				buf := make([]byte, 2000)
				for {
					n, from, err := l.ReadFrom(buf)
					if err != nil {
						return
					}
					l.WriteTo(buf[:n], from)
				}
			}()
			c, err := client.DialUDP(within(t, 5*time.Second), agent.port(uint16(l.LocalAddr().(*net.UDPAddr).Port)))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.Write(make([]byte, MaxDatagram+1)) // lost as a whole, not cut
			for _, size := range []int{1, 1000, 1232, MaxDatagram} {
				echoed(t, c, size)
			}
		})
	}
}

// echoed sends a datagram until it comes back, for what carries it may lose it.
func echoed(t *testing.T, c net.Conn, size int) {
	t.Helper()
	got := make([]byte, MaxDatagram+2)
	for end := time.Now().Add(10 * time.Second); ; {
		c.Write(make([]byte, size))
		c.SetReadDeadline(time.Now().Add(time.Second))
		n, err := c.Read(got)
		for err == nil && n < size { // an earlier one that was sent twice
			n, err = c.Read(got)
		}
		if n == size {
			return
		}
		if err == nil || time.Now().After(end) {
			t.Fatalf("datagram of %d bytes: got %d back, %v", size, n, err)
		}
	}
}

// TestUDPBackends: a flow whose first address refuses reaches the next one with that very
// datagram. These sockets lose none, so nothing is sent again here; many flows at once make the refusal
// come before, while and after the flow's own goroutines start.
func TestUDPBackends(t *testing.T) {
	service, err := net.ListenUDP("udp6", &net.UDPAddr{IP: net.IPv6loopback})
	if err != nil {
		t.Fatalf("this test needs loopback on ::1: %v", err)
	}
	defer service.Close()
	port := uint16(service.LocalAddr().(*net.UDPAddr).Port)
	go func() {
		buf := make([]byte, 100)
		for {
			n, from, err := service.ReadFromUDP(buf)
			if err != nil {
				return
			}
			service.WriteToUDP(buf[:n], from)
		}
	}()
	var flows sync.WaitGroup
	for range 8 {
		flows.Go(func() {
			for i := range 200 {
				peer, client := datagramPair(t)
				ctx, cancel := context.WithCancel(t.Context())
				var ended sync.WaitGroup
				ended.Go(func() { forwardUDP(ctx, peer, port) })
				client.SetDeadline(time.Now().Add(20 * time.Second))
				client.Write([]byte{1})
				if _, err := client.Read(make([]byte, 1)); err != nil {
					t.Errorf("flow %d: %v", i, err)
				}
				cancel()
				ended.Wait()
				peer.Close()
				client.Close()
				if t.Failed() {
					return
				}
			}
		})
	}
	flows.Wait()
}

// datagramPair returns two connected sockets that lose nothing.
func datagramPair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		t.Error(err)
		runtime.Goexit()
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "end")
		if ends[i], err = net.FileConn(f); err != nil {
			t.Error(err)
			runtime.Goexit()
		}
		f.Close()
	}
	return ends[0], ends[1]
}
