package reporter

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
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
// The magic holds bytes that no cleaned text has, so a reader that lost its place finds the next
// record by looking for it, and no line can pretend to be one.
const (
	recordMagic  = "\xffBL\x00"
	headerSize   = len(recordMagic) + 4 + 4
	fixedSize    = 1 + 1 + 16 + 8 + 8 + 8
	maxRecord    = headerSize + fixedSize + maxLine + maxMark
	lengthOffset = len(recordMagic)
	sumOffset    = lengthOffset + 4
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

type recordKind byte

const (
	kindLine recordKind = 1
	kindGap  recordKind = 2 // stands for lines that were dropped
)

type record struct {
	kind     recordKind
	level    agentpb.Log_Level
	source   uuid.UUID
	sequence uint64
	count    uint64
	time     time.Time
	text     []byte
}

// last returns the last sequence number that r stands for.
func (r record) last() uint64 { return r.sequence + r.count - 1 }

// appendTo appends r's encoding to b.
func (r record) appendTo(b []byte) []byte {
	start := len(b)
	b = append(b, recordMagic...)
	b = binary.LittleEndian.AppendUint32(b, uint32(fixedSize+len(r.text)))
	b = append(b, 0, 0, 0, 0, byte(r.kind), byte(r.level))
	b = append(b, r.source[:]...)
	b = binary.LittleEndian.AppendUint64(b, r.sequence)
	b = binary.LittleEndian.AppendUint64(b, r.count)
	b = binary.LittleEndian.AppendUint64(b, uint64(r.time.UnixNano()))
	b = append(b, r.text...)
	binary.LittleEndian.PutUint32(b[start+sumOffset:], checksum(b[start:]))
	return b
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
	if (r.kind != kindLine && r.kind != kindGap) || r.sequence == 0 || r.count == 0 || r.last() < r.sequence {
		return record{}, 0, damaged
	}
	return r, size, whole
}

// walk visits the records of b and steps over what is damaged. It returns how far it came and how
// many of those bytes were damaged. Unless b is the end of its segment, a record that b holds only
// in part is left for the next stretch.
func walk(b []byte, end bool, visit func(record)) (consumed, bad int) {
	for consumed < len(b) {
		r, size, result := decode(b[consumed:])
		if result == whole {
			visit(r)
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
