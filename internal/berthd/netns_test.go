package berthd

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/berthd/berth/internal/netlab"
	"github.com/berthd/berth/internal/testnet"
	"github.com/berthd/berth/wire"
)

// This file tests against a metadata service at its real address, in network namespaces:
//
//	agent (namespace A) -- router (namespace R) -- cloud (namespace M)
//	10.x.1.1         10.x.1.2      10.x.2.2      10.x.2.1, 169.254.169.254
//
// berthd runs in A. In M a process serves a fake metadata service at 169.254.169.254:80, a control
// server that only trades identities, and a proxy to it. Both are this test binary again.

// envFakeCloud makes the test binary be what stands in M; its value is the cloud.
const envFakeCloud = "BERTHD_TEST_CLOUD"

const (
	labMetadata = "169.254.169.254"
	labIPv6     = "fd00:ec2::254"
	labControl  = ":8080"
	labProxy    = ":3128"
	// labHost is a name of the control server that only the proxy knows.
	labHost = "control.berth.test"
)

// fakeCloud serves what is in M until its standard input ends. A line there is a mode of the fake AWS;
// what was asked is written to standard output, a line each.
func fakeCloud(name string) error {
	var service http.Handler
	setMode := func(string) {}
	metadata := labMetadata
	switch name {
	case "aws", "aws over IPv6":
		f, err := testnet.NewFakeAWS()
		if err != nil {
			return err
		}
		if name != "aws" {
			metadata = labIPv6
		}
		service, setMode = f, func(mode string) {
			f.SetMode(map[string]testnet.FakeAWSMode{"on": testnet.AWSOn, "one hop": testnet.AWSOneHop}[mode])
		}
	case "azure":
		f, err := testnet.NewFakeAzure(testnet.AzureLeaf{})
		if err != nil {
			return err
		}
		service = f
	case "google":
		f, err := testnet.NewFakeGoogle()
		if err != nil {
			return err
		}
		service = f
	default:
		return fmt.Errorf("no cloud %q", name)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var g errgroup.Group
	for addr, h := range map[string]http.Handler{
		net.JoinHostPort(metadata, "80"): told("metadata", service),
		labControl:                       told("control", http.HandlerFunc(trade)),
		labProxy: told("proxy", &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", "127.0.0.1"+labControl
		}}),
	} {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return err
		}
		g.Go(func() error { return testnet.Serve(ctx, l, h) })
	}
	fmt.Println("ready")
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		setMode(lines.Text())
		fmt.Println("mode", lines.Text())
	}
	cancel()
	return g.Wait()
}

// told writes a line for each request before it is served.
func told(what string, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Println(what, r.Method, r.Host, r.URL.Path)
		h.ServeHTTP(w, r)
	})
}

// trade is a control server that knows no challenges, takes every proof, and no token.
func trade(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.URL.Path == wire.PathIdentityChallenge:
		answer(http.StatusNotFound, "Route not found.")(w, r)
	case strings.HasSuffix(r.URL.Path, "-instance-identity"):
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(wire.SessionToken{SessionToken: secretToken})
	default:
		answer(http.StatusServiceUnavailable, "This is only half a control server.")(w, r)
	}
}

// lab is the network of these tests.
type lab struct {
	*netlab.Lab
	t        *testing.T
	commands io.Writer
	said     chan string
}

func newLab(t *testing.T, cloud string) *lab {
	t.Helper()
	l := &lab{Lab: netlab.New(t, "bi", "a", "r", "m"), t: t, said: make(chan string, 1000)}
	l.Wire("a", "r", 1)
	l.Wire("m", "r", 2)
	l.In("m", "ip", "addr", "add", labMetadata+"/32", "dev", "lo")
	l.In("m", "ip", "addr", "add", labIPv6+"/128", "dev", "lo", "nodad")
	l.In("r", "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
	l.In("r", "ip", "route", "add", labMetadata, "via", l.Addr(2, 1))
	l.In("a", "ip", "route", "add", "default", "via", l.Addr(1, 2))
	l.In("m", "ip", "route", "add", "default", "via", l.Addr(2, 2))
	l.startCloud(cloud)
	return l
}

func (l *lab) startCloud(cloud string) {
	l.t.Helper()
	cmd := l.Command("m", os.Args[0])
	cmd.Env = append(os.Environ(), envFakeCloud+"="+cloud)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	l.commands = in
	go func() {
		defer close(l.said)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			l.said <- lines.Text()
		}
	}()
	l.t.Cleanup(func() {
		in.Close()
		for range l.said {
		}
		if err := cmd.Wait(); err != nil {
			l.t.Errorf("the cloud: %v", err)
		}
	})
	l.await("ready")
}

// await reads what the cloud says up to a line that begins like this, and returns all of it.
func (l *lab) await(prefix string) []string {
	l.t.Helper()
	var all []string
	deadline := time.After(20 * time.Second)
	for {
		select {
		case line, ok := <-l.said:
			if !ok {
				l.t.Fatalf("the cloud ended without %q: %q", prefix, all)
			}
			if all = append(all, line); strings.HasPrefix(line, prefix) {
				return all
			}
		case <-deadline:
			l.t.Fatalf("the cloud did not say %q: %q", prefix, all)
		}
	}
}

