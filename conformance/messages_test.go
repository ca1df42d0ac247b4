package conformance

import (
	_ "embed"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"reflect"
	"sort"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// The tables are the ones of the protocol pages, field by field. Messages are coded from them with nothing
// but protowire's varints, so no generated code of berth's can carry a mistake into these tests.
//
//go:embed testdata/messages.txt
var messageTables string

// m is a message: field names to values. Integers and enums are int64 when read and any integer when
// written, bytes are []byte, sub-messages are m, repeated fields are []any, maps are map[string]any with
// the key's text. A field that is not on the wire is not in the map; one not in the tables is "?number".
type m = map[string]any

type field struct {
	name   string
	number protowire.Number
	kind   string // one, maybe, many, map
	key    string // of a map
	typ    string
}

var (
	messages = map[string][]field{}
	enums    = map[string]map[string]int64{}
)

func init() {
	var name string
	var values map[string]int64
	for _, line := range strings.Split(messageTables, "\n") {
		w := strings.Fields(line)
		switch indented := strings.HasPrefix(line, " "); {
		case len(w) == 0 || w[0] == "#":
		case !indented && w[0] == "message":
			name, values = w[1], nil
			messages[name] = []field{}
		case !indented && w[0] == "enum":
			values = map[string]int64{}
			enums[w[1]] = values
		case values != nil:
			n, _ := strconv.ParseInt(w[1], 10, 64)
			values[w[0]] = n
		default:
			n, _ := strconv.Atoi(w[1])
			f := field{name: w[0], number: protowire.Number(n), kind: w[2], typ: w[len(w)-1]}
			if f.kind == "map" {
				f.key = w[3]
			}
			messages[name] = append(messages[name], f)
		}
	}
}

// encode writes a message by its table. What the table cannot hold is a mistake of the test, and panics.
func encode(name string, v m) []byte {
	table, ok := messages[name]
	if !ok {
		panic("no table for " + name)
	}
	var b []byte
	written := 0
	for _, f := range table {
		value, ok := v[f.name]
		if !ok {
			continue
		}
		written++
		switch f.kind {
		case "many":
			list := reflect.ValueOf(value)
			for i := range list.Len() {
				b = appendValue(b, f.number, f.typ, list.Index(i).Interface())
			}
		case "map":
			entries := reflect.ValueOf(value)
			keys := entries.MapKeys()
			sort.Slice(keys, func(i, j int) bool { return fmt.Sprint(keys[i]) < fmt.Sprint(keys[j]) })
			for _, key := range keys {
				var k any = key.Interface()
				if text, isText := k.(string); isText && f.key != "string" {
					k, _ = strconv.ParseInt(text, 10, 64)
				}
				entry := appendValue(nil, 1, f.key, k)
				entry = appendValue(entry, 2, f.typ, entries.MapIndex(key).Interface())
				b = protowire.AppendBytes(protowire.AppendTag(b, f.number, protowire.BytesType), entry)
			}
		default:
			b = appendValue(b, f.number, f.typ, value)
		}
	}
	if raw, ok := v["?"]; ok { // bytes as they are, for what no honest peer would send
		written++
		b = append(b, raw.([]byte)...)
	}
	if written != len(v) {
		panic(fmt.Sprintf("%s has not all of the fields %v", name, v))
	}
	return b
}

func appendValue(b []byte, n protowire.Number, typ string, v any) []byte {
	switch typ {
	case "bytes":
		return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), v.([]byte))
	case "string":
		return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), v.(string))
	case "bool":
		return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), protowire.EncodeBool(v.(bool)))
	case "double":
		return protowire.AppendFixed64(protowire.AppendTag(b, n, protowire.Fixed64Type), math.Float64bits(v.(float64)))
	case "float":
		return protowire.AppendFixed32(protowire.AppendTag(b, n, protowire.Fixed32Type), math.Float32bits(float32(v.(float64))))
	case "int32", "int64", "uint32", "uint64":
		return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), integer(v))
	}
	if values, ok := enums[typ]; ok {
		if name, isName := v.(string); isName {
			number, known := values[name]
			if !known {
				panic(typ + " has no " + name)
			}
			v = number
		}
		return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), integer(v))
	}
	switch t := v.(type) {
	case time.Time:
		v = m{"seconds": t.Unix(), "nanos": t.Nanosecond()}
	case time.Duration:
		v = m{"seconds": int64(t / time.Second), "nanos": int64(t % time.Second)}
		for name, n := range v.(m) { // as senders do, which leave defaults out
			if n == int64(0) {
				delete(v.(m), name)
			}
		}
	}
	return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), encode(typ, v.(m)))
}

