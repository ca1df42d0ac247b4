package berthd

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"strconv"

	"github.com/berthd/berth/usage"
)

const statHelp = `berthd stat: how much of the processor, memory and disk is used.

  berthd stat                                 all of it, a line each
  berthd stat cpu [--host]                    processor time, in cores
  berthd stat mem [--host] [--prefix Gi]      memory
  berthd stat disk [--path /] [--prefix Gi]   the file system that holds a path

Inside a container with limits the figures are the container's own; --host asks for the machine's. --prefix is Ki,
Mi, Gi or Ti, and --output json gives bytes and cores as numbers. It asks no server: use it in the
scripts of metadata.
`

// amount is how much of something is used.
type amount struct {
	// Total is nil where nothing limits it.
	Total *float64 `json:"total"`
	Unit  string   `json:"unit"`
	Used  float64  `json:"used"`
}

// prefixes are the binary prefixes by name.
var prefixes = map[string]float64{"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}

// text shows a usage as used[/total] unit[ (NN%)].
func (a amount) text(prefix string) string {
	number := func(v float64) string { return strconv.FormatFloat(math.Round(v/prefixes[prefix]*10)/10, 'f', -1, 64) }
	out := number(a.Used)
	if a.Total != nil {
		out += "/" + number(*a.Total)
	}
	out += " " + prefix + a.Unit
	if a.Total != nil && *a.Total > 0 {
		out += fmt.Sprintf(" (%.0f%%)", a.Used / *a.Total * 100)
	}
	return out
}

// stat is the verb that shows what is used. It is local.
func (p process) stat(ctx context.Context) error {
	what, args := "", p.args
	if len(args) > 0 && args[0][:min(1, len(args[0]))] != "-" {
		what, args = args[0], args[1:]
	}
	var host bool
	var prefix, path, output string
	fs := flag.NewFlagSet("berthd stat", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&output, "output", "text", "")
	switch what {
	case "":
	case "cpu":
		fs.BoolVar(&host, "host", false, "")
	case "mem":
		fs.BoolVar(&host, "host", false, "")
		fs.StringVar(&prefix, "prefix", "Gi", "")
	case "disk":
		fs.StringVar(&path, "path", "/", "")
		fs.StringVar(&prefix, "prefix", "Gi", "")
	default:
		return usagef("stat knows no %q: see berthd stat --help", what)
	}
	err := fs.Parse(args)
	_, known := prefixes[prefix]
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(p.stdout, statHelp)
		return err
	case err != nil:
		return usagef("%w: see berthd stat --help", err)
	case fs.NArg() > 0:
		return usagef("%q is no flag: see berthd stat --help", fs.Arg(0))
	case !known:
		return usagef("--prefix %q is none of Ki, Mi, Gi and Ti", prefix)
	case output != "text" && output != "json":
		return usagef("--output %q is neither text nor json", output)
	}
	if what == "" {
		return p.statAll(ctx, output)
	}
	used, err := measure(ctx, what, host, path)
	if err != nil {
		return err
	}
	if output == "json" {
		return p.showJSON(used)
	}
	fmt.Fprintln(p.stdout, used.text(prefix))
	return nil
}

// measure tells how much of one thing is used.
func measure(ctx context.Context, what string, host bool, path string) (amount, error) {
	if what == "cpu" {
		cores := usage.CPU
		if host {
			cores = usage.HostCPU
		}
		used, err := cores(ctx)
		return amount{Used: used.Used, Total: &used.Total, Unit: "cores"}, err
	}
	ask := usage.Memory
	switch {
	case what == "disk":
		ask = func() (usage.Amount, error) { return usage.Volume(path) }
	case host:
		ask = usage.HostMemory
	}
	bytes, err := ask()
	total := float64(bytes.Total)
	return amount{Used: float64(bytes.Used), Total: &total, Unit: "B"}, err
}

// statAll shows each thing, the container's and the machine's.
func (p process) statAll(ctx context.Context, output string) error {
	home := p.env["HOME"]
	if home == "" {
		home = "/"
	}
	rows := []struct {
		key, label, what string
		host             bool
		prefix           string
	}{
		{"host_cpu", "host processor", "cpu", true, ""},
		{"host_memory", "host memory", "mem", true, "Gi"},
		{"home_disk", "home disk", "disk", false, "Gi"},
		{"container_cpu", "own processor", "cpu", false, ""},
		{"container_memory", "own memory", "mem", false, "Gi"},
	}
	all := map[string]amount{}
	for _, row := range rows {
		used, err := measure(ctx, row.what, row.host, home)
		if err != nil {
			return err
		}
		if all[row.key] = used; output == "text" {
			fmt.Fprintf(p.stdout, "%-20s %s\n", row.label, used.text(row.prefix))
		}
	}
	if output == "json" {
		return p.showJSON(all)
	}
	return nil
}

func (p process) showJSON(v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("cannot show this as JSON: %w", err)
	}
	fmt.Fprintf(p.stdout, "%s\n", body)
	return nil
}
