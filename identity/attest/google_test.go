package attest

import (
	"crypto"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/berthd/berth/internal/testnet"
)

const (
	audience   = "http://berth.example?challenge=abc"
	instanceID = "4080561024171678567"
)

// published is a [Google] that believes a signer's keys.
type published struct {
	*Google
	*testnet.GoogleSigner
}

func newGoogle(t testing.TB, config GoogleConfig) published {
	t.Helper()
	signer, err := testnet.NewGoogleSigner()
	if err != nil {
		t.Fatal(err)
	}
	config.KeysURL = &url.URL{Scheme: "http", Host: "keys.invalid", Path: "/certs"}
	config.HTTP = &http.Client{Transport: handlerTransport{signer}}
	return published{NewGoogle(config), signer}
}

// handlerTransport answers requests by a handler, without a network.
type handlerTransport struct{ http.Handler }

func (h handlerTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, r)
	return rec.Result(), nil
}

func (p published) token(t testing.TB, change func(claims map[string]any)) string {
	t.Helper()
	claims := testnet.GoogleClaims(audience, instanceID, "proj", "us-central1-a", p.clock.now())
	if change != nil {
		change(claims)
	}
	token, err := p.Sign(claims)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// machine returns the claims about the machine.
func machine(claims map[string]any) map[string]any {
	return claims["google"].(map[string]any)["compute_engine"].(map[string]any)
}

func TestGoogle(t *testing.T) {
	now := time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)
	g := newGoogle(t, GoogleConfig{Now: at(now)})
	set := func(name string, value any) func(map[string]any) {
		return func(c map[string]any) { c[name] = value }
	}
	of := func(name string, value any) func(map[string]any) {
		return func(c map[string]any) { machine(c)[name] = value }
	}
	for _, test := range []struct {
		name   string
		change func(map[string]any)
		want   string // in the error; empty means accepted
		claims bool   // whether it is a matter of claims
	}{
		{name: "good"},
		{name: "issuer without a scheme", change: set("iss", "accounts.google.com")},
		{name: "more claims", change: func(c map[string]any) { c["hd"] = "x"; machine(c)["license_id"] = []string{"1"} }},
		{name: "over by less than clocks differ", change: func(c map[string]any) { c["iat"], c["exp"] = now.Unix()-3600, now.Unix()-50 }},
		{name: "iat ahead by less than clocks differ", change: func(c map[string]any) { c["iat"] = now.Unix() + 290 }},

		{name: "another audience", change: set("aud", "coder"), want: "audience"},
		{name: "no audience", change: set("aud", ""), want: "audience"},
		{name: "audience gone", change: func(c map[string]any) { delete(c, "aud") }, want: "audience"},
		{name: "aud array", change: set("aud", []string{audience, "other"}), want: `"aud" is not a string`},
		{name: "aud array of one", change: set("aud", []string{audience}), want: `"aud" is not a string`},
		{name: "foreign issuer", change: set("iss", "https://evil.example"), want: "issued by a different provider"},
		{name: "no issuer", change: set("iss", nil), want: "issued by a different provider"},
		{name: "over", change: func(c map[string]any) { c["iat"], c["exp"] = now.Unix()-3700, now.Unix()-100 }, want: "expired"},
		{name: "no end", change: func(c map[string]any) { delete(c, "exp") }, want: "expired"},
		{name: "from the future", change: func(c map[string]any) { c["iat"], c["exp"] = now.Unix()+400, now.Unix()+3600 }, want: "in the future"},
		{name: "lasts too long", change: set("exp", now.Unix()+2*3600), want: "lasts"},
		{name: "no beginning", change: func(c map[string]any) { delete(c, "iat") }, want: "lasts"},
		{name: "ends before it begins", change: func(c map[string]any) { c["iat"], c["exp"] = now.Unix()+200, now.Unix()+100 }, want: "lasts"},
		{name: "not yet", change: set("nbf", now.Unix()+600), want: "not before"},
		{name: "no compute_engine, as on GKE", change: set("google", map[string]any{}), want: `instance_id ""`},
		{name: "no google", change: func(c map[string]any) { delete(c, "google") }, want: `instance_id ""`},
		{name: "empty instance id", change: of("instance_id", ""), want: `instance_id ""`},
		{name: "instance id no number", change: of("instance_id", "i-1\n"), want: "is not one"},
		{name: "instance id of another type", change: of("instance_id", 7), want: "instance_id", claims: true},
		{name: "google of another type", change: set("google", "x"), want: "google", claims: true},
		{name: "compute_engine of another type", change: set("google", map[string]any{"compute_engine": []int{1}}), want: "compute_engine", claims: true},
		{name: "project of another type", change: of("project_id", false), want: "project_id", claims: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := g.Verify(t.Context(), GoogleProof{Token: g.token(t, test.change), Audience: audience})
			switch {
			case test.want == "" && err != nil:
				t.Fatal(err)
			case test.want != "" && err == nil:
				t.Fatalf("accepted as %+v", got)
			case test.want != "" && !strings.Contains(err.Error(), test.want):
				t.Errorf("error %q lacks %q", err, test.want)
			}
			if errors.Is(err, ErrClaims) != test.claims || errors.Is(err, ErrUnavailable) {
				t.Errorf("%v is of the wrong kind", err)
			}
			good := func() error {
				_, err := g.Verify(t.Context(), GoogleProof{Token: g.token(t, nil), Audience: audience})
				return err
			}
			stillGood(t, got, err, good)
		})
	}
	token := g.token(t, nil)
	got, err := g.Verify(t.Context(), GoogleProof{Token: token, Audience: audience})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Instance{
		Provider: "google", ID: instanceID, Account: "proj", Region: "us-central1", Zone: "us-central1-a", Partition: "google",
		Issued: now, Expires: now.Add(time.Hour), Payload: payloadHash([]byte(token)),
	}, got); diff != "" {
		t.Error(diff)
	}
	if _, err := g.Verify(t.Context(), GoogleProof{Token: token}); err == nil || !strings.Contains(err.Error(), "no audience is expected") {
		t.Errorf("no audience expected: %v", err)
	}
	if n := g.Fetched(); n != 1 {
		t.Errorf("the keys were fetched %d times", n)
	}
}

