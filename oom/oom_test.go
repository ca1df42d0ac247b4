package oom

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
)

// ordinary is what the process under test is started with: whoever may do no more can still go down to 0 from it.
const ordinary = 300

// envSelf makes the test binary be a process that protects itself.
const envSelf = "OOM_TEST_SELF"

func TestMain(m *testing.M) {
	if os.Getenv(envSelf) != "" {
		if err := protects(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func value(pid any) (int, error) {
	text, err := os.ReadFile(filepath.Join("/proc", fmt.Sprint(pid), "oom_score_adj"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}

// protects is what the process under test does: it tells what is not as it should be.
func protects() error {
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte(strconv.Itoa(ordinary)), 0); err != nil {
		return err
	}
	if err := Protect(); err != nil {
		return err
	}
	protected, err := value("self")
	if err != nil || protected > 0 {
		return fmt.Errorf("protected by %d, %v", protected, err)
	}
	if err := Protect(); err != nil {
		return fmt.Errorf("a second time: %w", err)
	}
	// Many at once, each with a child of its own, which it starts as soon as it can.
	var wg sync.WaitGroup
	failed := make(chan error, 64)
	for range cap(failed) {
		wg.Go(func() { failed <- child() })
	}
	wg.Wait()
	for range cap(failed) {
		if err := <-failed; err != nil {
			return err
		}
	}
	if now, err := value("self"); err != nil || now != protected {
		return fmt.Errorf("protected by %d afterwards, %v", now, err)
	}
	if err := Start(exec.Command("/nowhere")); err == nil {
		return fmt.Errorf("what is not there was started")
	}
	if now, err := value("self"); err != nil || now != protected {
		return fmt.Errorf("protected by %d after a failure, %v", now, err)
	}
	return Exec(func() error {
		if now, err := value("self"); err != nil || now != ordinary {
			return fmt.Errorf("what takes the place of the process gets %d, %v", now, err)
		}
		return nil
	})
}

// child starts a shell and its child, which say what they have.
func child() error {
	var out strings.Builder
	cmd := exec.Command("/bin/sh", "-c", "(cat /proc/self/oom_score_adj); read n </proc/self/oom_score_adj; echo $n")
	cmd.Stdout = &out
	if err := Start(cmd); err != nil {
		return err
	}
	if err := cmd.Wait(); err != nil {
		return err
	}
	if got, want := out.String(), fmt.Sprintf("%[1]d\n%[1]d\n", ordinary); got != want {
		return fmt.Errorf("a program and its child have %q, want %q", got, want)
	}
	return nil
}

func TestProtect(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), envSelf+"=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// TestOrdinary: a process that does not protect itself starts programs as it always did.
func TestOrdinary(t *testing.T) {
	before, err := value("self")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("cat", "/proc/self/oom_score_adj")
	var out strings.Builder
	cmd.Stdout = &out
	if err := Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil || strings.TrimSpace(out.String()) != fmt.Sprint(before) {
		t.Errorf("%q, %v; this process has %d", &out, err, before)
	}
}

// BenchmarkExpose is what Start adds to a start.
func BenchmarkExpose(b *testing.B) {
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte(strconv.Itoa(ordinary)), 0); err != nil {
		b.Fatal(err)
	}
	if err := Protect(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		expose()()
	}
}
