package reporter

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"iter"
	"time"

	"github.com/google/uuid"

	"github.com/berthd/berth/wire/agentpb"
)

// A segment is a sequence of records, little-endian:
//
//	magic     4 bytes
//	length    4 bytes, of what follows the checksum
//	checksum  4 bytes, CRC-32C of length and what follows
//	kind      1 byte
//	level     1 byte
//	source   16 bytes
//	sequence  8 bytes
//	count     8 bytes, how many sequence numbers the record stands for
//	time      8 bytes, nanoseconds since 1970
//	text      the rest
//
// The text of a batch of lines begins with
//
//	stream   16 bytes, which printed the lines; zero if nobody asks
//	offset    8 bytes, how far the stream is taken with them
//
// and has the length of each line as a uvarint before it. One checksum for all: a batch that was torn or
// damaged counts for nothing, neither its lines nor its offset.
//
// The magic holds bytes that no cleaned text has, so a reader that lost its place finds the next
// record by looking for it, and no line can pretend to be one.
const (
	recordMagic  = "\xffBL\x00"
	headerSize   = len(recordMagic) + 4 + 4
	fixedSize    = 1 + 1 + 16 + 8 + 8 + 8
	streamSize   = 16 + 8
	batchStart   = headerSize + fixedSize + streamSize
	lengthOffset = len(recordMagic)
	sumOffset    = lengthOffset + 4
	// fullBatch is when a batch takes no more lines: one that is damaged is lost whole.
	fullBatch = 16 << 10
	// maxLengthSize is what the length of a line takes at most, as a uvarint.
	maxLengthSize = 3
	maxRecord     = batchStart + fullBatch + maxLengthSize + maxLine + maxMark
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

type recordKind byte

const (
	kindLine  recordKind = 1 // as berthd wrote them before there were batches
	kindGap   recordKind = 2 // stands for lines that were dropped
	kindBatch recordKind = 3
)

type record struct {
	kind     recordKind
	level    agentpb.Log_Level
	source   uuid.UUID
	sequence uint64
	count    uint64
	time     time.Time
	text     []byte    // of a batch: its lines, each after its length
	stream   uuid.UUID // of a batch
	offset   uint64    // of a batch
}

// last returns the last sequence number that r stands for.
func (r record) last() uint64 { return r.sequence + r.count - 1 }

// lineTexts yields the lines that r stands for with their numbers. They are part of text, which is r's own or a copy.
func lineTexts[T string | []byte](r record, text T) iter.Seq2[uint64, T] {
	return func(yield func(uint64, T) bool) {
		switch r.kind {
		case kindLine:
			yield(r.sequence, text)
		case kindBatch:
			for n := r.sequence; n <= r.last(); n++ {
				length, size := binary.Uvarint([]byte(text[:min(len(text), maxLengthSize)]))
				if size <= 0 || length > uint64(len(text)-size) || !yield(n, text[size:size+int(length)]) {
					return // at an end that we did not write
				}
				text = text[size+int(length):]
			}
		}
	}
}

// appendTo appends r's encoding to b.
func (r record) appendTo(b []byte) []byte {
	start := len(b)
	b = append(b, make([]byte, headerSize+fixedSize)...)
	if r.kind == kindBatch {
		b = append(b, r.stream[:]...)
		b = binary.LittleEndian.AppendUint64(b, r.offset)
	}
	b = append(b, r.text...)
	r.seal(b[start:])
	return b
}

// seal writes what comes before r's text into its encoding, which has the text already.
func (r record) seal(b []byte) {
	copy(b, recordMagic)
	binary.LittleEndian.PutUint32(b[lengthOffset:], uint32(len(b)-headerSize))
	body := b[headerSize:]
	body[0], body[1] = byte(r.kind), byte(r.level)
	copy(body[2:], r.source[:])
	binary.LittleEndian.PutUint64(body[18:], r.sequence)
	binary.LittleEndian.PutUint64(body[26:], r.count)
	binary.LittleEndian.PutUint64(body[34:], uint64(r.time.UnixNano()))
	binary.LittleEndian.PutUint32(b[sumOffset:], checksum(b))
}

// batches are lines on their way to the spool, in records that are sealed there. The zero value has none.
type batches struct {
	encoded []byte
	all     []batch
}

// batch is where one ends in the encoding, and how many lines it has.
type batch struct {
	end   int
	count uint64
}

func (b *batches) size() int { return len(b.encoded) }
func (b *batches) reset()    { b.encoded, b.all = b.encoded[:0], b.all[:0] }

// add adds a line. offset is how far its stream is taken with it.
func (b *batches) add(line []byte, offset uint64) {
	start := 0
	if n := len(b.all); n > 1 {
		start = b.all[n-2].end
	}
	if len(b.all) == 0 || len(b.encoded)-start >= batchStart+fullBatch {
		start = len(b.encoded)
		b.encoded = append(b.encoded, make([]byte, batchStart)...)
		b.all = append(b.all, batch{})
	}
	b.encoded = binary.AppendUvarint(b.encoded, uint64(len(line)))
	b.encoded = append(b.encoded, line...)
	binary.LittleEndian.PutUint64(b.encoded[start+batchStart-8:], offset)
	last := &b.all[len(b.all)-1]
	last.end, last.count = len(b.encoded), last.count+1
}

// seal numbers the lines from r.sequence on, and returns the number of the last.
func (b *batches) seal(r record, stream uuid.UUID) (last uint64) {
	r.kind = kindBatch
	start := 0
	for _, one := range b.all {
		encoded := b.encoded[start:one.end]
		copy(encoded[headerSize+fixedSize:], stream[:])
		r.count = one.count
		r.seal(encoded)
		r.sequence, start = r.sequence+r.count, one.end
	}
	return r.sequence - 1
}

// offset is how far the stream is taken with all of them.
func (b *batches) offset() uint64 {
	start := 0
	if n := len(b.all); n > 1 {
		start = b.all[n-2].end
	}
	return binary.LittleEndian.Uint64(b.encoded[start+batchStart-8:])
}

// checksum sums one whole record, leaving out its magic and the sum itself.
func checksum(b []byte) uint32 {
	sum := crc32.Update(0, castagnoli, b[lengthOffset:sumOffset])
	return crc32.Update(sum, castagnoli, b[headerSize:])
}

type outcome int

const (
	whole   outcome = iota
	partial         // a longer b may hold a record
	damaged         // no record begins here
)

// decode reads the record at the start of b; its text is part of b. The int is the record's size.
func decode(b []byte) (record, int, outcome) {
	if len(b) < headerSize {
		n := min(len(b), len(recordMagic))
		if string(b[:n]) == recordMagic[:n] {
			return record{}, 0, partial
		}
		return record{}, 0, damaged
	}
	length := int(binary.LittleEndian.Uint32(b[lengthOffset:]))
	size := headerSize + length
	if string(b[:len(recordMagic)]) != recordMagic || length < fixedSize || size > maxRecord {
		return record{}, 0, damaged
	}
	if len(b) < size {
		return record{}, 0, partial
	}
	b = b[:size]
	if checksum(b) != binary.LittleEndian.Uint32(b[sumOffset:]) {
		return record{}, 0, damaged
	}
	body := b[headerSize:]
	r := record{
		kind:     recordKind(body[0]),
		level:    agentpb.Log_Level(body[1]),
		source:   uuid.UUID(body[2:18]),
		sequence: binary.LittleEndian.Uint64(body[18:]),
		count:    binary.LittleEndian.Uint64(body[26:]),
		time:     time.Unix(0, int64(binary.LittleEndian.Uint64(body[34:]))),
		text:     body[fixedSize:],
	}
	if r.sequence == 0 || r.count == 0 || r.last() < r.sequence {
		return record{}, 0, damaged
	}
	switch r.kind {
	case kindLine, kindGap:
	case kindBatch:
		if len(r.text) < streamSize || r.count > uint64(len(r.text)-streamSize) { // a line takes its length at least
			return record{}, 0, damaged
		}
		r.stream = uuid.UUID(r.text[:16])
		r.offset = binary.LittleEndian.Uint64(r.text[16:])
		r.text = r.text[streamSize:]
	default:
		return record{}, 0, damaged
	}
	return r, size, whole
}

// walk visits the records of b and steps over what is damaged, up to the first that visit refuses. It returns how
// far it came and how many of those bytes were damaged. Unless b is the end of its segment, a record that b holds
// only in part is left for the next stretch.
func walk(b []byte, end bool, visit func(record) bool) (consumed, bad int) {
	for consumed < len(b) {
		r, size, result := decode(b[consumed:])
		if result == whole {
			if !visit(r) {
				return consumed, bad
			}
			consumed += size
			continue
		}
		if result == partial && !end {
			return consumed, bad
		}
		step := bytes.Index(b[consumed+1:], []byte(recordMagic[:1])) + 1
		if step == 0 {
			step = len(b) - consumed
		}
		consumed += step
		bad += step
	}
	return consumed, bad
}