// forge makes a token with any header and signature.
func forge(t testing.TB, header string, claims map[string]any, sign func(text string) []byte) string {
	t.Helper()
	payload, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	text := base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + base64.RawURLEncoding.EncodeToString(payload)
	return text + "." + base64.RawURLEncoding.EncodeToString(sign(text))
}

func TestGoogleForged(t *testing.T) {
	g := newGoogle(t, GoogleConfig{})
	claims := testnet.GoogleClaims(audience, instanceID, "proj", "us-central1-a", time.Now())
	kid, public := g.PublicKey()
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	byHMAC := func(key []byte) func(string) []byte {
		return func(text string) []byte {
			mac := hmac.New(sha256.New, key)
			mac.Write([]byte(text))
			return mac.Sum(nil)
		}
	}
	byStranger := func(text string) []byte {
		sum := sha256.Sum256([]byte(text))
		signature, err := rsa.SignPKCS1v15(nil, stranger, crypto.SHA256, sum[:])
		if err != nil {
			t.Fatal(err)
		}
		return signature
	}
	nothing := func(string) []byte { return nil }
	good := g.token(t, nil)
	for _, test := range []struct{ name, token, want string }{
		{"alg none", forge(t, `{"alg":"none","kid":"`+kid+`"}`, claims, nothing), `algorithm "none"`},
		{"alg None", forge(t, `{"alg":"None","kid":"`+kid+`"}`, claims, nothing), `algorithm "None"`},
		{"no alg", forge(t, `{"kid":"`+kid+`"}`, claims, nothing), `algorithm ""`},
		{"HS256 with the public key", forge(t, `{"alg":"HS256","kid":"`+kid+`"}`, claims, byHMAC(der)), `algorithm "HS256"`},
		{"HS256 with the public key in PEM", forge(t, `{"alg":"HS256","kid":"`+kid+`"}`, claims,
			byHMAC(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))), `algorithm "HS256"`},
		{"RS512", forge(t, `{"alg":"RS512","kid":"`+kid+`"}`, claims, byStranger), `algorithm "RS512"`},
		{"two algs", forge(t, `{"alg":"none","alg":"RS256","kid":"`+kid+`"}`, claims, byStranger), `"alg" twice`},
		{"no kid", forge(t, `{"alg":"RS256"}`, claims, byStranger), "does not name its key"},
		{"unknown kid", forge(t, `{"alg":"RS256","kid":"x"}`, claims, byStranger), "not one of the issuer's"},
		{"a stranger's key", forge(t, `{"alg":"RS256","kid":"`+kid+`"}`, claims, byStranger), "signature"},
		{"a stranger's key in the header", forge(t, `{"alg":"RS256","kid":"`+kid+`","jwk":{"kty":"RSA","n":"`+
			base64.RawURLEncoding.EncodeToString(stranger.N.Bytes())+`","e":"AQAB"}}`, claims, byStranger), "signature"},
		{"crit", forge(t, `{"alg":"RS256","kid":"`+kid+`","crit":["b64"],"b64":false}`, claims, byStranger), "extensions"},
		{"no signature", good[:strings.LastIndexByte(good, '.')+1], "signature"},
		{"two parts", good[:strings.LastIndexByte(good, '.')], "three parts"},
		{"four parts", good + ".x", "three parts"},
		{"as JSON", `{"payload":"","protected":"","signature":""}`, "three parts"},
		{"padded", good + "=", "not base64"},
		{"a line break", good + "\n", "not base64"},
		{"a space", " " + good, "not base64"},
		{"nothing", "", "three parts"},
		{"dots", "..", "header"},
		{"long", strings.Repeat("A", maxGoogleToken+1), "limit"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := g.Verify(t.Context(), GoogleProof{Token: test.token, Audience: audience})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%+v, %v; want %q", got, err, test.want)
			}
			stillGood(t, got, err, func() error {
				_, err := g.Verify(t.Context(), GoogleProof{Token: good, Audience: audience})
				return err
			})
		})
	}
}

