package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/usage"
	"github.com/berthd/berth/wire"
)

const (
	// lifeFile is the note that a berthd keeps of itself while it runs.
	lifeFile = "life.json"
	// crashFile gets what the Go runtime says of a crash.
	crashFile = "crash"
	// maxLife bounds what is read of the note, and maxCrash of a crash; of that only the first line is told.
	maxLife, maxCrash = 64 << 10, 4 << 10
	// maxSentence bounds a sentence that comes from either, in bytes.
	maxSentence = 512
)

// Trouble is what holds a berthd back: that it could not link to its server, and why.
type Trouble struct {
	Since time.Time `json:"since"`
	Cause string    `json:"cause"`
	Fix   string    `json:"fix,omitempty"`
}

// Ending is how a berthd ended.
type Ending struct {
	// Began is when that berthd had started, At when it ended, zero if it could not say.
	Began time.Time `json:"began"`
	At    time.Time `json:"at,omitzero"`
	// Orderly tells that it left by itself or as told.
	Orderly bool `json:"orderly"`
	// Cause says why it ended, Fix what to do about it; empty where nothing is to be done.
	Cause string `json:"cause"`
	Fix   string `json:"fix,omitempty"`
	// Trouble is what held it back then; nil if nothing did.
	Trouble *Trouble `json:"trouble,omitempty"`
}

// String returns one sentence for people: when, why, and what had been wrong.
func (e Ending) String() string {
	when := "started " + e.Began.UTC().Format(time.RFC3339)
	if !e.At.IsZero() {
		when = "ended " + e.At.UTC().Format(time.RFC3339)
	}
	s := fmt.Sprintf("the last berthd (%s) %s", when, e.Cause)
	if e.Trouble != nil {
		s += fmt.Sprintf("; it had not reached its server since %s: %s", e.Trouble.Since.UTC().Format(time.RFC3339), e.Trouble.Cause)
	}
	return s
}

// note is the content of the life file.
type note struct {
	PID   int         `json:"pid"`
	Boot  string      `json:"boot"`
	Began time.Time   `json:"began"`
	Kills usage.Kills `json:"oom_kills,omitempty"`
	// Trouble is what holds it back now.
	Trouble *Trouble `json:"trouble,omitempty"`
	// Stopping is when it was told to stop, Ended when it had stopped, and Why it did.
	Stopping time.Time `json:"stopping,omitzero"`
	Ended    time.Time `json:"ended,omitzero"`
	Why      string    `json:"why,omitempty"`
	Fix      string    `json:"fix,omitempty"`
}

// Life keeps a note in the state directory of a berthd that runs, from which the next one can tell how it ended. It
// costs a small write at the start, at the end, and whenever what is wrong changes.
type Life struct {
	state *State
	last  *Ending

	// noted has a value when Notes gives more than before.
	noted chan struct{}

	mu     sync.Mutex
	note   note
	kills  int64 // of the OOM killer in this life
	closed bool
}

// BeginLife begins one. What the last berthd left is read first.
func BeginLife(s *State) *Life {
	now := note{PID: os.Getpid(), Boot: bootID(), Began: time.Now().Round(0), Kills: usage.OOMKills()}
	l := &Life{state: s, noted: make(chan struct{}, 1), note: now, last: lastEnding(s.dir, now.Boot, now.Kills)}
	l.save()
	return l
}

// CrashOutput makes an empty file for what the runtime says of a crash. The next berthd reads it.
func (l *Life) CrashOutput() (*os.File, error) {
	f, err := os.OpenFile(l.state.Path(crashFile), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot keep what a crash says: %w", err)
	}
	return f, nil
}

// Last is how the berthd before this one ended; nil if there was none.
func (l *Life) Last() *Ending { return l.last }

// tell takes an event as it happens.
func (l *Life) tell(e Event) {
	switch e.Step {
	case StepTrouble:
		l.change(func(n *note) bool {
			if n.Trouble != nil && n.Trouble.Cause == e.Cause {
				return false
			}
			since := e.Time.Round(0)
			if n.Trouble != nil {
				since = n.Trouble.Since // it goes on, in another way
			}
			n.Trouble = &Trouble{Since: since, Cause: e.Cause, Fix: e.Fix}
			return true
		})
	case StepLinked:
		l.change(func(n *note) bool {
			had := n.Trouble != nil
			n.Trouble = nil
			return had
		})
	}
}

// stopping notes that berthd was told to stop: a kill that comes before the end has another cause then.
func (l *Life) stopping() {
	l.change(func(n *note) bool {
		n.Stopping = time.Now().Round(0)
		return true
	})
}

