package resume

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"net"
	"testing"
	"time"
)

// FuzzGreetings reads what either side may begin a connection with; what is good is written as it was read.
func FuzzGreetings(f *testing.F) {
	f.Add(hello{}.append(nil))
	f.Add(hello{id{1, 2, 3}, 1 << 40}.append(nil))
	f.Add(answer{goOn, id{4}, 5, minWindow, time.Minute}.append(nil))
	f.Add(answer{unknownSession, id{4}, 0, 0, 0}.append(nil))
	f.Add(answer{9, id{}, 0, 1 << 30, 0}.append(nil))
	f.Add([]byte("SSH-2.0-OpenSSH_9.9\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if h, err := readHello(bytes.NewReader(data)); err == nil && !bytes.HasPrefix(data, h.append(nil)) {
			t.Errorf("%q is read as %+v", data, h)
		}
		if a, err := readAnswer(bytes.NewReader(data)); err == nil && !bytes.HasPrefix(data, a.append(nil)) {
			t.Errorf("%q is read as %+v", data, a)
		}
	})
}

// FuzzFrames gives an end whatever frames the other side may send: it keeps within its window, and takes
// nothing for taken that it has not sent.
func FuzzFrames(f *testing.F) {
	data := func(text string) []byte {
		return append(binary.BigEndian.AppendUint32([]byte{frameData}, uint32(len(text))), text...)
	}
	f.Add(append(data("hello"), frameEnd))
	f.Add(append(append(data("hello"), frameEnd), data("more")...))
	f.Add(appendTaken(appendTaken(data("x"), frameAck, 3), frameAsk, 6))
	f.Add(appendTaken(nil, frameAck, 1<<63))
	f.Add([]byte{frameData, 0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{frameData, 0, 0, 0, 0})
	f.Add(bytes.Repeat(data(string(make([]byte, maxData))), minWindow/maxData+2))
	f.Add([]byte("z"))
	f.Fuzz(func(t *testing.T, stream []byte) {
		near, far := net.Pipe()
		defer near.Close()
		defer far.Close()
		c := newConn(near, id{}, minWindow)
		c.Write([]byte("hello"))
		c.outEnded = true
		c.next = 6
		want, got := 0, 0
		for r := bufio.NewReader(bytes.NewReader(stream)); ; {
			frame, err := readFrame(r, func() []byte { return make([]byte, maxData) })
			if err != nil {
				break
			}
			if err := c.take(frame); err != nil {
				break
			}
			want += len(frame.data)
			if c.in.len() > minWindow || len(c.in.chunks) > minWindow/chunkSize+1 || c.acked > 6 || c.out.start > c.out.end {
				t.Fatalf("in %d, acked %d, out %d to %d", c.in.len(), c.acked, c.out.start, c.out.end)
			}
			if got == 0 && want > 3 { // in the middle of things
				got, _ = c.Read(make([]byte, 3))
			}
		}
		for c.in.len() > 0 {
			n, _ := c.Read(make([]byte, 1000))
			got += n
		}
		if got != want || len(c.in.chunks) > 0 {
			t.Errorf("%d bytes of %d are read, %d chunks are left", got, want, len(c.in.chunks))
		}
	})
}

// FuzzQueue holds a queue against a slice: each byte of the plan is how much to append or discard.
func FuzzQueue(f *testing.F) {
	f.Add([]byte{1, 2, 200, 130, 255, 255, 3, 129})
	f.Add(bytes.Repeat([]byte{127, 191}, 50))
	f.Fuzz(func(t *testing.T, plan []byte) {
		var q queue
		var all []byte
		for i, step := range plan {
			if i == 64 { // what it costs grows with the square
				break
			}
			if step < 128 {
				part := bytes.Repeat([]byte{step + 1}, int(step)*997)
				q.append(part)
				all = append(all, part...)
			} else {
				q.discard(q.start + uint64(q.len())*uint64(step-127)/128)
			}
			if int(q.end) != len(all) || len(q.chunks) > q.len()/chunkSize+2 {
				t.Fatalf("it ends at %d of %d, in %d chunks for %d bytes", q.end, len(all), len(q.chunks), q.len())
			}
			at := (q.start + q.end) / 2
			got := make([]byte, q.len())
			if n := q.copy(got, at); !bytes.Equal(got[:n], all[at:]) {
				t.Fatalf("from %d on it holds something else", at)
			}
		}
	})
}
