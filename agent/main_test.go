package agent

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"github.com/berthd/berth/internal/testhome"
	"github.com/berthd/berth/ptyhost"
)

// envListen makes the test binary a program that listens on a port, tells which, and ends when its
// standard input does.
const envListen = "BERTH_TEST_LISTEN"

// envHost makes it the process that owns the terminals, on this socket.
const envHost = "BERTH_TEST_PTYHOST"

func TestMain(m *testing.M) {
	if socket := os.Getenv(envHost); socket != "" {
		if err := ptyhost.RunProcess(context.Background(), socket, slog.New(slog.NewTextHandler(os.Stderr, nil))); err != nil {
			panic(err)
		}
		return
	}
	if os.Getenv(envListen) != "" {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			panic(err)
		}
		fmt.Println(l.Addr().(*net.TCPAddr).Port)
		_, _ = bufio.NewReader(os.Stdin).ReadString(0)
		return
	}
	testhome.Main(m)
}

// eventually polls until ok holds, with a limit that only a fault reaches.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

func listenLoopback(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}
