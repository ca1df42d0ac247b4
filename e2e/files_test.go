package e2e

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestOpenSSHFiles: scp by both protocols, sftp and rsync bring whole trees there and back, go on where they were cut off, and say when a disk is full.
func TestOpenSSHFiles(t *testing.T) {
	s := newOpenSSH(t)
	tree := filepath.Join(s.home, "tree")
	plantFiles(t, tree)
	big := filepath.Join(s.home, "big")
	plantBig(t, big, atLength(32, 1024)<<20)
	for name, test := range map[string]func(*testing.T, *transfers){
		"scp": testSCP, "sftp": testSFTP, "rsync": testRsync, "resumed": testResumed, "disk full": testDiskFull,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, &transfers{openSSH: s, t: t, tree: tree, big: big, dir: t.TempDir()})
		})
	}
}

// transfers moves a tree and a big file between folders, which are the workspace's and the person's alike.
type transfers struct {
	*openSSH
	t              *testing.T
	tree, big, dir string
}

// at is a path in the folder of this test, which both sides can name: the workspace is this machine.
func (x *transfers) at(name string) string { return filepath.Join(x.dir, name) }

// must runs a program that takes OpenSSH's options, and has to succeed.
func (x *transfers) must(stdin, name string, args ...string) string {
	x.t.Helper()
	got := finish(x.t, x.program(x.t, name, args...), strings.NewReader(stdin))
	if got.Code != 0 {
		x.t.Fatalf("%s %q: %+v", name, args, got)
	}
	return got.Out
}

// rsync is a command that goes through the same client.
func (x *transfers) rsync(args ...string) *exec.Cmd {
	return x.command("rsync", append([]string{"-e", "ssh -F " + x.config + " -o BatchMode=yes"}, args...)...)
}

func (x *transfers) mustRsync(args ...string) string {
	x.t.Helper()
	got := finish(x.t, x.rsync(args...), nil)
	if got.Code != 0 {
		x.t.Fatalf("rsync %q: %+v", args, got)
	}
	return got.Out
}

// plantBig writes random bytes.
func plantBig(t *testing.T, path string, size int) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.CopyN(f, rand.Reader, int64(size)); err != nil {
		t.Fatal(err)
	}
}

// sparseSize is the size of a file that is a hole but for its end.
const sparseSize = 4 << 20

// plantFiles makes a tree of small files with odd names, modes and times, and below "links" what scp and sftp do not keep.
func plantFiles(t *testing.T, tree string) {
	t.Helper()
	then := time.Unix(981173106, 0) // whole seconds are all that SFTP knows
	write := func(name, text string, mode os.FileMode) {
		path := filepath.Join(tree, name)
		err := os.MkdirAll(filepath.Dir(path), 0o755)
		err = errors.Join(err, os.WriteFile(path, []byte(text), 0o600), os.Chmod(path, mode), os.Chtimes(path, then, then))
		if err != nil {
			t.Fatal(err)
		}
	}
	for i := range atLength(500, 20_000) {
		write(fmt.Sprintf("many/%d/%d", i%20, i), fmt.Sprintln("file", i), 0o644)
	}
	write("odd/with space and 'quotes' \"$HOME\" *", "a", 0o600)
	write("odd/🚀 schön", "b", 0o400)
	write("odd/\xff\xfe no UTF-8", "c", 0o755)
	write("odd/-n", "d", 0o640)
	write("odd/empty", "", 0o444)
	write("links/new\nline", "e", 0o644)
	sparse := filepath.Join(tree, "links/sparse")
	write("links/sparse", "", 0o644)
	err := errors.Join(os.Truncate(sparse, sparseSize), os.Chtimes(sparse, then, then),
		os.Symlink("sparse", filepath.Join(tree, "links/link")), os.Symlink("nowhere", filepath.Join(tree, "links/dangling")))
	if err != nil {
		t.Fatal(err)
	}
}

// described is what there is to know of each file below a folder: mode, time, and its content or where it leads.
func described(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := make(map[string]string)
	for _, name := range files(t, dir) {
		path := filepath.Join(dir, name)
		info, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		var content string
		switch info.Mode().Type() {
		case 0:
			content = fmt.Sprintf("%v %x", info.ModTime().UTC(), sumOf(t, path))
		case os.ModeSymlink:
			content, err = os.Readlink(path)
		}
		if err != nil {
			t.Fatal(err)
		}
		all[name] = fmt.Sprint(info.Mode(), " ", content)
	}
	return all
}

