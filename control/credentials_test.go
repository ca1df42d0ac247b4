package control

import (
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh"

	"github.com/berthd/berth/wire"
)

// withProviders starts a server with an agent and what the configuration says of providers.
func withProviders(t *testing.T, providers string) (*site, wire.Secret) {
	t.Helper()
	config := filepath.Join(t.TempDir(), "berth.yaml")
	writeConfig(t, config, "agents: [{name: demo}]\nexternal_auth:\n"+providers)
	x := serve(t, Config{ConfigFile: config})
	_, token := x.declared("demo")
	return x, token
}

func TestExternalAuth(t *testing.T) {
	dir := t.TempDir()
	x, token := withProviders(t, fmt.Sprintf(`
  - {id: github, token: static-secret}
  - {id: corp, type: gitlab, regex: '^(https://)?git\.example\.com', token_file: %[1]s/token}
  - {id: ci, type: bitbucket-server, regex: '^https://ci', command: [sh, -c, 'echo noise-secret >&2; printf "{\"access_token\":\"printed-secret\",\"expires_at\":\"2999-01-02T03:04:05+01:00\",\"token_extra\":{\"a\":1}}"']}
  - {id: out, regex: '^https://out', command: [sh, -c, 'exit 1']}
  - {id: old, regex: '^https://old', command: [echo, '{"access_token":"old-secret","expires_at":"2001-01-01T00:00:00Z"}']}
  - {id: broken, regex: '^https://broken', command: [printf, 'two-secret\nlines']}
  - {id: endless, regex: '^https://endless', command: [cat, /dev/zero]}
  - {id: absent, regex: '^https://absent', command: [%[1]s/no-such-program]}
`, dir))
	notYet := func(id string) string {
		return fmt.Sprintf(`{"access_token":"","token_extra":null,"url":"%s/external-auth/%s","type":"","expires_at":"0001-01-01T00:00:00Z","username":"","password":""}`, x.url, id)
	}
	const static = `{"access_token":"static-secret","token_extra":null,"url":"","type":"github","expires_at":"0001-01-01T00:00:00Z","username":"static-secret","password":""}`
	for _, tt := range []struct {
		query  string
		status int
		want   string // with a trailing …, how it begins
	}{
		{"id=github", 200, static},
		{"match=github.com", 200, static},
		{"url=https://github.com/berthd/berth&git_branch=main&chat_id=x", 200, static},
		{"match=https://github.com&listen", 200, static},
		{"id=corp", 200, notYet("corp")},
		{"id=out", 200, notYet("out")},
		{"id=old", 200, notYet("old")},
		{"match=https://ci.example.com", 200, `{"access_token":"printed-secret","token_extra":{"a":1},"url":"","type":"bitbucket-server","expires_at":"2999-01-02T02:04:05Z","username":"x-token-auth","password":"printed-secret"}`},
		{"", 400, `{"message":"'url' or 'id' must be provided!"}`},
		{"id=github&match=github.com", 400, `{"message":"'url' and 'id' cannot be provided together!"}`},
		{"match=https://evil.com/github.com", 404, `{"message":"No matching external auth provider found in Coder for the url \"https://evil.com/github.com\".","detail":"Providers: github (^(https?://)?github\\.com(/.*)?$), corp (…`},
		{"id=nobody", 404, `{"message":"No matching external auth provider found in Coder for the id \"nobody\".","detail":"…`},
		{"id=broken", 500, `{"message":"An internal server error occurred.","detail":"cannot use the token of provider \"broken\": it holds more than one line, or control characters"}`},
		{"id=endless", 500, `{"message":"An internal server error occurred.","detail":"cannot get a token of provider \"endless\": cat printed more than 65536 bytes"}`},
		{"id=absent", 500, `{"message":"An internal server error occurred.","detail":"cannot get a token of provider \"absent\": fork/exec …`},
	} {
		for _, name := range []string{"external-auth", "gitauth"} {
			status, body := x.call("GET", "/api/v2/workspaceagents/me/"+name+"?"+tt.query, "", as(token)...)
			begin, partial := strings.CutSuffix(tt.want, "…")
			if status != tt.status || partial && !strings.HasPrefix(body, begin) || !partial && body != tt.want+"\n" {
				t.Errorf("%s?%s: %d %s\nwant %s", name, tt.query, status, body, tt.want)
			}
		}
	}
	if status, body := x.call("GET", "/external-auth/corp", ""); status != 200 || !strings.Contains(body, "token_file") {
		t.Errorf("the page: %d %s", status, body)
	}

	// Who listens is told once the token is there.
	answer := make(chan string)
	go func() {
		_, body := x.call("GET", "/api/v2/workspaceagents/me/external-auth?id=corp&listen=", "", as(token)...)
		answer <- body
	}()
	select {
	case body := <-answer:
		t.Fatalf("an answer before there is a token: %s", body)
	case <-time.After(100 * time.Millisecond): // it may come late, but not early
	}
	if err := os.WriteFile(filepath.Join(dir, "token"), []byte("filed-secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var got wire.ExternalAuth
	if body := <-answer; json.Unmarshal([]byte(body), &got) != nil || got.Username != "oauth2" || got.Password != "filed-secret" || got.URL != "" {
		t.Errorf("after listening: %s", body)
	}
	if regexp.MustCompile(`(static|printed|noise|old|two|filed)-secret`).MatchString(x.log.String()) {
		t.Error("the log holds a secret")
	}
}

// TestListenerHearsOfTheConfiguration: a token may also come with the file, and an agent may lose its own
// while it waits.
func TestListenerHearsOfTheConfiguration(t *testing.T) {
	for name, status := range map[string]int{"good": 200, "revoked": 401} {
		t.Run(name, func(t *testing.T) {
			x, token := withProviders(t, "  - {id: github, command: ['false']}")
			done := make(chan string)
			go func() {
				status, body := x.call("GET", "/api/v2/workspaceagents/me/external-auth?id=github&listen", "", as(token)...)
				done <- fmt.Sprint(status, " ", body)
			}()
			p := x.declaredProviders()[0]
			eventually(t, "somebody listens", func() bool {
				p.mu.Lock()
				defer p.mu.Unlock()
				return !p.asked.IsZero()
			})
			if name == "revoked" { // which it hears of at once, without a credential
				a, err := x.store.AgentByName(t.Context(), "demo")
				if err != nil {
					t.Fatal(err)
				}
				if err := x.store.RevokeTokens(t.Context(), a.ID); err != nil {
					t.Fatal(err)
				}
			} else {
				writeConfig(t, x.config.ConfigFile, "agents: [{name: demo}]\nexternal_auth: [{id: github, token: declared-secret}]")
				if err := x.Reload(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			body := <-done
			if !strings.HasPrefix(body, fmt.Sprint(status)) || strings.Contains(body, "declared-secret") != (status == 200) {
				t.Error(body)
			}
		})
	}
}

// TestListenerEndsWithTheServer: a request that waits for a token ends with the server.
func TestListenerEndsWithTheServer(t *testing.T) {
	x, token := withProviders(t, "  - {id: github, command: ['false']}")
	done := make(chan int)
	go func() {
		status, _ := x.call("GET", "/api/v2/workspaceagents/me/external-auth?id=github&listen", "", as(token)...)
		done <- status
	}()
	eventually(t, "somebody listens", func() bool {
		p := x.declaredProviders()[0]
		p.mu.Lock()
		defer p.mu.Unlock()
		return !p.asked.IsZero()
	})
	go x.stop()
	if status := <-done; status != 503 {
		t.Errorf("status %d", status)
	}
	x.stop()
}

func TestNoProviders(t *testing.T) {
	x := serve(t, Config{})
	_, token := x.create("demo")
	status, body := x.call("GET", "/api/v2/workspaceagents/me/external-auth?match=github.com", "", as(token)...)
	if status != 404 || !strings.HasPrefix(body, `{"message":"No matching external auth provider found in Coder for the url \"github.com\".","detail":"No providers are declared`) {
		t.Errorf("%d %s", status, body)
	}
}

func TestProviderMistakes(t *testing.T) {
	_, err := parseConfig([]byte(`external_auth:
  - {id: "a b", type: github, token: x}
  - {id: gh, type: github}
  - {id: gh, type: github, token: x, command: [y]}
  - {id: other, token: x}
  - {id: re, regex: "(", token: x}
  - {id: tok, type: github, token: "secret\nsecret"}
  - {id: cmd, type: github, command: []}
`))
	want := []string{
		`line 2: provider id "a b": use letters and digits with single dashes between, at most 63`,
		`line 3: a provider needs a token, a token_file or a command, and only one of them`,
		`line 4: provider id "gh" is used twice`,
		`line 4: a provider needs a token, a token_file or a command, and only one of them`,
		`line 5: a provider of type "other" needs a regex, to say which URLs it is for`,
		"line 6: regex \"(\": error parsing regexp: missing closing ): `(`",
		`line 7: cannot use the token: it holds more than one line, or control characters`,
		`line 8: a provider needs a token, a token_file or a command, and only one of them`,
	}
	if diff := cmp.Diff(want, strings.Split(fmt.Sprint(err), "\n")); diff != "" {
		t.Error(diff)
	}
}

// TestGitSSHKey: one pair for the owner, whichever agent asks, also after a restart.
func TestGitSSHKey(t *testing.T) {
	dir := t.TempDir()
	x := serve(t, Config{DataDir: dir})
	_, token := x.create("demo")
	_, other := x.create("other")
	ask := func(x *site, token wire.Secret) string {
		status, body := x.call("GET", "/api/v2/workspaceagents/me/gitsshkey", "", as(token)...)
		if status != 200 {
			t.Fatalf("%d %s", status, body)
		}
		return body
	}
	first := ask(x, token)
	if ask(x, other) != first {
		t.Error("another agent gets another key")
	}
	var key wire.GitSSHKey
	if err := json.Unmarshal([]byte(first), &key); err != nil {
		t.Fatal(err)
	}
	public, _, _, _, err := ssh.ParseAuthorizedKey([]byte(key.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	private, err := ssh.ParseRawPrivateKey([]byte(key.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if _, ok := private.(*ed25519.PrivateKey); !ok || err != nil || string(signer.PublicKey().Marshal()) != string(public.Marshal()) {
		t.Errorf("a %T whose public half is another: %v", private, err)
	}
	secret := strings.Split(key.PrivateKey, "\n")[2]
	x.stop()
	if strings.Contains(x.log.String(), secret) {
		t.Error("the log holds the private key")
	}
	if ask(serve(t, Config{DataDir: dir}), token) != first {
		t.Error("after a restart it is another key")
	}
}

func FuzzCredential(f *testing.F) {
	for _, seed := range []string{"", "token\n", "{}", `{"access_token":"x","expires_at":"2999-01-01T00:00:00Z","token_extra":{"a":[]}}`, `{"access_token":"x","token_extra":[]}`, "a\x00b", "\xff"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := parseCredential(text)
		if err != nil {
			return
		}
		// What was taken is written down without loss.
		var got wire.ExternalAuth
		body, err := json.Marshal(wire.ExternalAuth{AccessToken: c.token.Reveal(), TokenExtra: c.extra, ExpiresAt: c.expires})
		if err != nil || json.Unmarshal(body, &got) != nil || got.AccessToken != c.token.Reveal() || got.AccessToken == "" {
			t.Errorf("%q became %s: %v", text, body, err)
		}
	})
}

func FuzzProviderQuery(f *testing.F) {
	f.Add("match=https://github.com/x")
	f.Add("id=github&url=x")
	f.Add("id=&match=&url=y")
	providers := (&mistakes{}).checkProviders([]fileProvider{{ID: "github", Token: "x"}, {ID: "gitlab", Token: "y"}})
	f.Fuzz(func(t *testing.T, text string) {
		query, _ := url.ParseQuery(text)
		p, e := findProvider(providers, query)
		if (p == nil) == (e == nil) || e != nil && (e.StatusCode != 400 && e.StatusCode != 404 || len(e.Message) > 1024) {
			t.Errorf("%q: %v, %v", text, p, e)
		}
	})
}