func integer(v any) uint64 {
	r := reflect.ValueOf(v)
	if r.CanInt() {
		return uint64(r.Int())
	}
	return r.Uint()
}

// decode reads a message by its table; bytes that no message can be made of are an error.
func decode(name string, b []byte) (m, error) {
	table, ok := messages[name]
	if !ok {
		panic("no table for " + name)
	}
	v := m{}
	for len(b) > 0 {
		n, wire, size := protowire.ConsumeTag(b)
		if size < 0 {
			return nil, fmt.Errorf("%s: %w", name, protowire.ParseError(size))
		}
		b = b[size:]
		size = protowire.ConsumeFieldValue(n, wire, b)
		if size < 0 {
			return nil, fmt.Errorf("%s field %d: %w", name, n, protowire.ParseError(size))
		}
		raw := b[:size]
		b = b[size:]
		i := 0
		for i < len(table) && table[i].number != n {
			i++
		}
		if i == len(table) {
			v["?"+strconv.Itoa(int(n))] = raw
			continue
		}
		f := table[i]
		switch f.kind {
		case "map":
			entry, _ := protowire.ConsumeBytes(raw)
			key, value, err := decodeEntry(f, entry)
			if err != nil {
				return nil, fmt.Errorf("%s.%s: %w", name, f.name, err)
			}
			if v[f.name] == nil {
				v[f.name] = m{}
			}
			v[f.name].(m)[key] = value
		case "many":
			list, _ := v[f.name].([]any)
			if wire == protowire.BytesType && packable(f.typ) {
				packed, _ := protowire.ConsumeBytes(raw)
				for len(packed) > 0 {
					x, size := protowire.ConsumeVarint(packed)
					if size < 0 {
						return nil, fmt.Errorf("%s.%s: bad packed list", name, f.name)
					}
					list, packed = append(list, number(f.typ, x)), packed[size:]
				}
			} else {
				value, err := decodeValue(f.typ, wire, raw)
				if err != nil {
					return nil, fmt.Errorf("%s.%s: %w", name, f.name, err)
				}
				list = append(list, value)
			}
			v[f.name] = list
		default:
			value, err := decodeValue(f.typ, wire, raw)
			if err != nil {
				return nil, fmt.Errorf("%s.%s: %w", name, f.name, err)
			}
			v[f.name] = value
		}
	}
	return v, nil
}

func packable(typ string) bool {
	_, enum := enums[typ]
	return enum || typ == "int32" || typ == "int64" || typ == "uint32" || typ == "uint64"
}

func number(typ string, x uint64) int64 {
	if _, enum := enums[typ]; enum || typ == "int32" {
		return int64(int32(x))
	}
	return int64(x)
}

func decodeEntry(f field, entry []byte) (string, any, error) {
	var key any = ""
	if f.key != "string" {
		key = int64(0)
	}
	var value any
	for len(entry) > 0 {
		n, wire, size := protowire.ConsumeTag(entry)
		if size < 0 {
			return "", nil, errors.New("bad map entry")
		}
		entry = entry[size:]
		if size = protowire.ConsumeFieldValue(n, wire, entry); size < 0 {
			return "", nil, errors.New("bad map entry")
		}
		var err error
		if n == 1 {
			key, err = decodeValue(f.key, wire, entry[:size])
		} else {
			value, err = decodeValue(f.typ, wire, entry[:size])
		}
		if err != nil {
			return "", nil, err
		}
		entry = entry[size:]
	}
	if value == nil { // a default value may be left out
		switch f.typ {
		case "string":
			value = ""
		case "double":
			value = 0.0
		case "int64", "int32":
			value = int64(0)
		default:
			value = m{}
		}
	}
	return fmt.Sprint(key), value, nil
}