func sumOf(t *testing.T, path string) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		t.Fatal(err)
	}
	return sum.Sum(nil)
}

func (x *transfers) wantSame(what, from, to string) {
	x.t.Helper()
	if diff := cmp.Diff(described(x.t, from), described(x.t, to)); diff != "" {
		x.t.Errorf("%s: %s", what, diff)
	}
}

func (x *transfers) wantSameFile(what, path string) {
	x.t.Helper()
	if diff := cmp.Diff(sumOf(x.t, x.big), sumOf(x.t, path)); diff != "" {
		x.t.Errorf("%s: other bytes than were sent", what)
	}
}

func testSCP(t *testing.T, x *transfers) {
	for protocol, flag := range map[string]string{"SFTP": "-s", "scp": "-O"} {
		for _, part := range []string{"many", "odd"} {
			there, back := x.at(part+flag), x.at(part+flag+"-back")
			x.must("", "scp", flag, "-rp", filepath.Join(x.tree, part), "box.berth:"+there)
			x.wantSame(part+" there, by "+protocol, filepath.Join(x.tree, part), there)
			x.must("", "scp", flag, "-rp", "box.berth:"+there, back)
			x.wantSame(part+" back, by "+protocol, there, back)
		}
		x.must("", "scp", flag, x.big, "box.berth:"+x.at("big"+flag))
		x.wantSameFile("big there, by "+protocol, x.at("big"+flag))
		x.must("", "scp", flag, "box.berth:"+x.at("big"+flag), x.at("big-back"+flag))
		x.wantSameFile("big back, by "+protocol, x.at("big-back"+flag))
	}
}

func testSFTP(t *testing.T, x *transfers) {
	out := x.must(fmt.Sprintf("mkdir %[1]s\ncd %[1]s\npwd\nput -pR %[2]s/many\nput -pR %[2]s/odd\nput %[3]s a\nrename a big\nln -s big link\nchmod 640 big\nls -l\n"+
		"get -pR many %[1]s-back-many\nget -pR odd %[1]s-back-odd\nget link %[1]s-back-big\n", x.at("sftp"), x.tree, x.big), "sftp", "-b", "-", "box.berth")
	if !strings.Contains(out, "Remote working directory: "+x.at("sftp")) || !strings.Contains(out, "-rw-r-----") {
		t.Errorf("sftp said:\n%s", out)
	}
	for _, part := range []string{"many", "odd"} {
		x.wantSame(part+" there", filepath.Join(x.tree, part), x.at("sftp/"+part))
		x.wantSame(part+" back", filepath.Join(x.tree, part), x.at("sftp-back-"+part))
	}
	x.wantSameFile("big there", x.at("sftp/big"))
	x.wantSameFile("big back", x.at("sftp-back-big"))
	if info, err := os.Lstat(x.at("sftp/link")); err != nil || info.Mode().Type() != os.ModeSymlink {
		t.Errorf("the link: %+v, %v", info, err)
	}
	if got := finish(t, x.program(t, "sftp", "-b", "-", "box.berth"), strings.NewReader("get "+x.at("none")+"\n")); got.Code == 0 || !strings.Contains(got.Err, "not found") {
		t.Errorf("a file that is not there: %+v", got)
	}
}

func testRsync(t *testing.T, x *transfers) {
	there, back := x.at("rsync"), x.at("rsync-back")
	x.mustRsync("-aS", "--delete", x.tree+"/", "box.berth:"+there+"/")
	x.wantSame("there", x.tree, there)
	if info, err := os.Stat(filepath.Join(there, "links/sparse")); err != nil || info.Sys().(*syscall.Stat_t).Blocks*512 > sparseSize/2 {
		t.Errorf("the sparse file: %+v, %v", info, err)
	}
	if err := os.WriteFile(filepath.Join(there, "many", "extra"), []byte("not in the source"), 0o600); err != nil {
		t.Fatal(err)
	}
	x.mustRsync("-a", "--delete", x.tree+"/", "box.berth:"+there+"/")
	x.wantSame("there again", x.tree, there)
	x.mustRsync("-aS", "--delete", "box.berth:"+there+"/", back+"/")
	x.wantSame("back", x.tree, back)
	x.mustRsync(x.big, "box.berth:"+x.at("big"))
	x.wantSameFile("big there", x.at("big"))
}

