package testnet

import (
	"encoding/base64"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestFakeGoogle(t *testing.T) {
	f, err := NewFakeGoogle()
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(f)
	t.Cleanup(srv.Close)
	const path = "/computeMetadata/v1/instance/service-accounts/default/identity"
	flavor := []string{"Metadata-Flavor", "Google"}
	for _, test := range []struct {
		name, path string
		mode       FakeGoogleMode
		header     []string
		status     int
		want       string // in the answer, or among the claims
		lacks      string
	}{
		{"token", path + "?audience=coder&format=full", GoogleOn, flavor, 200, `"instance_id":"` + f.InstanceID() + `"`, "nothing"},
		{"another audience", path + "?audience=https%3A%2F%2Fa%3Fchallenge%3Db&format=full", GoogleOn, flavor, 200, `"aud":"https://a?challenge=b"`, "nothing"},
		{"short form", path + "?audience=coder", GoogleOn, flavor, 200, `"aud":"coder"`, "compute_engine"},
		{"workload identity", path + "?audience=coder&format=full", GoogleWorkloadIdentity, flavor, 200, `"aud":"coder"`, "compute_engine"},
		{"no audience", path + "?format=full", GoogleOn, flavor, 400, "audience", "nothing"},
		{"no header", path + "?audience=coder&format=full", GoogleOn, nil, 403, "Metadata-Flavor", "nothing"},
		{"through a proxy", path + "?audience=coder&format=full", GoogleOn, append(flavor, "X-Forwarded-For", "10.0.0.1"), 403, "", "nothing"},
		{"no service account", path + "?audience=coder&format=full", GoogleNoServiceAccount, flavor, 404, "", "nothing"},
		{"instance id", "/computeMetadata/v1/instance/id", GoogleNoServiceAccount, flavor, 200, f.InstanceID(), "nothing"},
		{"root", "/", GoogleOn, nil, 200, "computeMetadata", "nothing"},
		{"unknown path", "/latest/meta-data/", GoogleOn, flavor, 404, "", "nothing"},
	} {
		t.Run(test.name, func(t *testing.T) {
			f.SetMode(test.mode)
			status, body, h := do(t, "GET", srv.URL+test.path, test.header...)
			if h.Get("Metadata-Flavor") != "Google" {
				t.Error("the answer does not say that it is Google's")
			}
			if status == 200 && strings.HasPrefix(test.path, path) {
				claims, err := base64.RawURLEncoding.DecodeString(strings.Split(body, ".")[1])
				if err != nil {
					t.Fatal(err)
				}
				body = string(claims)
			}
			if status != test.status || !strings.Contains(body, test.want) || strings.Contains(body, test.lacks) {
				t.Errorf("status %d, %q; want %d with %q, without %q", status, body, test.status, test.want, test.lacks)
			}
		})
	}
}

func TestFakeAIA(t *testing.T) {
	signer, err := NewAzureSigner(AzureLeaf{})
	if err != nil {
		t.Fatal(err)
	}
	var f FakeAIA
	f.Publish("/issuing.crt", signer.Issuing())
	srv := httptest.NewServer(&f)
	t.Cleanup(srv.Close)
	if status, body, _ := do(t, "GET", srv.URL+"/issuing.crt"); status != 200 || body != string(signer.Issuing().Raw) {
		t.Errorf("status %d, %d bytes", status, len(body))
	}
	if status, _, _ := do(t, "GET", srv.URL+"/other.crt"); status != 404 {
		t.Errorf("unknown certificate: %d, want 404", status)
	}
	if asked := strings.Join(f.Asked(), " "); asked != "/issuing.crt /other.crt" {
		t.Errorf("asked for %q", asked)
	}
}