func (l *lab) mode(mode string) {
	l.t.Helper()
	fmt.Fprintln(l.commands, mode)
	l.await("mode " + mode)
}

// control is the control server's URL as the agent reaches it directly.
func (l *lab) control() string { return "http://" + l.Addr(2, 1) + labControl }

// berthd starts one in A.
func (l *lab) berthd(env []string, args ...string) *daemon {
	l.t.Helper()
	return l.berthdIn("a", env, args...)
}

// berthdIn starts one that sees nothing of this machine's firmware.
func (l *lab) berthdIn(ns string, env []string, args ...string) *daemon {
	l.t.Helper()
	const hide = `mount -t tmpfs none /sys/class/dmi/id 2>/dev/null; exec "$@"`
	return launch(l.t, l.Command(ns, append([]string{"sh", "-c", hide, "sh", os.Args[0]}, args...)...), env)
}

// TestHopLimitOverRouter: a response for one hop ends at the router. The message names the cause and
// the fix, and with the fix in place the same berthd goes on by itself.
func TestHopLimitOverRouter(t *testing.T) {
	l := newLab(t, "aws")
	l.mode("one hop")
	d := l.berthd([]string{"BERTH_URL=" + l.control()}, "--auth", "aws-instance-identity")
	line := d.says("level=WARN", "hop limit of 1", "aws ec2 modify-instance-metadata-options --instance-id <id> --http-put-response-hop-limit 2")
	t.Log(line)
	l.mode("on")
	l.await("control POST " + l.Addr(2, 1) + labControl + " /api/v2/workspaceagents/aws-instance-identity")
}

// TestAutoAtTheRealAddress: each cloud is found where it really is, in less than two seconds.
func TestAutoAtTheRealAddress(t *testing.T) {
	for cloud, title := range map[string]string{"aws": "AWS", "azure": "Azure", "google": `"Google Cloud"`} {
		t.Run(cloud, func(t *testing.T) {
			l := newLab(t, cloud)
			d := l.berthd([]string{"BERTH_URL=" + l.control(), "BERTH_TOKEN="}, "--auth", "auto")
			d.says("cloud="+title, "because", "its metadata service answers at http://"+labMetadata)
			l.await("control POST " + l.Addr(2, 1) + labControl + " /api/v2/workspaceagents/" + cloud + "-instance-identity")
		})
	}
}

// TestAWSOverIPv6: where nothing answers at the IPv4 address, the one of IPv6 is used.
func TestAWSOverIPv6(t *testing.T) {
	l := newLab(t, "aws over IPv6")
	for _, auth := range []string{"aws-instance-identity", "auto"} {
		l.berthdIn("m", []string{"BERTH_URL=http://127.0.0.1" + labControl, "BERTH_TOKEN="}, "--auth", auth)
		l.await("metadata PUT [" + labIPv6 + "] /latest/api/token")
		l.await("control POST 127.0.0.1" + labControl + " /api/v2/workspaceagents/aws-instance-identity")
	}
}

// TestProxyVariables: a proxy is for the control server only. Where it is dead the server is not
// reached; where it lives, everything for the server goes through it and nothing for the cloud.
func TestProxyVariables(t *testing.T) {
	for _, cloud := range []string{"aws", "azure", "google"} {
		t.Run(cloud, func(t *testing.T) {
			l := newLab(t, cloud)
			proxies := func(url string) []string {
				var env []string
				for _, name := range []string{"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"} {
					env = append(env, name+"="+url, strings.ToLower(name)+"="+url)
				}
				return env
			}
			dead := "http://" + l.Addr(2, 1) + ":9"
			d := l.berthd(append(proxies(dead), "BERTH_URL="+l.control()), "--auth", cloud+"-instance-identity")
			d.says("level=WARN", "the proxy in front of the server is not reached", "nothing listens at "+l.Addr(2, 1)+":9")

			// The server is exempt: with the dead proxy for everything else, the machine proves itself.
			l.berthd(append(proxies(dead), "NO_PROXY="+l.Addr(2, 1), "BERTH_URL="+l.control()), "--auth", cloud+"-instance-identity")
			l.await("control POST " + l.Addr(2, 1) + labControl + " /api/v2/workspaceagents/" + cloud + "-instance-identity")

			l.berthd(append(proxies("http://"+l.Addr(2, 1)+labProxy), "BERTH_URL=http://"+labHost), "--auth", cloud+"-instance-identity")
			asked := l.await("proxy POST " + labHost + " /api/v2/workspaceagents/" + cloud + "-instance-identity")
			metadata := 0
			for _, line := range asked {
				if strings.HasPrefix(line, "metadata ") {
					metadata++
				}
				if strings.HasPrefix(line, "proxy ") && !strings.Contains(line, labHost) {
					t.Errorf("the proxy carried %q", line)
				}
			}
			if metadata == 0 {
				t.Errorf("the metadata service was not asked: %q", asked)
			}
		})
	}
}
