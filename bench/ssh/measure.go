package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/berthd/berth/bench/lab"
)

// each measures every way in turn, round by round, and prints a row for each beside the peer's.
func each(s *settings, what, unit string, out io.Writer, measure func(way) (float64, error)) error {
	series := make([]*lab.Series, len(ways))
	for i, way := range ways {
		series[i] = &lab.Series{Name: way.name}
	}
	for range s.Rounds {
		for i, way := range ways {
			v, err := measure(way)
			if err != nil {
				return fmt.Errorf("%s: %w", way.name, err)
			}
			series[i].Add(v)
		}
	}
	for _, one := range series {
		lab.Row(out, what, one, unit, series[0])
	}
	return nil
}

// execs runs true on connections that are open.
func execs(w *world, s *settings, out io.Writer) error {
	command := func(to way, args ...string) *exec.Cmd {
		return w.command("ssh", append([]string{"-F", w.config(), "-S", filepath.Join(w.Dir, "mux-"+to.host)}, args...)...)
	}
	for _, to := range ways {
		master := command(to, "-M", "-N", to.host)
		if err := master.Start(); err != nil {
			return err
		}
		defer master.Wait()
		defer master.Process.Kill()
		if err := w.Poll("the connection of "+to.name, func() error { return w.finish(command(to, "-O", "check", to.host), nil, nil) }); err != nil {
			return err
		}
	}
	return each(s, "exec of true on an open connection", "ms", out, func(to way) (float64, error) {
		var took lab.Series
		for range s.execs {
			begun := time.Now()
			if err := w.finish(command(to, to.host, "true"), nil, nil); err != nil {
				return 0, err
			}
			took.Add(lab.Milliseconds(time.Since(begun)))
		}
		return took.Median(), nil
	})
}

// opens connects for each command.
func opens(w *world, s *settings, out io.Writer) error {
	return each(s, "ssh HOST true", "ms", out, func(to way) (float64, error) {
		begun := time.Now()
		err := w.finish(w.ssh(to, "true"), nil, nil)
		return lab.Milliseconds(time.Since(begun)), err
	})
}

// parallel connects many times at once.
func parallel(w *world, s *settings, out io.Writer) error {
	return each(s, fmt.Sprintf("%d times ssh HOST true at once", s.at), "ms", out, func(to way) (float64, error) {
		errs := make([]error, s.at)
		var all sync.WaitGroup
		begun := time.Now()
		for i := range errs {
			all.Go(func() { errs[i] = w.finish(w.ssh(to, "true"), nil, nil) })
		}
		all.Wait()
		return lab.Milliseconds(time.Since(begun)), errors.Join(errs...)
	})
}

// speed is how fast bytes went since begun, in MB/s.
func speed(size int, begun time.Time) float64 {
	return float64(size) / 1e6 / time.Since(begun).Seconds()
}

// bulk carries bytes each way, and beside it a plain stream over the same mesh.
func bulk(w *world, s *settings, out io.Writer) error {
	for _, one := range []struct{ direction, there string }{{"down", fmt.Sprintf("head -c %d /dev/zero", s.size)}, {"up", "cat >/dev/null"}} {
		stream := &lab.Series{Name: "a plain stream over the mesh"}
		err := each(s, "bulk "+one.direction, "MB/s", out, func(to way) (float64, error) {
			if to.host == "mesh" { // beside it in each round
				mb, err := w.stream(one.direction)
				if err != nil {
					return 0, err
				}
				stream.Add(mb)
			}
			zeros, err := os.Open("/dev/zero")
			if err != nil {
				return 0, err
			}
			defer zeros.Close()
			begun := time.Now()
			if one.direction == "up" {
				err = w.finish(w.ssh(to, one.there), io.LimitReader(zeros, int64(s.size)), nil)
			} else {
				err = w.finish(w.ssh(to, one.there), nil, nil)
			}
			return speed(s.size, begun), err
		})
		if err != nil {
			return err
		}
		lab.Row(out, "bulk "+one.direction, stream, "MB/s", nil)
	}
	return nil
}

// stream measures a plain stream over the mesh, in MB/s.
func (w *world) stream(direction string) (float64, error) {
	var out bytes.Buffer
	if err := w.finish(w.command(filepath.Join(w.Bin, "berth"), "speedtest", "bench", "--direction", direction, "--time", "2s", "--output", "json"), nil, &out); err != nil {
		return 0, err
	}
	var got struct {
		MBit float64 `json:"mbit_per_s"`
	}
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		return 0, fmt.Errorf("cannot read what the speed test says: %w: %s", err, &out)
	}
	return got.MBit / 8, nil
}

