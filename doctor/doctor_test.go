package doctor

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestPrint(t *testing.T) {
	r := run(t.Context(), []probe{
		one("mtu", func(context.Context) Check { return Check{Status: Fail, Cause: "lost\x1b[2J", Fix: "find it"} }),
		one("dns", func(context.Context) Check { return Check{Status: OK, Detail: "there"} }),
		one("clock", func(context.Context) Check { return Check{Status: Warn, Cause: "late", Detail: "by a lot"} }),
	})
	var text strings.Builder
	if err := r.Print(&text); err != nil {
		t.Fatal(err)
	}
	const want = "ok    dns        there\nwarn  clock      late (by a lot)\nfail  mtu        lost [2J\n                 fix: find it\n"
	if text.String() != want {
		t.Errorf("got\n%swant\n%s", &text, want)
	}
	if bad := r.Bad(); !r.Failed() || len(bad) != 2 || bad[0].Name != "mtu" {
		t.Errorf("bad %+v", bad)
	}
}

// TestProbeThatHangs: what minds no context is left behind, and named.
func TestProbeThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began, free := time.Now(), make(chan struct{})
		r := run(t.Context(), []probe{
			one("disk", func(context.Context) Check { <-free; return Check{} }),
			one("dns", func(ctx context.Context) Check { <-ctx.Done(); return Check{Status: Skip} }),
		})
		close(free)
		if took := time.Since(began); took != total+lastMoment {
			t.Errorf("it took %v", took)
		}
		if len(r.Checks) != 2 || r.Checks[0].Name != "disk" || r.Checks[0].Status != Fail || !strings.Contains(r.Checks[0].Cause, "no answer") || r.Checks[1].Status != Skip {
			t.Errorf("%+v", r.Checks)
		}
	})
}

// TestEveryCheckHasAPlace: what is made is shown where names says.
func TestEveryCheckHasAPlace(t *testing.T) {
	var made []string
	for _, p := range append(local(Config{}), (&network{}).probes()...) {
		made = append(made, p.names...)
	}
	for _, name := range names {
		if !strings.Contains(" "+strings.Join(made, " ")+" ", " "+name+" ") {
			t.Errorf("nothing makes check %q", name)
		}
	}
	if len(made) != len(names) {
		t.Errorf("%d checks have %d places", len(made), len(names))
	}
}
