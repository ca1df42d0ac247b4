package agent

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"testing"

	"github.com/berthd/berth/ports"
)

func TestJetBrainsProgramsAreKnownByTheirCommandLine(t *testing.T) {
	long := make([]string, 500) // as the class path of an IDE
	for i := range long {
		long[i] = fmt.Sprintf("/opt/idea/lib/library-number-%d.jar", i)
	}
	for name, tt := range map[string]struct {
		args []string
		want bool
	}{
		"IDE":      {append(long, "-Didea.vendor.name=JetBrains"), true},
		"Toolbox":  {[]string{"com.jetbrains.toolbox"}, true},
		"Gateway":  {[]string{"/opt/remote-dev-server/bin/x"}, true},
		"anything": {append(long, "-Dvendor=other"), false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command(os.Args[0], tt.args...)
			cmd.Env = append(os.Environ(), envListen+"=1")
			stdin, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { stdin.Close(); cmd.Wait() }()
			var port uint16
			if _, err := fmt.Fscan(stdout, &port); err != nil {
				t.Fatal(err)
			}
			a := &agent{log: slog.New(slog.DiscardHandler), parts: parts{ports: ports.New(ports.Config{})}}
			if got := a.jetBrains(port); got != tt.want {
				t.Errorf("jetBrains = %v, want %v", got, tt.want)
			}
		})
	}
}
