package mask

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/berthd/berth/wire"
)

func TestMasker(t *testing.T) {
	m := New("s3cret-value", "s3cret-value-and-more", "-----BEGIN KEY-----\r\nMIIEabcdefgh\nshort\n-----END KEY-----\n", "true", " padded-value\n", "bin\xff\x00ary")
	for text, want := range map[string]string{
		"":                                "",
		"nothing to hide, true":           "nothing to hide, true",
		"a s3cret-value b":                "a [hidden] b",
		"s3cret-values3cret-value":        "[hidden][hidden]",
		"s3cret-value-and-more":           "[hidden]",
		"s3cret-value-and-mor":            "[hidden]-and-mor",
		"s3cret-valu":                     "s3cret-valu",
		"key: MIIEabcdefgh short":         "key: [hidden] short",
		"padded-value":                    "[hidden]",
		"bin\xff\x00ary":                  "[hidden]",
		"ss3cret-value -----BEGIN KEY---": "s[hidden] -----BEGIN KEY---",
	} {
		if got := m.String(text); got != want {
			t.Errorf("%q becomes %q, want %q", text, got, want)
		}
	}
	for text, want := range map[string]int{"": 0, "none": 0, "xs3c": 3, "s3cret-valu": 11, "s3cret-value-an": 15, "a -": 1} {
		if got := m.Begun([]byte(text)); got != want {
			t.Errorf("%d bytes of %q may begin a secret, want %d", got, text, want)
		}
	}
}

func TestNilAndEmptyHideNothing(t *testing.T) {
	for name, m := range map[string]*Masker{"nil": nil, "new": New(), "short": New("", "1234567", "\n")} {
		if got := m.String("1234567 text"); got != "1234567 text" || m.Begun([]byte("123")) != 0 {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func TestCopy(t *testing.T) {
	m := New("s3cret-value", "value-ends")
	const text = "a s3cret-value b s3cret-values3cret-valu"
	for name, r := range map[string]io.Reader{"at once": strings.NewReader(text), "byte by byte": iotest.OneByteReader(strings.NewReader(text))} {
		var out strings.Builder
		if err := m.Copy(&out, r); err != nil || out.String() != "a [hidden] b [hidden]s3cret-valu" {
			t.Errorf("%s: %q, %v", name, &out, err)
		}
	}
	failed := errors.New("failed")
	if err := m.Copy(io.Discard, iotest.ErrReader(failed)); err != failed {
		t.Errorf("reading failed: %v", err)
	}
}

// TestTextIsNotChanged: what is passed may be somebody's buffer.
func TestTextIsNotChanged(t *testing.T) {
	m := New("s3cret-value")
	text := []byte("a s3cret-value b")
	shown := m.Bytes(text[:len(text):len(text)])
	if string(text) != "a s3cret-value b" || string(shown) != "a [hidden] b" {
		t.Errorf("%q, %q", text, shown)
	}
}

func TestNewestAreKept(t *testing.T) {
	m := New()
	for i := range maxKept + 1 {
		m.Add(wire.Secret(fmt.Sprintf("secret-%06d", i)))
		m.Add("secret-000001")
	}
	if got := m.String("secret-000000 secret-000001 secret-004096"); got != "secret-000000 [hidden] [hidden]" {
		t.Error(got)
	}
}

func FuzzMasker(f *testing.F) {
	f.Add("s3cret-value", "s3cret-values3cret-value", []byte("a s3cret-value b"), 5)
	f.Add("aaaaaaaa", "aaaaaaaaab", []byte("aaaaaaaaaaaaaaaaaaab"), 9)
	f.Add("\xff\x00\xff\x00\xff\x00\xff\x00", "12345678\n87654321", []byte("\xff\x00\xff\x00\xff\x00\xff\x00"), 3)
	f.Fuzz(func(t *testing.T, one, two string, text []byte, at int) {
		m := New(wire.Secret(one), wire.Secret(two))
		shown := m.Bytes(bytes.Clone(text))
		if len(shown) > len(text) {
			t.Fatalf("%q grew to %q", text, shown)
		}
		for _, secret := range m.known {
			// A secret may arise from what stands around a mask, but only with a piece of it.
			if rest := strings.ReplaceAll(string(shown), Hidden, "\n"); strings.Contains(rest, secret) {
				t.Errorf("%q shows %q in %q", secret, shown, text)
			}
		}
		// Cut anywhere, what is left of the cut shows no beginning of a secret that goes on behind it.
		at = min(max(at, 0), len(text))
		head := text[:at]
		head = head[:len(head)-m.Begun(head)]
		for _, secret := range m.known {
			for n := 1; n < len(secret); n++ {
				if strings.HasSuffix(string(head), secret[:n]) && strings.HasPrefix(string(text[len(head)-n:]), secret) && len(head)-n+len(secret) > at {
					t.Errorf("%q is cut into %q", secret, head)
				}
			}
		}
	})
}

func BenchmarkMasker(b *testing.B) {
	m := New("4a1e5bb4-57a7-4c1c-94ac-2b80e5b5e7a1")
	for i := range 10 {
		m.Add(wire.Secret(fmt.Sprintf("%c-secret-%d", 'a'+i, i)))
	}
	line := []byte(strings.Repeat("2026-11-26T18:49:28Z some words of a line of a log; ", 2))
	b.SetBytes(int64(len(line)))
	for b.Loop() {
		m.Bytes(line)
	}
}