func decodeValue(typ string, wire protowire.Type, raw []byte) (any, error) {
	want := protowire.BytesType
	switch {
	case typ == "double":
		want = protowire.Fixed64Type
	case typ == "float":
		want = protowire.Fixed32Type
	case typ == "bool" || packable(typ):
		want = protowire.VarintType
	}
	if wire != want {
		return nil, fmt.Errorf("wire type %d, not %d", wire, want)
	}
	switch want {
	case protowire.VarintType:
		x, _ := protowire.ConsumeVarint(raw)
		if typ == "bool" {
			return protowire.DecodeBool(x), nil
		}
		return number(typ, x), nil
	case protowire.Fixed64Type:
		x, _ := protowire.ConsumeFixed64(raw)
		return math.Float64frombits(x), nil
	case protowire.Fixed32Type:
		x, _ := protowire.ConsumeFixed32(raw)
		return float64(math.Float32frombits(x)), nil
	}
	b, _ := protowire.ConsumeBytes(raw)
	switch typ {
	case "bytes":
		return append([]byte{}, b...), nil
	case "string":
		return string(b), nil
	}
	return decode(typ, b)
}

// The accessors below answer what a message lacks with proto3's default.

func text(v m, name string) string { s, _ := v[name].(string); return s }
func blob(v m, name string) []byte { b, _ := v[name].([]byte); return b }
func num(v m, name string) int64   { n, _ := v[name].(int64); return n }
func flag(v m, name string) bool   { b, _ := v[name].(bool); return b }
func list(v m, name string) []any  { l, _ := v[name].([]any); return l }
func sub(v m, name string) m       { s, _ := v[name].(m); return s }
func has(v m, name string) bool    { _, ok := v[name]; return ok }
func seconds(v m) float64          { return float64(num(v, "seconds")) + float64(num(v, "nanos"))/1e9 }
func instant(v m) time.Time        { return time.Unix(num(v, "seconds"), num(v, "nanos")) }
func enum(typ string, n int64) string {
	for name, value := range enums[typ] {
		if value == n {
			return name
		}
	}
	return strconv.FormatInt(n, 10)
}

// uuidBytes are the sixteen bytes of a UUID's text.
func uuidBytes(s string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != 16 {
		panic("not a UUID: " + s)
	}
	return b
}

func uuidText(b []byte) string {
	if len(b) != 16 {
		return "not a UUID: " + base64.StdEncoding.EncodeToString(b)
	}
	h := hex.EncodeToString(b)
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// TestMessageTables holds the coder to bytes that were worked out by hand.
func TestMessageTables(t *testing.T) {
	for _, c := range []struct {
		name string
		v    m
		wire string
	}{
		{"agent.UpdateStartupRequest", m{"startup": m{"version": "v1", "subsystems": []string{"ENVBOX", "EXECTRACE"}}}, "0a080a0276311801" + "1803"},
		{"agent.BatchUpdateMetadataRequest", m{"metadata": []m{{"key": "a", "result": m{"age": -1}}}}, "12100a016112" + "0b10ffffffffffffffffff01"},
		{"tailnet.Node", m{"derp_latency": map[string]float64{"999-v4": 1}, "derp_forced_websocket": map[int]string{999: "x"}},
			"32110a063939392d763411000000000000f03f" + "3a0608e7071201" + "78"},
		{"agent.Manifest", m{"metadata": []m{{"interval": 10 * time.Nanosecond}}}, "6204" + "2202" + "100a"},
	} {
		got := encode(c.name, c.v)
		if hex.EncodeToString(got) != c.wire {
			t.Errorf("%s %v is %x, not %s", c.name, c.v, got, c.wire)
		}
		back, err := decode(c.name, got)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if again := encode(c.name, back); string(again) != string(got) {
			t.Errorf("%s read and written again is %x, not %x", c.name, again, got)
		}
	}
	if _, err := decode("agent.Startup", []byte{0x0a, 0x05, 'v'}); err == nil {
		t.Error("a cut message was read")
	}
}
