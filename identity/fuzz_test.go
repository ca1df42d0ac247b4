package identity

import (
	"encoding/base64"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/berthd/berth/wire"
)

// FuzzAzureAnswer reads what Azure's metadata service, or something in its place, may answer.
func FuzzAzureAnswer(f *testing.F) {
	for _, seed := range []string{
		`{"encoding":"pkcs7","signature":"MIIEEgYJKoZIhvcNAQcCoIIEAzCCA/8CAQExDzANBgkqhkiG9w0BAQsFADCBugYJ"}`,
		`{"error":"Bad request","newest-versions":["2025-04-07","2023-11-15","2021-12-13"]}`,
		`{"newest-versions":["x&nonce=1"]}`, `{"signature":"%"}`, `{"signature":[]}`, `<html>`, ``, `null`, `{`,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if body, err := parseAzureAttested(text); err == nil {
			if _, err := base64.StdEncoding.DecodeString(body.Signature); err != nil || body.Signature == "" || body.Encoding == "" {
				t.Errorf("took %+v from %q", body, text)
			}
		}
		if v := azureNewestVersion(text); v != "" {
			if _, err := time.Parse(time.DateOnly, v); err != nil {
				t.Errorf("version %q from %q", v, text)
			}
		}
	})
}

// FuzzClaims reads the claims of what may be a signed token.
func FuzzClaims(f *testing.F) {
	for _, payload := range []string{
		`{"aud":"coder","exp":1700000000,"google":{"compute_engine":{"instance_id":"1"}}}`,
		`{"aud":["a","coder"],"exp":1e300}`, `{"aud":1}`, `{"google":{"compute_engine":[]}}`, `null`, `"x"`, ``,
	} {
		f.Add("e30." + base64.RawURLEncoding.EncodeToString([]byte(payload)) + ".c2ln")
	}
	for _, seed := range []string{"", ".", "..", "...", "a.%.c", strings.Repeat(".", 1000)} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, token string) {
		err := checkGoogleToken(token, "coder")
		if c, readErr := readClaims(token); readErr != nil && err == nil {
			t.Errorf("%q is taken, with claims %+v and %v", token, c, readErr)
		}
	})
}

// FuzzAWSDocument tells identity documents from other answers.
func FuzzAWSDocument(f *testing.F) {
	for _, seed := range []string{
		"{\n  \"accountId\" : \"111122223333\",\n  \"instanceId\" : \"i-0123456789abcdef0\"\n}", `{"instanceId":1}`, `{"instanceId":""}`, `[]`, `<html>`, ``,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if err := checkAWSDocument(text); err == nil && !json.Valid([]byte(text)) {
			t.Errorf("took %q", text)
		}
	})
}

// FuzzChallenge takes what a server may say when it is asked for a challenge.
func FuzzChallenge(f *testing.F) {
	good := strings.Repeat("a1", 16)
	for _, seed := range []string{
		`{"challenge":"` + good + `","audience":"https://berth.example?challenge=` + good + `","rsa2048":true,"expires_at":"2026-11-26T00:00:00Z"}`,
		`{"challenge":"` + good + `","audience":"https://vault.example"}`, `{"challenge":"a&b"}`, `{}`, `null`, ``,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var c wire.IdentityChallenge
		if json.Unmarshal([]byte(text), &c) != nil {
			return
		}
		if checkChallenge(wire.ProviderGoogle, c) == nil && !strings.HasSuffix(c.Audience, "="+c.Challenge) {
			t.Errorf("took audience %q", c.Audience)
		}
		if checkChallenge(wire.ProviderAzure, c) == nil && (len(c.Challenge) != challengeLength || strings.ContainsAny(c.Challenge, "&=?% \r\n")) {
			t.Errorf("took nonce %q", c.Challenge)
		}
	})
}
