// Package speedtest measures how fast one stream over the mesh is.
//
// The agent answers with [Serve] on its speed test port; a client dials that port and calls [Run].
//
// The protocol has three steps. The client sends one JSON value that says for how long data shall
// flow and which way. The agent answers with one JSON value, empty or with an error. Then the sending
// side writes blocks for that long and closes, and the receiving side counts.
package speedtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Direction is which way the data flows, as the client sees it.
type Direction int

// The two directions, numbered as on the wire.
const (
	Download Direction = 0 // agent to client
	Upload   Direction = 1 // client to agent
)

// String returns "download" or "upload".
func (d Direction) String() string {
	switch d {
	case Download:
		return "download"
	case Upload:
		return "upload"
	}
	return fmt.Sprintf("direction %d", int(d))
}

func (d Direction) reversed() Direction { return 1 - d }

const (
	version = 2

	// DefaultDuration is long enough for TCP to find its pace on any path.
	DefaultDuration = 5 * time.Second
	// MaxDuration is the longest test an agent runs. It keeps a forgotten client from filling a link all night.
	MaxDuration = 10 * time.Minute

	// blockSize is how much is written at once, as the protocol has it.
	blockSize = 2 << 20
	// receiveSize is how much is read at once: a few full TCP windows of the mesh's 1280 byte packets.
	receiveSize = 256 << 10
	// maxHeader bounds both JSON values; a request takes some 60 bytes, an answer one sentence.
	maxHeader = 4 << 10
	// headerTimeout is how long a peer may take for its JSON value: one round trip on a very bad path.
	headerTimeout = 20 * time.Second
	// deadlineFactor times the duration is when either side gives the other up.
	deadlineFactor = 4
	// minDeadline keeps very short tests from failing over one lost packet.
	minDeadline = 5 * time.Second
	// maxAtOnce is how many tests an agent runs at a time; more would only measure each other.
	maxAtOnce = 8
)

// Result is what the caller's side saw.
type Result struct {
	Bytes   int64         `json:"bytes"`
	Elapsed time.Duration `json:"elapsed_ns"`
}

// BitsPerSecond returns the mean rate, 0 if no time passed.
func (r Result) BitsPerSecond() float64 {
	if r.Elapsed <= 0 {
		return 0
	}
	return float64(r.Bytes) * 8 / r.Elapsed.Seconds()
}

// request is what the client sends first.
type request struct {
	Version   int           `json:"version"`
	Time      time.Duration `json:"time"`
	Direction Direction     `json:"direction"`
}

func (r request) validate() error {
	switch {
	case r.Version != version:
		return fmt.Errorf("cannot run a speed test of version %d: only version %d is known", r.Version, version)
	case r.Direction != Download && r.Direction != Upload:
		return fmt.Errorf("cannot run a speed test in %v", r.Direction)
	case r.Time <= 0 || r.Time > MaxDuration:
		return fmt.Errorf("cannot run a speed test for %v: it must be more than 0 and at most %v", r.Time, MaxDuration)
	}
	return nil
}

// deadline is how long the data may take.
func (r request) deadline() time.Duration { return max(deadlineFactor*r.Time, minDeadline) }

// answer is what the agent sends back.
type answer struct {
	Error string `json:"error,omitempty"`
}

// decode reads one JSON value of at most [maxHeader] bytes into v. The reader it returns continues
// behind the value.
func decode(r io.Reader, v any) (io.Reader, error) {
	limited := &io.LimitedReader{R: r, N: maxHeader}
	dec := json.NewDecoder(limited)
	if err := dec.Decode(v); err != nil {
		if limited.N <= 0 {
			return nil, fmt.Errorf("message exceeds %d bytes", maxHeader)
		}
		return nil, err
	}
	return io.MultiReader(dec.Buffered(), r), nil
}

