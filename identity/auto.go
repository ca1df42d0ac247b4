package identity

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/berthd/berth/wire"
)

// detectTimeout bounds the search for a cloud.
const detectTimeout = 1800 * time.Millisecond

// firmwareDir is where Linux shows the strings of a machine's firmware, which clouds set.
const firmwareDir = "/sys/class/dmi/id"

// firmwareMarks are the strings that only machines of a cloud have.
var firmwareMarks = []struct {
	cloud      cloud
	file, text string
}{
	{awsCloud{}, "sys_vendor", "Amazon EC2"},
	{awsCloud{}, "bios_vendor", "Amazon EC2"},
	{azureCloud{}, "chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77"},
	{googleCloud{}, "product_name", "Google Compute Engine"},
}

// AutoConfig says how a machine finds out which cloud it is in.
type AutoConfig struct {
	CloudConfig
	// Found, if set, is told once which cloud it is and how that is known.
	Found func(cloud, how string)
	// Firmware is the directory of the firmware's strings; empty means /sys/class/dmi/id.
	Firmware string
}

// Auto finds the machine's cloud by itself, at the first call, and is that cloud's source from then
// on: by the variable that moves a metadata service, by the firmware, or by asking at 169.254.169.254.
// CloudConfig.Endpoint is not used.
func Auto(config AutoConfig) Source {
	config.Endpoint = ""
	if config.Firmware == "" {
		config.Firmware = firmwareDir
	}
	if config.Found == nil {
		config.Found = func(string, string) {}
	}
	return &auto{AutoConfig: config}
}

type auto struct {
	AutoConfig
	mu    sync.Mutex
	found Source // nil until known
}

func (a *auto) String() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.found == nil {
		return "the cloud's instance identity, once it is known which cloud this is"
	}
	return a.found.String()
}

func (*auto) Renews() bool { return true }

func (a *auto) Token(ctx context.Context) (wire.Secret, error) {
	source, err := a.source(ctx)
	if err != nil {
		return "", err
	}
	return source.Token(ctx)
}

func (a *auto) check(ctx context.Context) error {
	source, err := a.source(ctx)
	if err != nil {
		return err
	}
	return Check(ctx, source)
}

func (a *auto) source(ctx context.Context) (Source, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.found != nil {
		return a.found, nil
	}
	c, how := a.detect(ctx)
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case c == nil:
		return nil, &Failure{
			Cause: "this machine is in no cloud that is known: neither its firmware nor anything at " + linkLocal + " says AWS, Azure or Google Cloud",
			Fix:   "choose --auth token and give the token in a file (--token-file) or a systemd credential; in a cloud, let " + linkLocal + " through the firewall or network policy",
		}
	}
	a.found = newCloudSource(c, a.CloudConfig)
	a.Found(c.title(), how)
	return a.found, nil
}

// detect says which cloud this is, nil if none, and how that is known.
func (a *auto) detect(ctx context.Context) (c cloud, how string) {
	ctx, cancel := context.WithTimeout(ctx, detectTimeout)
	defer cancel()
	for _, c := range clouds {
		// Whoever moves a metadata service means it to be used, if it is there.
		if endpoints, told := c.endpoints(); told != "" && answersAs(ctx, c, endpoints[0]) {
			return c, told + " says where its metadata service is"
		}
	}
	for _, mark := range firmwareMarks {
		path := filepath.Join(a.Firmware, mark.file)
		if readLine(path) == mark.text {
			return mark.cloud, fmt.Sprintf("%s says %s", path, mark.text)
		}
	}
	type answer struct {
		cloud    cloud
		endpoint string
	}
	answers := make(chan answer)
	asked := 0
	for _, c := range clouds {
		endpoints, told := c.endpoints()
		if told != "" {
			continue
		}
		for _, endpoint := range endpoints {
			asked++
			go func() {
				if !answersAs(ctx, c, endpoint) {
					answers <- answer{}
					return
				}
				answers <- answer{c, endpoint}
			}()
		}
	}
	for range asked {
		if got := <-answers; got.cloud != nil && c == nil {
			c, how = got.cloud, "its metadata service answers at "+got.endpoint
			cancel()
		}
	}
	return c, how
}

func answersAs(ctx context.Context, c cloud, endpoint string) bool {
	m := newMetadata(endpoint)
	defer m.close()
	return c.probe(ctx, m)
}

// readLine returns the one line of a small file, "" if it cannot be read.
func readLine(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	line := make([]byte, 256)
	n, err := f.Read(line)
	if err != nil && !errors.Is(err, io.EOF) {
		return ""
	}
	return strings.TrimSpace(string(line[:n]))
}
