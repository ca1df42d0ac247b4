package testnet

import (
	"encoding/base64"
	"encoding/json"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestFakeAzure(t *testing.T) {
	f, err := NewFakeAzure(AzureLeaf{})
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(f)
	t.Cleanup(srv.Close)
	const path = "/metadata/attested/document"
	metadata := []string{"Metadata", "true"}
	for _, test := range []struct {
		name, method, path string
		mode               FakeAzureMode
		header             []string
		status             int
		want               string // in the answer, or in what is signed
	}{
		{"document", "GET", path + "?api-version=2020-09-01", AzureOn, metadata, 200, f.InstanceID()},
		{"nonce", "GET", path + "?api-version=2020-09-01&nonce=abc123XYZ", AzureOn, metadata, 200, `"nonce":"abc123XYZ"`},
		{"another nonce", "GET", path + "?api-version=2018-10-01&nonce=1", AzureOn, metadata, 200, `"nonce":"1"`},
		{"no header", "GET", path + "?api-version=2020-09-01", AzureOn, nil, 400, "metadata header"},
		{"no version", "GET", path, AzureOn, metadata, 400, "newest-versions"},
		{"unknown version", "GET", path + "?api-version=2017-01-01", AzureOn, metadata, 400, "newest-versions"},
		{"version twice", "GET", path + "?api-version=2020-09-01&api-version=2020-09-01", AzureOn, metadata, 400, "newest-versions"},
		{"long nonce", "GET", path + "?api-version=2020-09-01&nonce=" + strings.Repeat("a", 33), AzureOn, metadata, 400, "nonce"},
		{"through a proxy", "GET", path + "?api-version=2020-09-01", AzureOn, append(metadata, "X-Forwarded-For", "10.0.0.1"), 400, "proxy"},
		{"POST", "POST", path + "?api-version=2020-09-01", AzureOn, metadata, 405, ""},
		{"versions", "GET", "/metadata/versions", AzureOn, metadata, 200, "apiVersions"},
		{"unknown path", "GET", "/metadata/nothing?api-version=2020-09-01", AzureOn, metadata, 404, ""},
		{"busy", "GET", path + "?api-version=2020-09-01", AzureBusy, metadata, 429, ""},
		{"gone", "GET", path + "?api-version=2020-09-01", AzureGone, metadata, 410, ""},
		{"new only, old asked", "GET", path + "?api-version=2020-09-01", AzureNew, metadata, 400, "2026-01-01"},
		{"new only, new asked", "GET", path + "?api-version=2026-01-01", AzureNew, metadata, 200, f.InstanceID()},
	} {
		t.Run(test.name, func(t *testing.T) {
			f.SetMode(test.mode)
			status, body, _ := do(t, test.method, srv.URL+test.path, test.header...)
			if status == 200 && strings.HasPrefix(test.path, path) {
				body = azureContent(t, body)
			}
			if status != test.status || !strings.Contains(body, test.want) {
				t.Errorf("status %d, %q; want %d with %q", status, body, test.status, test.want)
			}
		})
	}
}

// azureContent is the envelope in an answer, which holds the document in clear.
func azureContent(t *testing.T, body string) string {
	t.Helper()
	var answer struct{ Encoding, Signature string }
	if err := json.Unmarshal([]byte(body), &answer); err != nil || answer.Encoding != "pkcs7" {
		t.Fatalf("%q: %v", body, err)
	}
	der, err := base64.StdEncoding.DecodeString(answer.Signature)
	if err != nil {
		t.Fatal(err)
	}
	return string(der)
}
