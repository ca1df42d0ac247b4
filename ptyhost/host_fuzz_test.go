package ptyhost

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net"
	"os"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/berthd/berth/internal/golden"
)

// startsSomething reports whether a stream of frames asks for a program to be started, by the decoder that the host uses.
func startsSomething(stream []byte) bool {
	r := bufio.NewReader(bytes.NewReader(stream))
	for {
		f, payload, err := readFrame(r, nil)
		if err != nil {
			return false
		}
		var req AttachRequest
		if f == frameAttach && json.Unmarshal(payload, &req) == nil && req.Create != nil {
			return true
		}
	}
}

// FuzzHost sends a host, which has one session, whatever a client might. It answers or hangs up, and lives on.
func FuzzHost(f *testing.F) {
	id := uuid.NewString()
	hello := appendJSON(nil, frameHello, helloMessage{Version: protocolVersion})
	attached := appendJSON(bytes.Clone(hello), frameAttach, AttachRequest{ID: id, Size: Size{30, 90}})
	f.Add(appendSize(appendFrame(bytes.Clone(attached), frameInput, []byte("typed\r")), Size{1, 65535}))
	f.Add(appendFrame(bytes.Clone(attached), frameSignal, []byte("WINCH")))
	f.Add(appendFrame(bytes.Clone(attached), frameInput, make([]byte, inputWindow+1)))
	f.Add(appendFrame(bytes.Clone(hello), frameList, nil))
	f.Add(appendFrame(bytes.Clone(hello), frameWatch, nil))
	f.Add(appendFrame(bytes.Clone(hello), frameShutdown, nil))
	f.Add(appendJSON(bytes.Clone(hello), frameKill, killMessage{ID: id}))
	f.Add(appendJSON(bytes.Clone(hello), frameRename, renameMessage{ID: id, Name: "new", IdleTimeout: -1}))
	f.Add(golden.Bytes(f, "ptyhost-v1-missing-client"))
	h := NewHost(HostConfig{})
	f.Cleanup(func() {
		h.endAll()
		h.running.Wait()
	})
	exchange := func(t testing.TB, stream []byte) []byte {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		var ends [2]*net.UnixConn
		for i, fd := range fds {
			file := os.NewFile(uintptr(fd), "pair")
			conn, err := net.FileConn(file)
			if err != nil {
				t.Fatal(err)
			}
			file.Close()
			ends[i] = conn.(*net.UnixConn)
		}
		defer ends[0].Close()
		served := make(chan struct{})
		go func() {
			defer close(served)
			h.serve(ends[1])
		}()
		go func() {
			ends[0].Write(stream) // the host may hang up first
			ends[0].CloseWrite()
		}()
		answer, _ := io.ReadAll(ends[0]) // it may also reset
		<-served
		return answer
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		if startsSomething(stream) {
			return // this runs as whoever tests
		}
		// The session may have been ended by the stream before.
		again := appendJSON(bytes.Clone(hello), frameAttach, AttachRequest{ID: id, Create: &CreateRequest{Argv: []string{"/bin/cat"}, Env: testEnv}})
		if answer := exchange(t, again); !bytes.Contains(answer, []byte(`"version"`)) {
			t.Fatalf("the host answers %q", answer)
		}
		exchange(t, stream)
	})
}