// cut runs a command that is held to a slow pace, and ends it when half of the big file has come to one of the paths.
func (x *transfers) cut(cmd *exec.Cmd, stdin string, paths func() []string) {
	x.t.Helper()
	whole, err := os.Stat(x.big)
	if err != nil {
		x.t.Fatal(err)
	}
	cmd.Stdin = strings.NewReader(stdin)
	if err := cmd.Start(); err != nil {
		x.t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Signal(syscall.SIGINT)
	eventually(x.t, 2*time.Minute, "half of the file is there", func() bool {
		for _, path := range paths() {
			if info, err := os.Stat(path); err == nil && info.Size() >= whole.Size()/2 {
				return true
			}
		}
		return false
	})
}

// testResumed: what was cut off at half goes on from there.
func testResumed(t *testing.T, x *transfers) {
	info, err := os.Stat(x.big)
	if err != nil {
		t.Fatal(err)
	}
	whole := info.Size()
	slow := fmt.Sprint(whole * 8 / 1000 / 4) // kbit/s: four seconds for all of it
	only := func(path string) func() []string { return func() []string { return []string{path} } }
	for _, way := range []struct{ name, first, again, to string }{
		{"reput", "put %[1]s %[2]s", "reput %[1]s %[2]s", x.at("reput")},
		{"reget", "get %[1]s %[2]s", "reget %[1]s %[2]s", x.at("reget")},
	} {
		x.cut(x.program(t, "sftp", "-l", slow, "box.berth"), fmt.Sprintf(way.first+"\n", x.big, way.to), only(way.to))
		// The workspace's side may still be writing what it was sent.
		var size int64
		eventually(t, 20*time.Second, "nothing more comes to "+way.to, func() bool {
			before := size
			info, err := os.Stat(way.to)
			if err != nil {
				t.Fatal(err)
			}
			size = info.Size()
			return size == before
		})
		if size >= whole {
			t.Fatalf("%s: nothing was cut off", way.name)
		}
		x.must(fmt.Sprintf(way.again+"\n", x.big, way.to), "sftp", "-b", "-", "box.berth")
		x.wantSameFile(way.name, way.to)
	}

	// rsync writes to a hidden file, and leaves it under the right name when it is cut off.
	for _, way := range []struct{ name, from, to string }{
		{"rsync there", x.big, "box.berth:" + x.at("partial/up")}, {"rsync back", "box.berth:" + x.big, x.at("partial/down")},
	} {
		if err := os.MkdirAll(x.at("partial"), 0o700); err != nil {
			t.Fatal(err)
		}
		path := strings.TrimPrefix(way.to, "box.berth:")
		hidden := func() []string {
			found, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".*"))
			return found
		}
		x.cut(x.rsync("--partial", fmt.Sprintf("--bwlimit=%dK", whole/1024/4), way.from, way.to), "", hidden)
		eventually(t, 20*time.Second, "the part is kept", func() bool { return exists(path) && len(hidden()) == 0 })
		out := x.mustRsync("--partial", "--stats", way.from, way.to)
		x.wantSameFile(way.name, path)
		_, rest, _ := strings.Cut(out, "Literal data: ")
		var sent int64
		if _, err := fmt.Sscan(strings.ReplaceAll(rest, ",", ""), &sent); err != nil || sent > whole*3/4 {
			t.Errorf("%s: %d bytes of %d were sent again, %v", way.name, sent, whole, err)
		}
	}
}

// testDiskFull: who writes to a full disk is told so at once.
func testDiskFull(t *testing.T, x *transfers) {
	disk := x.smallDisk()
	to := filepath.Join(disk, "to")
	cat, err := os.Open(x.big)
	if err != nil {
		t.Fatal(err)
	}
	defer cat.Close()
	for _, way := range []struct {
		name  string
		cmd   *exec.Cmd
		stdin io.Reader
		says  string
	}{
		// OpenSSH's client has one word for every failure of SFTP but a few, whatever the server says beside it.
		{"scp", x.program(t, "scp", x.big, "box.berth:"+to), nil, "Failure"},
		{"sftp", x.program(t, "sftp", "-b", "-", "box.berth"), strings.NewReader("put " + x.big + " " + to + "\n"), "Failure"},
		{"scp -O", x.program(t, "scp", "-O", x.big, "box.berth:"+to), nil, "No space left"},
		{"rsync", x.rsync(x.big, "box.berth:"+to), nil, "No space left"},
		{"cat", x.program(t, "ssh", "box.berth", "cat >"+to), cat, "No space left"},
	} {
		if got := finish(t, way.cmd, way.stdin); got.Code == 0 || !strings.Contains(got.Err, way.says) {
			t.Errorf("%s to a full disk: %+v", way.name, got)
		}
	}
}
