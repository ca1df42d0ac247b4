package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// trouble runs berthd against a URL until it says the words, and checks how it says them.
func (m *machine) trouble(url, words string, limit time.Duration, env ...string) {
	m.t.Helper()
	d := m.start("berthd", append([]string{"BERTH_URL=" + url, "BERTH_TOKEN=4a1e5bb4-57a7-4c1c-94ac-2b80e5b5e7a1"}, env...),
		"run", "--state-dir", filepath.Join(m.home, "state"))
	d.wait(words, limit)
	out := d.output()
	if n := strings.Count(out, words); n != 1 {
		m.t.Errorf("said %d times:\n%s", n, out)
	}
	if strings.Contains(out, "goroutine ") {
		m.t.Errorf("a stack trace:\n%s", out)
	}
	if code := d.stop(syscall.SIGTERM, 15*time.Second); code != 0 {
		m.t.Errorf("SIGTERM in trouble: exit code %d", code)
	}
	eventually(m.t, 5*time.Second, "nothing is left running", func() bool { return len(m.processes()) == 0 })
}

// A machine whose clock is in 1970 sees a certificate from the far future. The far side plays that:
// its certificate begins in ten years.
func TestClockBehind(t *testing.T) {
	m := newMachine(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	begins := time.Now().AddDate(10, 0, 0)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "future"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: begins, NotAfter: begins.AddDate(1, 0, 0), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	ca := filepath.Join(m.home, "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.NotFoundHandler(), ErrorLog: log.New(io.Discard, "", 0)}
	go server.Serve(l)
	defer server.Close()
	m.trouble("https://"+l.Addr().String(), "this machine's clock says "+time.Now().UTC().Format(time.DateOnly), 10*time.Second, "BERTH_CA_FILE="+ca)
}

// A filtered port answers nothing. A listener whose queue is full does the same: the kernel drops
// what else arrives.
func TestFilteredPort(t *testing.T) {
	m := newMachine(t)
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: name.(*syscall.SockaddrInet4).Port}
	for { // until the queue is full
		c, err := net.DialTimeout("tcp", addr.String(), 200*time.Millisecond)
		if err != nil {
			break
		}
		defer c.Close()
	}
	m.trouble("http://"+addr.String(), "no answer from "+addr.String()+" in time", 20*time.Second)
}

// With its state on a full disk berthd names the disk and ends with a code of its own.
func TestAgentDiskFull(t *testing.T) {
	m := newMachine(t)
	disk := m.smallDisk()
	cmd := m.command("berthd", "run", "--state-dir", filepath.Join(disk, "state"))
	cmd.Env = m.env("BERTH_URL=http://127.0.0.1:9", "BERTH_TOKEN=4a1e5bb4-57a7-4c1c-94ac-2b80e5b5e7a1")
	out, err := cmd.CombinedOutput()
	if err == nil || cmd.ProcessState.ExitCode() != 73 || !strings.Contains(string(out), "space") || bytes.Contains(out, []byte("goroutine ")) {
		t.Errorf("%v: %s", err, out)
	}
}

// However early it is told to stop, berthd leaves no process behind.
func TestStoppedWhileStarting(t *testing.T) {
	m := newMachine(t)
	for _, after := range []time.Duration{0, 5, 10, 20, 40, 80} {
		d := m.start("berthd", []string{"BERTH_URL=http://127.0.0.1:9", "BERTH_TOKEN=4a1e5bb4-57a7-4c1c-94ac-2b80e5b5e7a1"},
			"run", "--state-dir", filepath.Join(m.home, "state"))
		d.wait("berthd starts", 10*time.Second)
		<-time.After(after * time.Millisecond)
		d.stop(syscall.SIGTERM, 15*time.Second)
		eventually(t, 5*time.Second, "nothing is left running", func() bool { return len(m.processes()) == 0 })
	}
}

// smallDisk is a folder on a disk of its own that is full.
func (m *machine) smallDisk() string {
	m.t.Helper()
	disk := filepath.Join(m.home, "disk")
	if err := os.Mkdir(disk, 0o700); err != nil {
		m.t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size=64k"); err != nil {
		m.t.Fatalf("cannot mount a small disk (this test needs root): %v", err)
	}
	m.t.Cleanup(func() { syscall.Unmount(disk, syscall.MNT_DETACH) })
	filler, err := os.Create(filepath.Join(disk, "filler"))
	if err != nil {
		m.t.Fatal(err)
	}
	defer filler.Close()
	for err == nil {
		_, err = filler.Write(make([]byte, 4096))
	}
	return disk
}
