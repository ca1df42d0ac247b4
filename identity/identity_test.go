package identity_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/berthd/berth/identity"
	"github.com/berthd/berth/internal/testnet"
	"github.com/berthd/berth/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestToken(t *testing.T) {
	for _, test := range []struct {
		name, in, want, wantErr string
	}{
		{name: "plain", in: "abc-1", want: "abc-1"},
		{name: "white space around", in: " abc-1\r\n", want: "abc-1"},
		{name: "empty", in: " \n", wantErr: "token is empty"},
		{name: "two lines", in: "abc\ndef", wantErr: "must be one word"},
		{name: "not ASCII", in: "abc\u00e9", wantErr: "must be one word"},
		{name: "control character", in: "abc\x00", wantErr: "must be one word"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "token")
			if err := os.WriteFile(path, []byte(test.in), 0o600); err != nil {
				t.Fatal(err)
			}
			for _, source := range []identity.Source{identity.Token(wire.Secret(test.in)), identity.TokenFile(path, nil)} {
				got, err := source.Token(t.Context())
				if got.Reveal() != test.want {
					t.Errorf("%s: token %q, want %q", source, got.Reveal(), test.want)
				}
				if (err == nil) != (test.wantErr == "") || err != nil && !strings.Contains(err.Error(), test.wantErr) {
					t.Errorf("%s: error %v, want %q", source, err, test.wantErr)
				}
				if err != nil && strings.Contains(err.Error(), "abc") {
					t.Errorf("%s: error tells the token: %v", source, err)
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
		if _, err := identity.TokenFile(path, nil).Token(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
}

// cloud is an EC2 instance and a control server that knows it.
type cloud struct {
	*testnet.FakeAWS
	metadata string
	exchange *identity.Exchanger
	asked    []wire.AWSInstanceIdentity
	// refuse, when set, answers in place of the server.
	refuse http.HandlerFunc
}

func newCloud(t *testing.T) *cloud {
	t.Helper()
	fake, err := testnet.NewFakeAWS()
	if err != nil {
		t.Fatal(err)
	}
	metadata := httptest.NewServer(fake)
	t.Cleanup(metadata.Close)
	verifier, err := fake.Attester()
	if err != nil {
		t.Fatal(err)
	}
	c := &cloud{FakeAWS: fake, metadata: metadata.URL}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c.refuse != nil {
			c.refuse(w, r)
			return
		}
		var proof wire.AWSInstanceIdentity
		if err := json.NewDecoder(r.Body).Decode(&proof); err != nil {
			t.Error(err)
		}
		c.asked = append(c.asked, proof)
		instance, err := verifier.Verify(proof.Signature, proof.Document)
		if err != nil {
			t.Error(err)
		}
		if r.Method != http.MethodPost || r.URL.Path != "/base/api/v2/workspaceagents/aws-instance-identity" {
			t.Errorf("%s %s", r.Method, r.URL)
		}
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		json.NewEncoder(w).Encode(wire.SessionToken{SessionToken: fmt.Sprintf("token-%d-of-%s", len(c.asked), instance.ID)})
	}))
	t.Cleanup(server.Close)
	u, err := url.Parse(server.URL + "/base")
	if err != nil {
		t.Fatal(err)
	}
	c.exchange = &identity.Exchanger{URL: u, HTTP: server.Client()}
	return c
}