// Every byte of a token is changed in turn: of its text, and of what its parts say.
func TestGoogleFlippedByte(t *testing.T) {
	g := newGoogle(t, GoogleConfig{})
	token := g.token(t, nil)
	refuse := func(what string, at int, text string) {
		if got, err := g.Verify(t.Context(), GoogleProof{Token: text, Audience: audience}); err == nil {
			t.Errorf("%s with byte %d changed was accepted: %+v", what, at, got)
		}
	}
	tried := flip([]byte(token), func(at int, b []byte) { refuse("the token", at, string(b)) })
	parts := strings.Split(token, ".")
	for i, part := range parts {
		decoded, err := base64.RawURLEncoding.DecodeString(part)
		if err != nil {
			t.Fatal(err)
		}
		tried += flip(decoded, func(at int, b []byte) {
			changed := [3]string{parts[0], parts[1], parts[2]}
			changed[i] = base64.RawURLEncoding.EncodeToString(b)
			refuse([]string{"the header", "the claims", "the signature"}[i], at, strings.Join(changed[:], "."))
		})
	}
	t.Logf("%d changes, none accepted", tried)
	if _, err := g.Verify(t.Context(), GoogleProof{Token: token, Audience: audience}); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

func TestGoogleKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGoogle(t, GoogleConfig{})
		verify := func(token string) error {
			_, err := g.Verify(t.Context(), GoogleProof{Token: token, Audience: audience})
			return err
		}
		fetched := func(want int, when string) {
			t.Helper()
			if n := g.Fetched(); n != want {
				t.Errorf("%s: the keys were fetched %d times, want %d", when, n, want)
			}
		}
		if err := verify(g.token(t, nil)); err != nil {
			t.Fatal(err)
		}
		old := g.token(t, nil)
		fetched(1, "at first")
		if err := g.Rotate(); err != nil {
			t.Fatal(err)
		}
		// Just fetched: an unknown key makes for no request.
		for range 100 {
			if err := verify(g.token(t, nil)); err == nil || !strings.Contains(err.Error(), "not one of the issuer's") {
				t.Fatal(err)
			}
		}
		fetched(1, "right after")
		time.Sleep(refetchAfter)
		if err := verify(g.token(t, nil)); err != nil {
			t.Errorf("after a rotation: %v", err)
		}
		fetched(2, "after a rotation")
		if err := verify(old); err != nil {
			t.Errorf("the older key: %v", err)
		}
		// A flood of unknown keys makes for one request in a while.
		stray := forge(t, `{"alg":"RS256","kid":"stray"}`, map[string]any{}, func(string) []byte { return []byte("x") })
		time.Sleep(refetchAfter)
		var all sync.WaitGroup
		for range 50 {
			all.Go(func() { _ = verify(stray) })
		}
		all.Wait()
		fetched(3, "after a flood")
		// A key that is no longer published ends with what was kept of it.
		if err := g.Rotate(); err != nil {
			t.Fatal(err)
		}
		if err := g.Rotate(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		late := strings.Split(old, ".")
		if err := verify(strings.Join(late, ".")); err == nil || !strings.Contains(err.Error(), "not one of the issuer's") {
			t.Errorf("a key that was taken back: %v", err)
		}
		fetched(4, "an hour later")
	})
}

