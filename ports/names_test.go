package ports

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/berthd/berth/wire"
)

func TestContainerOf(t *testing.T) {
	one, two := strings.Repeat("1a", 32), strings.Repeat("2b", 32)
	for group, want := range map[string]string{
		"12:memory:/docker/" + one + "\n0::/\n":                                         one,
		"0::/system.slice/docker-" + one + ".scope\n":                                   one,
		"0::/machine.slice/libpod-" + one + ".scope/container\n":                        one,
		"0::/libpod_parent/libpod-" + one + "\n":                                        one,
		"0::/kubepods.slice/kubepods-pod7.slice/cri-containerd-" + one + ".scope\n":     one,
		"0::/kubepods/besteffort/pod1/" + one + "\n":                                    one,
		"0::/system.slice/containerd.service/kubepods-pod1.slice:cri-containerd:" + one: one,
		"0::/../" + one + "\n":                                                          one,
		"0::/docker/" + one + "/docker/" + two + "\n":                                   two, // an engine in a container
		"0::/docker/" + one + "/" + two + "\n":                                          two,
		"0::/user.slice/user-0.slice/session-1.scope\n":                                 "",
		"0::/docker/" + one + "0\n":                                                     "", // too long
		"0::/docker/" + one[1:] + "\n":                                                  "",
		"0::/docker/" + strings.ToUpper(one) + "\n":                                     "",
		"0::/x" + one + "\n":                                                            "",
		"":                                                                              "",
	} {
		if got := containerOf([]byte(group)); got != want {
			t.Errorf("%q: %q, want %q", group, got, want)
		}
	}
}

func FuzzContainerOf(f *testing.F) {
	f.Add([]byte("0::/docker/" + strings.Repeat("0f", 32) + "\n"))
	f.Add([]byte("1:cpu:/\n0::/system.slice/docker-" + strings.Repeat("a", 64) + ".scope"))
	f.Fuzz(func(t *testing.T, group []byte) {
		if id := containerOf(group); id != "" && (len(id) != 64 || strings.Trim(id, "0123456789abcdef") != "") {
			t.Errorf("%q", id)
		}
	})
}

// Names stay while it is not known how containers are called.
func TestNamesStay(t *testing.T) {
	web := wire.Container{ID: strings.Repeat("1a", 32), Name: "web"}
	known := true
	l := New(Config{Containers: func() ([]wire.Container, bool) {
		if !known {
			return nil, false
		}
		return []wire.Container{web}, true
	}})
	if !l.learn() || l.names.of(web.ID) != "web" {
		t.Errorf("it is called %q", l.names.of(web.ID))
	}
	known = false
	if l.learn() || l.names.of(web.ID) != "web" {
		t.Errorf("it is called %q once that is not known", l.names.of(web.ID))
	}
}

func TestNames(t *testing.T) {
	web := wire.Container{ID: strings.Repeat("1a", 32), Name: "web", Running: true, Ports: []wire.ContainerPort{{Port: 80, Network: "tcp", HostPort: 8080}, {Port: 81, Network: "tcp"}}}
	local := wire.Container{ID: strings.Repeat("3c", 32), Name: "local", Running: true, Ports: []wire.ContainerPort{{Port: 80, Network: "tcp", HostIP: "127.0.0.1", HostPort: 7070}}}
	gone := wire.Container{ID: strings.Repeat("2b", 32), Name: "gone", Ports: []wire.ContainerPort{{Port: 80, Network: "udp", HostPort: 9090}}}
	var n names
	if got := n.of(web.ID); got != "1a1a1a1a1a1a" {
		t.Errorf("an unknown one is called %q", got)
	}
	if !n.learn([]wire.Container{web, gone, local}) || n.learn([]wire.Container{web, gone, local}) {
		t.Error("what is new is not told from what is not")
	}
	if got := n.of(web.ID); got != "web" {
		t.Errorf("got %q", got)
	}
	for at, want := range map[string]string{
		"tcp 0.0.0.0:8080": "web", "tcp [::]:8080": "web", "udp 0.0.0.0:8080": "", "tcp 0.0.0.0:80": "", "tcp 0.0.0.0:81": "", "udp 0.0.0.0:9090": "",
		"tcp 127.0.0.1:7070": "local",
		// Another program's, on an address that is not published.
		"tcp 127.0.0.2:7070": "", "tcp 0.0.0.0:7070": "", "tcp 127.0.0.1:8080": "",
	} {
		network, address, _ := strings.Cut(at, " ")
		s := socket{network: network, local: netip.MustParseAddrPort(address)}
		if got := n.publishes(s); got != want {
			t.Errorf("%s leads to %q, want %q", at, got, want)
		}
	}
	web.Name = "renamed"
	if !n.learn([]wire.Container{web}) || n.of(web.ID) != "renamed" {
		t.Errorf("got %q", n.of(web.ID))
	}
	web.Ports = []wire.ContainerPort{{Port: 80, Network: "tcp", HostPort: 8081}}
	if !n.learn([]wire.Container{web}) {
		t.Error("another port is not seen")
	}
}