func TestAWS(t *testing.T) {
	c := newCloud(t)
	// A metadata call that went through a proxy would fail here, and might elsewhere reach another machine's.
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	t.Setenv("http_proxy", "http://127.0.0.1:1")
	t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", c.metadata)
	var stages []string
	source := identity.AWS(identity.AWSConfig{
		AgentName: "main", Exchange: c.exchange,
		Stage: func(name string, took time.Duration) {
			if took <= 0 {
				t.Errorf("%s took %v", name, took)
			}
			stages = append(stages, name)
		},
	})
	for i := range 2 {
		token, err := source.Token(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("token-%d-of-%s", i+1, c.InstanceID()); token.Reveal() != want {
			t.Errorf("token %q, want %q", token.Reveal(), want)
		}
	}
	if len(c.asked) != 2 || c.asked[0].AgentName != "main" {
		t.Errorf("asked %+v", c.asked)
	}
	want := []string{identity.StageFetched, identity.StageExchanged, identity.StageFetched, identity.StageExchanged}
	if diff := cmp.Diff(want, stages); diff != "" {
		t.Errorf("stages (-want +got):\n%s", diff)
	}
}

func TestAWSExplainsMetadataFailures(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	answer := func(h http.HandlerFunc) func(*testing.T, *cloud) string {
		return func(t *testing.T, _ *cloud) string {
			srv := httptest.NewServer(h)
			t.Cleanup(srv.Close)
			return srv.URL
		}
	}
	for _, test := range []struct {
		name     string
		endpoint func(*testing.T, *cloud) string
		want     []string
	}{
		{
			"hop limit", func(_ *testing.T, c *cloud) string { c.SetMode(testnet.AWSHopLimit); return c.metadata },
			[]string{"token does not arrive", "--http-put-response-hop-limit 2", "token file"},
		},
		{
			"switched off", func(_ *testing.T, c *cloud) string { c.SetMode(testnet.AWSOff); return c.metadata },
			[]string{"switched off", "--http-endpoint enabled"},
		},
		{
			"disabled", func(t *testing.T, c *cloud) string { t.Setenv("AWS_EC2_METADATA_DISABLED", "true"); return c.metadata },
			[]string{"AWS_EC2_METADATA_DISABLED=true", "unset it"},
		},
		{
			"nobody there", func(*testing.T, *cloud) string { return "http://" + closed.Addr().String() },
			[]string{"not on AWS", "token file"},
		},
		{
			"another cloud", answer(http.NotFound),
			[]string{"not AWS's metadata service", "another cloud"},
		},
		{
			"IMDSv1 only", answer(func(w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodPut {
					w.WriteHeader(http.StatusMethodNotAllowed)
					return
				}
				t.Error("read without a token")
			}),
			[]string{"not AWS's metadata service"},
		},
		{
			"redirect", answer(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path != "/latest/api/token" {
					t.Errorf("followed to %s", r.URL)
				}
				http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
			}),
			[]string{"status 307"},
		},
		{
			"endless token", answer(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "60")
				w.Write(make([]byte, 1<<20))
			}),
			[]string{"strange answer", "too large"},
		},
		{
			"endless document", answer(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "60")
				if r.Method == http.MethodPut {
					w.Write([]byte("t"))
					return
				}
				w.Write(make([]byte, 1<<20))
			}),
			[]string{"strange answer", "too large"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newCloud(t)
			source := identity.AWS(identity.AWSConfig{Exchange: c.exchange, Endpoint: test.endpoint(t, c)})
			_, err := source.Token(t.Context())
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error lacks %q: %v", want, err)
				}
			}
			if len(c.asked) != 0 {
				t.Errorf("the server was asked %d times", len(c.asked))
			}
		})
	}
}

func TestExchangeErrors(t *testing.T) {
	c := newCloud(t)
	source := identity.AWS(identity.AWSConfig{Exchange: c.exchange, Endpoint: c.metadata})
	for _, status := range []int{400, 401, 404, 409, 425, 429, 500, 503} {
		c.refuse = func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json; charset=utf-8")
			w.WriteHeader(status)
			json.NewEncoder(w).Encode(wire.Error{Message: "Multiple agents found: a, b"})
		}
		_, err := source.Token(t.Context())
		var answer *wire.Error
		if !errors.As(err, &answer) || answer.StatusCode != status || !strings.Contains(err.Error(), "a, b") {
			t.Errorf("status %d: %v", status, err)
		}
	}
	c.refuse = func(w http.ResponseWriter, r *http.Request) { w.Write([]byte("<html>welcome")) }
	var page *wire.UnexpectedResponse
	if _, err := source.Token(t.Context()); !errors.As(err, &page) || page.StatusCode != 200 {
		t.Errorf("a page: %v", err)
	}
	c.refuse = func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Write([]byte(`{"session_token":""}`))
	}
	if _, err := source.Token(t.Context()); err == nil || !strings.Contains(err.Error(), "token is empty") {
		t.Errorf("empty token: %v", err)
	}
}