func TestGoogleKeysUnavailable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGoogle(t, GoogleConfig{})
		answer := http.Handler(http.NotFoundHandler())
		asked := 0
		g.keys.client = &http.Client{Transport: handlerTransport{http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asked++
			answer.ServeHTTP(w, r)
		})}}
		verify := func() error {
			_, err := g.Verify(t.Context(), GoogleProof{Token: g.token(t, nil), Audience: audience})
			return err
		}
		text := func(s string) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte(s)) })
		}
		for name, test := range map[string]struct {
			answer http.Handler
			want   string
		}{
			"not found":   {http.NotFoundHandler(), "status 404"},
			"a page":      {text("<html>"), "invalid character"},
			"no keys":     {text(`{"keys":[{"kty":"EC","kid":"x"}]}`), "no RSA key"},
			"a short key": {text(`{"keys":[{"kty":"RSA","kid":"x","n":"AQAB","e":"AQAB"}]}`), "2048 bits"},
			"too long":    {text(strings.Repeat(" ", maxKeys+1)), "more than 65536 bytes"},
		} {
			answer = test.answer
			before := asked
			for range 10 {
				if err := verify(); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), test.want) {
					t.Errorf("%s: %v, want %q", name, err, test.want)
				}
			}
			if asked != before+1 {
				t.Errorf("%s: asked %d times", name, asked-before)
			}
			time.Sleep(refetchFailed)
		}
		answer = g.GoogleSigner
		if err := verify(); err != nil {
			t.Errorf("once the keys are there: %v", err)
		}
	})
}

func TestKeysAge(t *testing.T) {
	now := time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)
	for name, test := range map[string]struct {
		header http.Header
		want   time.Duration
	}{
		"Google's":  {http.Header{"Cache-Control": {"public, max-age=19543, must-revalidate, no-transform"}}, 19543 * time.Second},
		"expires":   {http.Header{"Expires": {"Thu, 26 Nov 2026 13:00:00 GMT"}}, time.Hour},
		"nothing":   {http.Header{}, leastKeysAge},
		"no time":   {http.Header{"Cache-Control": {"max-age=0"}}, leastKeysAge},
		"for years": {http.Header{"Cache-Control": {"max-age=99999999"}}, mostKeysAge},
		"nonsense":  {http.Header{"Cache-Control": {"max-age=x"}, "Expires": {"0"}}, leastKeysAge},
	} {
		if got := keysAge(test.header, now); got != test.want {
			t.Errorf("%s: %s, want %s", name, got, test.want)
		}
	}
}

func FuzzGoogle(f *testing.F) {
	now := time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)
	g := newGoogle(f, GoogleConfig{Now: at(now)})
	good := g.token(f, nil)
	f.Add(good)
	f.Add("..")
	f.Add(forge(f, `{"alg":"none","kid":"x"}`, map[string]any{"aud": audience}, func(string) []byte { return nil }))
	claims := maps.Clone(testnet.GoogleClaims(audience, "", "", "", now))
	claims["google"] = []any{nil, map[string]any{"compute_engine": 1}}
	f.Add(forge(f, `{"alg":"RS256","kid":"x","crit":[]}`, claims, func(string) []byte { return []byte("x") }))
	f.Fuzz(func(t *testing.T, token string) {
		got, err := g.Verify(t.Context(), GoogleProof{Token: token, Audience: audience})
		if err == nil && token != good {
			t.Errorf("accepted %q as %+v", token, got)
		}
		stillGood(t, got, err, func() error {
			_, err := g.Verify(t.Context(), GoogleProof{Token: good, Audience: audience})
			return err
		})
	})
}

// FuzzGoogleClaims goes past the signature, which a fuzzer does not guess.
func FuzzGoogleClaims(f *testing.F) {
	f.Add([]byte(`{"google":{"compute_engine":{"instance_id":"1","zone":"a-b"}}}`))
	f.Add([]byte(`{"google":null}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		if got, err := parseGoogleClaims(text); err == nil && (got.ID == "" || !json.Valid(text)) {
			t.Errorf("%q gave %+v", text, got)
		}
	})
}

// FuzzAzureDocument goes past the signature, too.
func FuzzAzureDocument(f *testing.F) {
	f.Add([]byte(azureNow().String()))
	f.Add([]byte(`{"vmId":"x","VMID":"y","timeStamp":{"createdOn":""}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		if got, _, err := parseAzureDocument(text, time.Now()); err == nil && (got.ID == "" || got.Expires.IsZero()) {
			t.Errorf("%q gave %+v", text, got)
		}
	})
}