// files puts one file by SFTP, and gets it.
func files(w *world, s *settings, out io.Writer) error {
	from, to := filepath.Join(w.Dir, "from"), filepath.Join(w.Dir, "to")
	if err := os.WriteFile(from, make([]byte, s.size), 0o600); err != nil {
		return err
	}
	for _, verb := range []string{"put", "get"} {
		err := each(s, "sftp "+verb, "MB/s", out, func(by way) (float64, error) {
			begun := time.Now()
			err := w.finish(w.command("sftp", "-F", w.config(), "-b", "-", by.host), strings.NewReader(verb+" "+from+" "+to+"\n"), nil)
			return speed(s.size, begun), err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// rsync brings many small files into an empty folder.
func rsync(w *world, s *settings, out io.Writer) error {
	from, to := filepath.Join(w.Dir, "tree"), filepath.Join(w.Dir, "copy")
	for i := range s.files {
		dir := filepath.Join(from, strconv.Itoa(i%100))
		if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, strconv.Itoa(i)), []byte(fmt.Sprintln("file", i)), 0o600)); err != nil {
			return err
		}
	}
	return each(s, fmt.Sprintf("rsync -a of %d files", s.files), "ms", out, func(by way) (float64, error) {
		if err := os.RemoveAll(to); err != nil {
			return 0, err
		}
		begun := time.Now()
		err := w.finish(w.command("rsync", "-e", "ssh -F "+w.config(), "-a", from+"/", by.host+":"+to+"/"), nil, nil)
		return lab.Milliseconds(time.Since(begun)), err
	})
}

// memory opens sessions that do nothing, a connection each, and reads what the server takes for them: the proportional share of all
// its processes, as sshd has some for each session.
func memory(w *world, s *settings, out io.Writer) error {
	for _, one := range []struct {
		by  way
		pid int
	}{{ways[0], w.SSHD.Process.Pid}, {ways[1], w.plain.Process.Pid}} {
		before, err := share(one.pid)
		if err != nil {
			return err
		}
		stop, err := w.idle(one.by, s.idle)
		if err == nil {
			err = lab.Pause(w.Ctx, s.settle)
		}
		var with float64
		if err == nil {
			with, err = share(one.pid)
		}
		stop()
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "memory of a session, %d of them idle\t%s\t%.3g KiB\t\t\t\n", s.idle, one.by.name, (with-before)/float64(s.idle))
	}
	return nil
}

// idle opens sessions until stop.
func (w *world) idle(by way, n int) (stop func(), err error) {
	var open []*exec.Cmd
	stop = func() {
		for _, cmd := range open {
			cmd.Process.Kill()
			cmd.Wait()
		}
	}
	for range n {
		cmd := w.ssh(by, "echo ready; exec cat")
		out, err := cmd.StdoutPipe()
		if err == nil {
			_, err = cmd.StdinPipe() // held open, so that the session stays
		}
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			return stop, err
		}
		open = append(open, cmd)
		if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
			return stop, fmt.Errorf("a session says %q: %w", line, err)
		}
	}
	return stop, nil
}

// share returns, in KiB, the proportional share of memory of a process and of those below it that run the same program.
func share(pid int) (float64, error) {
	program, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return 0, err
	}
	parents, err := processes()
	if err != nil {
		return 0, err
	}
	var total float64
	for one := range parents {
		above := one
		for above != pid && above != 0 {
			above = parents[above]
		}
		if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", one)); above != pid || err != nil || exe != program {
			continue // a stranger, a command of a session, or one that has just ended
		}
		body, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", one))
		if err != nil {
			return 0, err
		}
		for line := range strings.Lines(string(body)) {
			var kib float64
			if _, err := fmt.Sscanf(line, "Pss: %f kB", &kib); err == nil {
				total += kib
			}
		}
	}
	return total, nil
}

// processes returns the parent of each process of this machine.
func processes() (map[int]int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	parents := make(map[int]int)
	for _, file := range files {
		body, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		_, rest, _ := strings.Cut(string(body), ") ") // the name may hold spaces
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if fields := strings.Fields(rest); err == nil && len(fields) > 1 {
			parents[pid], err = strconv.Atoi(fields[1])
		}
		if err != nil {
			return nil, err
		}
	}
	return parents, nil
}