// Serve answers speed tests on l until ctx is done, then closes l and every connection and returns nil.
// It returns an error only if l fails. At most eight tests run at a time; others are refused with a reason.
func Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	context.AfterFunc(ctx, func() { l.Close() })

	places := make(chan struct{}, maxAtOnce)
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("cannot accept speed tests: %w", err)
		}
		select {
		case places <- struct{}{}:
			running.Go(func() {
				defer func() { <-places }()
				serveConn(ctx, conn)
			})
		default:
			refuse(conn, errors.New("too many speed tests are running; try again when they are done"))
			conn.Close()
		}
	}
}

// serveConn runs one test. Whatever goes wrong is the client's to report: it sees the answer or the end.
func serveConn(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()

	var req request
	conn.SetDeadline(time.Now().Add(headerTimeout))
	rest, err := decode(conn, &req)
	if err != nil {
		refuse(conn, fmt.Errorf("cannot read the request: %w", err))
		return
	}
	if err := req.validate(); err != nil {
		refuse(conn, err)
		return
	}
	if err := json.NewEncoder(conn).Encode(answer{}); err != nil {
		return
	}
	conn.SetDeadline(time.Now().Add(req.deadline()))
	transfer(conn, rest, req.Direction.reversed(), req.Time)
}

// refuse tells the client why. A peer that does not read loses the reason, not our time.
func refuse(conn net.Conn, reason error) {
	conn.SetWriteDeadline(time.Now().Add(time.Second))
	json.NewEncoder(conn).Encode(answer{Error: reason.Error()})
}

// Run measures over conn, which leads to an agent's speed test port, for the given time: more than 0
// and at most [MaxDuration]. It closes conn. The error is ctx's cause when ctx ended the test, else
// names what the agent refused or where the stream broke.
func Run(ctx context.Context, conn net.Conn, direction Direction, d time.Duration) (Result, error) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	r, err := run(conn, request{Version: version, Time: d, Direction: direction})
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return r, err
}

func run(conn net.Conn, req request) (Result, error) {
	if err := req.validate(); err != nil {
		return Result{}, err
	}
	conn.SetDeadline(time.Now().Add(headerTimeout))
	if err := json.NewEncoder(conn).Encode(req); err != nil {
		return Result{}, fmt.Errorf("cannot ask for a speed test: %w", err)
	}
	var a answer
	rest, err := decode(conn, &a)
	if err != nil {
		return Result{}, fmt.Errorf("cannot read the agent's answer: %w", err)
	}
	if a.Error != "" {
		return Result{}, fmt.Errorf("the agent refuses the speed test: %s", a.Error)
	}
	conn.SetDeadline(time.Now().Add(req.deadline()))
	return transfer(conn, rest, req.Direction, req.Time)
}

// transfer moves data one way; direction is the caller's own view.
func transfer(conn net.Conn, in io.Reader, direction Direction, d time.Duration) (Result, error) {
	if direction == Upload {
		return send(conn, d)
	}
	return receive(in)
}

// zeroes is what is sent. WireGuard does not compress, so zeroes travel like anything else.
var zeroes [blockSize]byte

// send writes blocks for d. If conn can be closed for writing alone, send also waits for the peer to
// take it all, so that what lies in buffers on the way does not count as delivered early.
func send(conn net.Conn, d time.Duration) (Result, error) {
	var r Result
	start := time.Now()
	for time.Since(start) < d {
		n, err := conn.Write(zeroes[:])
		r.Bytes += int64(n)
		if err != nil {
			return r, fmt.Errorf("cannot send: %w", err)
		}
	}
	if half, ok := conn.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		if _, err := io.Copy(io.Discard, io.LimitReader(conn, maxHeader)); err != nil {
			return r, fmt.Errorf("cannot learn whether all was delivered: %w", err)
		}
	}
	r.Elapsed = time.Since(start)
	return r, nil
}

func receive(in io.Reader) (Result, error) {
	var r Result
	buf := make([]byte, receiveSize)
	start := time.Now()
	for {
		n, err := in.Read(buf)
		r.Bytes += int64(n)
		r.Elapsed = time.Since(start)
		switch {
		case errors.Is(err, io.EOF):
			return r, nil
		case err != nil:
			return r, fmt.Errorf("cannot receive: %w", err)
		}
	}
}
