package berthd

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/berthd/berth/internal/enginelab"
	"github.com/berthd/berth/ptyhost"
)

// box is an engine with a container to enter.
type box struct {
	*enginelab.Engine
	t    *testing.T
	host string // where it is entered
	id   string
	name string
}

// boxes runs a test on each kind of engine, which has nothing else to do.
func boxes(t *testing.T, test func(t *testing.T, b box)) {
	for _, kind := range enginelab.Kinds {
		t.Run(kind, func(t *testing.T) {
			e, err := enginelab.Start(kind)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := e.Stop(); err != nil {
					t.Error(err)
				}
			})
			spec := enginelab.Spec("box", "sleep", "1000")
			spec.Config.Env = []string{"OWN=1"}
			id, err := e.Run(spec)
			if err != nil {
				t.Fatal(err)
			}
			test(t, box{Engine: e, t: t, host: e.Host, id: id, name: "box"})
		})
	}
}

// command is the verb in a process of its own.
func (b box) command(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], append([]string{"container-exec", "--engine", b.host, "--container", b.id}, args...)...)
	cmd.Env = []string{envSelf + "=1", "GREETING=hi", "AGENT_TOKEN=" + secretToken, "TERM=vt220"}
	return cmd
}

type ended struct {
	Out, Err string
	Code     int
}

func finish(t *testing.T, cmd *exec.Cmd, stdin string) ended {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return ended{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
}

func TestContainerExec(t *testing.T) { boxes(t, testContainerExec) }

func testContainerExec(t *testing.T, b box) {
	for name, tt := range map[string]struct {
		args  []string
		stdin string
		want  ended
	}{
		"streams apart":   {args: []string{"--", "echo out; echo err >&2; exit 3"}, want: ended{"out\n", "err\n", 3}},
		"input and end":   {args: []string{"--", "cat; echo end"}, stdin: "typed\n", want: ended{Out: "typed\nend\n"}},
		"shell on stdin":  {stdin: "echo $0; exit 4\n", want: ended{Out: "/bin/sh\n", Code: 4}},
		"large output":    {args: []string{"--", "head -c 3000000 /dev/zero | tr '\\000' x; head -c 70000 /dev/zero | tr '\\000' e >&2"}, want: ended{strings.Repeat("x", 3000000), strings.Repeat("e", 70000), 0}},
		"its user":        {args: []string{"--user", "dev", "--", "id -un; echo $SHELL $HOME $USER"}, want: ended{Out: "dev\n/bin/ash /home/dev dev\n"}},
		"its environment": {args: []string{"--env", "GREETING,TERM,NONE", "--", "echo $OWN $GREETING ${TERM} ${AGENT_TOKEN-none} ${NONE-none}"}, want: ended{Out: "1 hi vt220 none none\n"}},
		"not found there": {args: []string{"--", "nosuchprogram"}, want: ended{Err: "/bin/sh: nosuchprogram: not found\n", Code: 127}},
		"a signal's end":  {args: []string{"--", "kill -9 $$"}, want: ended{Code: 137}},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, finish(t, b.command(tt.args...), tt.stdin)); diff != "" {
				t.Error(diff)
			}
		})
	}
	t.Run("signals", func(t *testing.T) { testContainerSignals(t, b) })
	t.Run("no reader", func(t *testing.T) { testContainerNoReader(t, b) })
	t.Run("short", func(t *testing.T) { testContainerShort(t, b) })
	t.Run("terminal", func(t *testing.T) { testContainerTerminal(t, b) })
	t.Run("terminal goes", func(t *testing.T) { testContainerTerminalGoes(t, b) })
	t.Run("cannot", func(t *testing.T) { testContainerCannot(t, b) })
}

func testContainerSignals(t *testing.T, b box) {
	cmd := b.command("--", "trap 'echo told; exit 7' TERM; echo ready; while :; do sleep 0.05; done")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := waitFor(out, "ready\n"); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	rest, _ := io.ReadAll(out)
	cmd.Wait()
	if string(rest) != "told\n" || cmd.ProcessState.ExitCode() != 7 {
		t.Errorf("said %q, exit code %d", rest, cmd.ProcessState.ExitCode())
	}
}

// testContainerNoReader: what nobody reads ends the writer, as a broken pipe would.
func testContainerNoReader(t *testing.T, b box) {
	cmd := b.command("--", "yes 424242")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := waitFor(out, "424242"); err != nil {
		t.Fatal(err)
	}
	out.Close()
	cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 128+int(syscall.SIGPIPE) {
		t.Errorf("exit code %d", code)
	}
	eventually(t, "the writer is gone", func() bool { return !runs("yes\x00424242") })
}

// waitFor reads until what came ends with text.
func waitFor(r io.Reader, text string) error {
	var got []byte
	for b := make([]byte, 1); !strings.HasSuffix(string(got), text); {
		if _, err := r.Read(b); err != nil {
			return err
		}
		got = append(got, b[0])
	}
	return nil
}

// runs reports whether a process of this machine has these arguments, separated by zeros.
func runs(args string) bool {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range files {
		if line, err := os.ReadFile(file); err == nil && strings.Contains(string(line), args) {
			return true
		}
	}
	return false
}

