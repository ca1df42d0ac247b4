// Command mesh measures the mesh between two nodes on this machine: the speed of
// one stream each way, the round trip of one byte, and the memory of either node
// meanwhile, direct and relayed.
//
//	go run ./bench/mesh [-seconds 5] [-rounds 1] [-memory-limit BYTES]
//
// The relay and both nodes run in processes of their own, on loopback. MB/s are
// 10^6 bytes of TCP payload per second. The default run takes half a minute.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/berthd/berth/tailnet"
)

func main() {
	var err error
	if len(os.Args) == 3 && os.Args[1] == "child" {
		err = child(os.Args[2])
	} else {
		err = run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "mesh:", err)
		os.Exit(1)
	}
}

func run() error {
	seconds := flag.Float64("seconds", 5, "length of each transfer")
	rounds := flag.Int("rounds", 1, "how often to measure each path")
	limit := flag.Int64("memory-limit", tailnet.MemoryLimit, "soft memory limit of each node in bytes, 0 for none")
	only := flag.String("only", "", `measure only "direct" or "relayed"`)
	flag.Parse()

	relay, err := start("relay", settings{})
	if err != nil {
		return err
	}
	defer relay.stop()
	var at string
	if err := relay.read(&at); err != nil {
		return fmt.Errorf("cannot start the relay: %w", err)
	}
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "path\tup MB/s\tdown MB/s\tping p50 µs\tp99 µs\tCPU s/GB\tRSS server MB\tRSS client MB\t")
	for range *rounds {
		for _, path := range []string{"direct", "relayed"} {
			if *only != "" && *only != path {
				continue
			}
			s := settings{Relay: at, RelayOnly: path == "relayed", Seconds: *seconds, MemoryLimit: *limit}
			r, err := measure(s)
			if err != nil {
				return fmt.Errorf("cannot measure %s: %w", path, err)
			}
			if r.Direct != (path == "direct") {
				return fmt.Errorf("the %s path was direct=%v at the end", path, r.Direct)
			}
			fmt.Fprintf(table, "%s\t%.0f\t%.0f\t%.0f\t%.0f\t%.1f\t%.0f\t%.0f\t\n", path, r.Up, r.Down, r.P50, r.P99, r.cpu, r.serverRSS, r.clientRSS)
		}
	}
	return table.Flush()
}

// result is what one path measured.
type result struct {
	Up, Down             float64 // MB/s
	P50, P99             float64 // µs
	Direct               bool
	Bytes                int64   // moved by the transfers
	serverRSS, clientRSS float64 // MB, the most during the transfers
	cpu                  float64 // seconds of both nodes for each GB moved
}

// measure runs two nodes until the client has measured.
func measure(s settings) (result, error) {
	server, err := start("server", s)
	if err != nil {
		return result{}, err
	}
	defer server.stop()
	client, err := start("client", s)
	if err != nil {
		return result{}, err
	}
	defer client.stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer server.stop() // ends what waits for its output
	wg.Go(func() { server.introduce(client, nil) })

	stopped := make(chan struct{})
	var serverRSS, clientRSS float64
	var sampling sync.WaitGroup
	sampling.Go(func() {
		for {
			serverRSS, clientRSS = max(serverRSS, server.rss()), max(clientRSS, client.rss())
			select {
			case <-stopped:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	var r result
	err = client.introduce(server, &r)
	close(stopped)
	sampling.Wait()
	r.serverRSS, r.clientRSS = serverRSS, clientRSS
	r.cpu = (server.cpu() + client.cpu()) / (float64(r.Bytes) / 1e9)
	return r, err
}

// process is a child that speaks JSON lines.
type process struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Scanner
	once sync.Once
}

func start(role string, s settings) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &process{cmd: exec.Command(self, "child", role)}
	p.cmd.Stderr = os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = bufio.NewScanner(out)
	p.out.Buffer(nil, 1<<20)
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	return p, json.NewEncoder(p.in).Encode(s)
}

func (p *process) stop() {
	p.once.Do(func() {
		p.in.Close()
		p.cmd.Process.Kill()
		p.cmd.Wait()
	})
}

func (p *process) read(v any) error {
	if !p.out.Scan() {
		return errors.Join(p.out.Err(), io.ErrUnexpectedEOF)
	}
	return json.Unmarshal(p.out.Bytes(), v)
}

// introduce passes what a child says of itself on to the other, until it
// reports a result or ends.
func (p *process) introduce(other *process, r *result) error {
	for {
		var m message
		if err := p.read(&m); err != nil {
			return err
		}
		if m.Result != nil && r != nil {
			*r = *m.Result
			return nil
		}
		if err := json.NewEncoder(other.in).Encode(m); err != nil {
			return err
		}
	}
}

// clockTick is the unit of /proc's processor times on Linux.
const clockTick = 0.01

// cpu is the processor time that the child has used, in seconds. Unlike a speed
// it means something on a machine that is doing other work too.
func (p *process) cpu() float64 {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(stat), ") ") // the name may hold spaces
	fields := strings.Fields(rest)
	if len(fields) < 13 {
		return 0
	}
	user, _ := strconv.ParseFloat(fields[11], 64)
	system, _ := strconv.ParseFloat(fields[12], 64)
	return (user + system) * clockTick
}

// rss is the child's resident memory in MB.
func (p *process) rss() float64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(status)) {
		var kib float64
		if _, err := fmt.Sscanf(line, "VmRSS: %f kB", &kib); err == nil {
			return kib * 1024 / 1e6
		}
	}
	return 0
}
