package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// reportingProgram reports the status of an app five times a second for as many seconds as it is told, as programs
// may: over the socket, a few of them by curl and by berthd report. It notes what was accepted; its last word is another state.
const reportingProgram = `
use strict; use warnings;
use IO::Socket::UNIX; use Time::HiRes qw(time sleep);
my ($app, $lasting) = @ARGV;
my ($began, $n) = (time, 0);
open(my $accepted, '>', "accepted-$app") or die $!;
$accepted->autoflush(1);
sub report {
	my ($state, $message) = @_;
	if ($app % 10 == 9) {
		return 0 == system("berthd report --app app-$app --state $state --message $message 2>/dev/null");
	}
	my $body = qq({"app_slug":"app-$app","state":"$state","message":"$message"});
	if ($app % 10 == 8) {
		my $url = 'http://berthd/v1/app-status';
		return 0 == system("curl -sf -m 10 -o /dev/null --unix-socket \$BERTH_SOCKET -d '$body' $url");
	}
	my $socket = IO::Socket::UNIX->new(Peer => $ENV{BERTH_SOCKET}) or return 0;
	local $SIG{PIPE} = 'IGNORE';
	printf $socket "POST /v1/app-status HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s", length $body, $body;
	my $answer = <$socket>;
	return defined $answer && $answer =~ m{^HTTP/1\.\d 202};
}
while (time < $began + $lasting) {
	$n++;
	print $accepted "working $n\n" if report('working', $n);
	my $rest = $began + $n / 5 - time;
	sleep $rest if $rest > 0;
}
sleep 0.1 until report('complete', $n);
print $accepted "complete $n\n";
`

// TestLastStatusArrives: twenty programs report a hundred statuses a second, in every way there is. The
// server is gone from a third of the time on, and berthd is killed in the middle of that and when all have said
// their last. What each was last told to be accepted arrives.
func TestLastStatusArrives(t *testing.T) {
	const programs = 20
	lasting := 3 * time.Second
	if os.Getenv("BERTH_LONG") != "" {
		lasting = time.Minute
	}
	var config strings.Builder
	config.WriteString("agents:\n  - name: box\n    apps:\n")
	for i := range programs {
		fmt.Fprintf(&config, "      - {slug: app-%d, url: \"http://127.0.0.1:1\"}\n", i)
	}
	r := newRoad(t, config.String())
	r.run()
	r.waitConnected(20 * time.Second)
	watch := r.pipe("status", "box", "--watch", "--output", "json")
	waitFor(t, watch, `"name":"app-0"`)
	socket := filepath.Join(r.home, "state", "berthd.sock")

	program := r.home + "/program"
	if err := os.WriteFile(program, []byte(reportingProgram), 0o600); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	var running []*daemon
	for i := range programs {
		running = append(running, r.start("perl", []string{"BERTH_SOCKET=" + socket}, program, fmt.Sprint(i), fmt.Sprint(int(lasting.Seconds()))))
	}
	after := func(part time.Duration) { time.Sleep(time.Until(began.Add(lasting * part / 3))) }
	after(1)
	r.server.stop(syscall.SIGKILL, 20*time.Second)
	after(2)
	again := func() {
		r.agent.stop(syscall.SIGKILL, 20*time.Second)
		r.run()
	}
	again()
	for _, p := range running {
		select {
		case <-p.done:
		case <-time.After(lasting + time.Minute):
			t.Fatalf("a program goes on and on:\n%s", p.output())
		}
	}
	took := time.Since(began)
	again()
	r.serve()

	want, reports := map[string]string{}, 0
	for i := range programs {
		text, err := os.ReadFile(filepath.Join(r.home, fmt.Sprintf("accepted-%d", i)))
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		reports += len(lines)
		want[fmt.Sprintf("app-%d", i)] = lines[len(lines)-1]
	}
	t.Logf("%d reports were accepted in %v", reports, took.Round(time.Millisecond))
	var late map[string]string
	eventually(t, 60*time.Second, "the last status of each program arrives", func() bool {
		var status struct {
			Apps []struct {
				Slug     string
				Statuses []struct{ State, Message string }
			}
		}
		if out, err := r.client("status", "box", "--output", "json").Output(); err != nil || json.Unmarshal(out, &status) != nil {
			return false
		}
		late = map[string]string{}
		for _, app := range status.Apps {
			got := "nothing"
			if len(app.Statuses) > 0 {
				got = app.Statuses[0].State + " " + app.Statuses[0].Message
			}
			if got != want[app.Slug] {
				late[app.Slug] = got + ", want " + want[app.Slug]
			}
		}
		return len(status.Apps) == programs && len(late) == 0
	})
	// Who watches saw it too, though the server went away.
	waitFor(t, watch, `"name":"app-0","state":"complete"`)
	if history := r.berth("status", "box", "--app", "app-0"); !strings.Contains(history, "complete") {
		t.Errorf("the history of an app:\n%s", history)
	}
}