// end notes the last words. Whatever is told after that does not count.
func (l *Life) end(why, fix string) {
	l.change(func(n *note) bool {
		n.Ended, n.Why, n.Fix = time.Now().Round(0), why, fix
		return true
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
}

// tellLast says how the last berthd ended, if that was not as it should be.
func (l *Life) tellLast(log *slog.Logger) {
	switch last := l.last; {
	case last == nil:
	case last.Orderly:
		log.Debug(last.String())
	default:
		log.Warn(last.String(), "fix", last.Fix)
	}
}

// parting puts the end of Run into words.
func parting(cause, err error) (why, fix string) {
	switch refusal := client.Explain(err); {
	case errors.Is(cause, ErrRestart):
		return "was told to leave for another start", ""
	case err == nil:
		return "was told to stop", ""
	case errors.Is(err, ErrRefused):
		return "left because its token was refused: " + refusal.Cause, refusal.Fix
	}
	return "failed: " + err.Error(), ""
}

// killed compares the OOM killer's counters with what is noted, and notes the new ones. It returns true if something
// was ended in this workspace: counters of the whole machine have other workspaces in them.
func (l *Life) killed(now usage.Kills) (rise usage.Rise, here bool) {
	l.change(func(n *note) bool {
		var rose bool
		rise, rose = now.Since(n.Kills)
		n.Kills = now
		if here = rose && rise.File != usage.MachineKills; here {
			l.kills += rise.To - rise.From
		}
		return rose
	})
	if here {
		select {
		case l.noted <- struct{}{}:
		default:
		}
	}
	return rise, here
}

// Kills is how many processes of this workspace the OOM killer ended in this life.
func (l *Life) Kills() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.kills
}

// Notes is what a person should know of this berthd, a sentence each.
func (l *Life) Notes() (notes []string) {
	if l.last != nil && !l.last.Orderly {
		notes = append(notes, l.last.String())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.kills > 0 {
		notes = append(notes, fmt.Sprintf("the OOM killer ended %d processes in this workspace since %s; %s", l.kills, l.note.Began.UTC().Format(time.RFC3339), MemoryFix))
	}
	return notes
}

// trouble is what holds this berthd back; nil if nothing does.
func (l *Life) trouble() *Trouble {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.note.Trouble
}

func (l *Life) change(f func(*note) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed && f(&l.note) {
		l.saveLocked()
	}
}

func (l *Life) save() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.saveLocked()
}

// saveLocked replaces the note. On a full disk the old one stays: the next berthd then knows less, which is no reason to
// say anything.
func (l *Life) saveLocked() {
	if data, err := json.Marshal(l.note); err == nil {
		_ = l.state.replace(lifeFile, data)
	}
}

// LastEnding tells how the berthd ended that used a state directory before. It returns nil if none did, or while one
// runs, of which the note is.
func LastEnding(stateDir string) *Ending {
	return lastEnding(stateDir, bootID(), usage.OOMKills())
}

func lastEnding(dir, boot string, kills usage.Kills) *Ending {
	data, err := readBeginning(filepath.Join(dir, lifeFile), maxLife)
	var n note
	if err != nil || json.Unmarshal(data, &n) != nil || n.Began.IsZero() {
		return nil
	}
	crash, _ := readBeginning(filepath.Join(dir, crashFile), maxCrash)
	e := n.ending(boot, kills, string(crash))
	return &e
}

// ending concludes from a note, and from what is so now, how its berthd ended.
func (n note) ending(boot string, kills usage.Kills, crash string) Ending {
	e := Ending{Began: n.Began, At: n.Ended, Orderly: !n.Ended.IsZero(), Trouble: n.Trouble}
	if e.Trouble != nil {
		e.Trouble.Cause, e.Trouble.Fix = sentence(e.Trouble.Cause), sentence(e.Trouble.Fix)
	}
	if e.Orderly {
		e.Cause, e.Fix = sentence(n.Why), sentence(n.Fix)
		return e
	}
	rise, oom := kills.Since(n.Kills)
	kernel := n.Boot[:strings.LastIndexByte(n.Boot, '-')+1] // what follows is the start of process 1
	switch {
	case crash != "":
		line, _, _ := strings.Cut(crash, "\n")
		e.Cause = "crashed: " + sentence(line)
		e.Fix = "report it, with the file " + crashFile + " of the state directory if it is still there"
	case !strings.HasPrefix(boot, kernel):
		e.Cause = "ended with its machine, which was rebooted or lost power"
	case n.Boot != boot:
		e.Cause = "ended with its container, whose first process was ended"
		if oom {
			e.Cause += fmt.Sprintf(", most likely by the OOM killer: %s", riseText(rise))
			e.Fix = MemoryFix
		}
	case oom && rise.Own:
		e.Cause, e.Fix = "was killed (SIGKILL) by the OOM killer: "+riseText(rise), MemoryFix
	case oom:
		e.Cause, e.Fix = "was killed (SIGKILL), most likely by the OOM killer: "+riseText(rise), MemoryFix
	case !n.Stopping.IsZero():
		e.Cause = fmt.Sprintf("was told to stop at %s and killed (SIGKILL) before it had", n.Stopping.UTC().Format(time.RFC3339))
		e.Fix = "give it more time (docker stop --time, TimeoutStopSec=) or less to do (--shutdown-timeout)"
	default:
		e.Cause = "was killed (SIGKILL) from outside"
		e.Fix = "stop berthd with SIGTERM; if nobody killed it, see the kernel's log (dmesg) and what supervises this machine"
	}
	return e
}

// MemoryFix is what helps against the OOM killer.
const MemoryFix = "give the workspace more memory, or have less run in it; a limit for what runs beside berthd (systemd's MemoryMax=, docker's --memory) saves berthd itself"

func riseText(r usage.Rise) string {
	return fmt.Sprintf("oom_kill in %s rose from %d to %d", sentence(r.File), r.From, r.To)
}

// sentence makes one short line of a text that may have come from anywhere.
func sentence(text string) string {
	text = wire.Line(text)
	if len(text) > maxSentence {
		text = strings.ToValidUTF8(text[:maxSentence], "") + "…"
	}
	return text
}

// readBeginning reads at most limit bytes of a file.
func readBeginning(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}
