package identity_test

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/berthd/berth/identity"
	"github.com/berthd/berth/wire"
)

// wantFailure checks that an error is a failure of this machine whose cause and fix hold the words.
func wantFailure(t *testing.T, err error, cause, fix string) {
	t.Helper()
	var f *identity.Failure
	if !errors.As(err, &f) {
		t.Fatalf("%v is no failure of this machine", err)
	}
	if !strings.Contains(f.Cause, cause) || !strings.Contains(f.Fix, fix) {
		t.Errorf("cause %q, fix %q; want %q and %q", f.Cause, f.Fix, cause, fix)
	}
}

func TestToken(t *testing.T) {
	for _, test := range []struct {
		name, in, want, wantErr string
	}{
		{name: "plain", in: "abc-1", want: "abc-1"},
		{name: "white space around", in: " abc-1\r\n", want: "abc-1"},
		{name: "empty", in: " \n", wantErr: "it is empty"},
		{name: "two lines", in: "abc\ndef", wantErr: "must be one word"},
		{name: "not ASCII", in: "abc\u00e9", wantErr: "must be one word"},
		{name: "control character", in: "abc\x00", wantErr: "must be one word"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "token")
			if err := os.WriteFile(path, []byte(test.in), 0o600); err != nil {
				t.Fatal(err)
			}
			for _, source := range []identity.Source{
				identity.Token(wire.Secret(test.in)), identity.TokenFile(path, nil), identity.Credential(dir, "token"),
			} {
				got, err := source.Token(t.Context())
				if got.Reveal() != test.want {
					t.Errorf("%s: token %q, want %q", source, got.Reveal(), test.want)
				}
				if (err == nil) != (test.wantErr == "") {
					t.Errorf("%s: error %v, want %q", source, err, test.wantErr)
				}
				if err != nil {
					wantFailure(t, err, test.wantErr, "nothing else")
				}
				if err != nil && strings.Contains(err.Error(), "abc") {
					t.Errorf("%s: error tells the token: %v", source, err)
				}
				if source.Renews() {
					t.Errorf("%s says that another token comes by itself", source)
				}
			}
		})
	}
}

func TestTokenFileIsReadAnew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	var warnings []string
	source := identity.TokenFile(path, func(s string) { warnings = append(warnings, s) })
	if _, err := source.Token(t.Context()); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), path) {
		t.Errorf("missing file: %v", err)
	}
	for i, mode := range []os.FileMode{0o600, 0o640, 0o604} {
		want := fmt.Sprintf("token-%d", i)
		if err := os.WriteFile(path, []byte(want+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if got, err := source.Token(t.Context()); err != nil || got.Reveal() != want {
			t.Errorf("token %q, %v, want %q", got.Reveal(), err, want)
		}
	}
	want := []string{fmt.Sprintf("token file %s can be read by others than its owner (mode 0640): chmod 600 %s", path, path)}
	if diff := cmp.Diff(want, warnings); diff != "" {
		t.Errorf("warnings (-want +got):\n%s", diff)
	}
}

func TestTokenFileRefuses(t *testing.T) {
	dir := t.TempDir()
	long := filepath.Join(dir, "long")
	if err := os.WriteFile(long, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{dir: "not a regular file", long: "holds more than", os.DevNull: "not a regular file"} {
		_, err := identity.TokenFile(path, nil).Token(t.Context())
		wantFailure(t, err, want, "write the token into it")
	}
}

func TestCredential(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "agent-token"), []byte("abc"), 0o440); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ dir, name string }{{"", "agent-token"}, {dir, "other"}, {dir, ""}, {dir, "../" + filepath.Base(dir) + "/agent-token"}} {
		if source := identity.Credential(test.dir, test.name); source != nil {
			t.Errorf("%q in %q: %v, want none", test.name, test.dir, source)
		}
	}
	source := identity.Credential(dir, "agent-token")
	if token, err := source.Token(t.Context()); err != nil || token.Reveal() != "abc" {
		t.Errorf("token %q, %v", token.Reveal(), err)
	}
}

// jwt is a token with these claims and no signature that anybody checks here.
func jwt(t *testing.T, claims map[string]any) string {
	t.Helper()
	text, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	return "eyJhbGciOiJSUzI1NiJ9." + base64.RawURLEncoding.EncodeToString(text) + ".c2lnbmVk"
}

func TestKubernetesToken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	source := identity.KubernetesToken(path)
	if !source.Renews() {
		t.Error("the kubelet renews the token, and the source denies it")
	}
	_, err := source.Token(t.Context())
	wantFailure(t, err, path, "projected serviceAccountToken")
	for i, life := range []time.Duration{time.Hour, 2 * time.Hour} {
		want := jwt(t, map[string]any{"aud": []string{"berth"}, "exp": time.Now().Add(life).Unix()})
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		if token, err := source.Token(t.Context()); err != nil || token.Reveal() != want {
			t.Errorf("token %d: %q, %v", i, token.Reveal(), err)
		}
	}
	for text, want := range map[string][2]string{
		"abc": {"three parts", "--auth token"},
		"":    {"it is empty", "projected"},
		jwt(t, map[string]any{"exp": time.Now().Add(-time.Hour).Unix()}): {"expired at", "subPath"},
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		_, err := source.Token(t.Context())
		wantFailure(t, err, want[0], want[1])
		if text != "" && strings.Contains(err.Error(), text) {
			t.Errorf("error tells the token: %v", err)
		}
	}
}