// attach runs the verb in a terminal host, as the agent does.
func (b box) attach(host *ptyhost.Client, args ...string) *viewer {
	b.t.Helper()
	cmd := b.command(args...)
	att, err := host.Attach(b.t.Context(), ptyhost.AttachRequest{
		ID: "", Raw: true, Size: ptyhost.Size{Rows: 33, Cols: 77},
		Create: &ptyhost.CreateRequest{Argv: cmd.Args, Env: cmd.Env, KillOnDetach: true},
	})
	if err != nil {
		b.t.Fatal(err)
	}
	v := &viewer{Attachment: att}
	v.done.Go(func() { io.Copy(v, att) })
	b.t.Cleanup(func() { att.Close(); v.done.Wait() })
	return v
}

// viewer keeps what a terminal shows.
type viewer struct {
	*ptyhost.Attachment
	done sync.WaitGroup
	mu   sync.Mutex
	seen bytes.Buffer
}

func (v *viewer) Write(b []byte) (int, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.seen.Write(b)
}

func (v *viewer) saw(text string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return strings.Contains(v.seen.String(), text)
}

func (v *viewer) types(t *testing.T, text string) {
	t.Helper()
	if _, err := io.WriteString(v.Attachment, text); err != nil {
		t.Fatal(err)
	}
}

func (v *viewer) all() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.seen.String()
}

func terminalHost(t *testing.T) *ptyhost.Client {
	t.Helper()
	socket := filepath.Join(shortTempDir(t), "pty")
	l, err := ptyhost.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- ptyhost.NewHost(ptyhost.HostConfig{}).Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return ptyhost.Dial(socket)
}

// testContainerShort: a command that is over before anybody could size its terminal ends as it should, with what it said.
func testContainerShort(t *testing.T, b box) {
	began := time.Now()
	v := b.attach(terminalHost(t), "--", "echo short; exit 5")
	v.done.Wait()
	if status, err := v.Wait(); err != nil || status.Code != 5 || !v.saw("short\r\n") {
		t.Errorf("ended with %+v, %v; saw %q", status, err, v.all())
	}
	t.Logf("took %v", time.Since(began))
}

func testContainerTerminal(t *testing.T, b box) {
	v := b.attach(terminalHost(t), "--env", "TERM")
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the terminal showed %q", v.all())
		}
	})
	v.types(t, "stty size; tty; echo on $TERM\n")
	eventually(t, "the first size", func() bool { return v.saw("33 77\r\n/dev/pts/") && v.saw("on vt220\r\n") })
	// The container's own terminal takes the interrupt, not the verb. The shell forgets what is typed before the command runs.
	v.types(t, "sleep 1234; echo interrupted=$?\n")
	eventually(t, "it sleeps", func() bool { return runs("sleep\x001234") })
	v.types(t, "\x03")
	eventually(t, "it was interrupted", func() bool { return !runs("sleep\x001234") })
	if err := v.Resize(ptyhost.Size{Rows: 21, Cols: 55}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the size changed", func() bool {
		v.types(t, "stty size\n")
		return v.saw("21 55\r\n")
	})
	v.types(t, "exit 9\n")
	v.done.Wait()
	if status, err := v.Wait(); err != nil || status.Code != 9 {
		t.Errorf("ended with %+v, %v; saw %q", status, err, v.seen.String())
	}
}

// testContainerTerminalGoes: who leaves for good leaves nothing behind, whether what ran minds a hang-up or not.
func testContainerTerminalGoes(t *testing.T, b box) {
	host := terminalHost(t)
	for _, line := range []string{"exec sleep 987654", "trap '' HUP; exec sleep 987655"} {
		v := b.attach(host, "--", "echo up; "+line)
		sleeping := "sleep\x00" + line[len(line)-6:]
		eventually(t, "it runs", func() bool { return v.saw("up") && runs(sleeping) })
		v.Close()
		eventually(t, "it is gone: "+line, func() bool { return !runs(sleeping) })
	}
}

func testContainerCannot(t *testing.T, b box) {
	spec := enginelab.Spec("shellless", "sleep", "1000")
	spec.Config.Image = enginelab.ShelllessImage
	shellless, err := b.Run(spec)
	if err != nil {
		t.Fatal(err)
	}
	stopped, err := b.Create(enginelab.Spec("stopped", "true"))
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		engine, container string
		args              []string
		want              string
	}{
		"no shell":     {container: shellless, want: "has no shell that can be run"},
		"no user":      {container: b.id, args: []string{"--user", "nobodyhere"}, want: `a user "nobodyhere"`},
		"stopped":      {container: stopped, want: `cannot run in container "stopped": it is not running`},
		"none":         {container: strings.Repeat("0", 64), want: "no such container"},
		"no id":        {container: "../../images/json", want: "berthd never does"},
		"no engine":    {engine: "unix:///no/such", container: b.id, want: "nothing listens there"},
		"no arguments": {engine: " ", container: "", want: "berthd starts this verb by itself"},
	} {
		t.Run(name, func(t *testing.T) {
			tb := b
			tb.id = tt.container
			if tt.engine != "" {
				tb.host = tt.engine
			}
			got := finish(t, tb.command(tt.args...), "")
			want := 229
			if tt.container == "" {
				want = ExitUsage
			}
			if got.Code != want || !strings.Contains(strings.ReplaceAll(got.Err, "no user", "a user"), tt.want) {
				t.Errorf("got %+v, want %d and %q", got, want, tt.want)
			}
		})
	}
}

// eventually waits for what other processes do.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); !ok(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}
