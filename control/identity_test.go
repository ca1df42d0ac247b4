package control

import (
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/berthd/berth/identity/attest"
	"github.com/berthd/berth/internal/testnet"
	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/agentpb"
)

// Machines of the clouds in these tests.
const (
	awsID    = "i-0123456789abcdef0"
	azureID  = "dc18de58-292f-4794-9a5d-a4192bad0039"
	googleID = "4080561024171678567"
)

// clouds3 signs for one machine of each cloud.
type clouds3 struct {
	t      *testing.T
	aws    *testnet.AWSSigner
	azure  *testnet.AzureSigner
	google *testnet.GoogleSigner
	keys   *httptest.Server
	// down makes the keys of Google not to be had.
	down bool
}

func newClouds(t *testing.T) (*clouds3, Config) {
	t.Helper()
	c := &clouds3{t: t}
	var err error
	if c.aws, err = testnet.NewAWSSigner(); err != nil {
		t.Fatal(err)
	}
	if c.azure, err = testnet.NewAzureSigner(testnet.AzureLeaf{}); err != nil {
		t.Fatal(err)
	}
	if c.google, err = testnet.NewGoogleSigner(); err != nil {
		t.Fatal(err)
	}
	c.keys = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c.down {
			http.Error(w, "down", http.StatusBadGateway)
			return
		}
		c.google.ServeHTTP(w, r)
	}))
	t.Cleanup(c.keys.Close)
	keysURL, err := url.Parse(c.keys.URL)
	if err != nil {
		t.Fatal(err)
	}
	return c, Config{
		AWS:    attest.AWSConfig{Certificates: map[string][]*x509.Certificate{testnet.FakeAWSRegion: c.aws.Certificates()}},
		Azure:  attest.AzureConfig{Certificates: []*x509.Certificate{c.azure.Root(), c.azure.Issuing()}},
		Google: attest.GoogleConfig{KeysURL: keysURL},
	}
}

// awsProof is of a machine that started at a time.
func (c *clouds3) awsProof(started time.Time) wire.AWSInstanceIdentity {
	c.t.Helper()
	document := fmt.Sprintf(`{"accountId":"111122223333","availabilityZone":"%[1]sa","instanceId":%[2]q,"pendingTime":%[3]q,"region":%[1]q}`,
		testnet.FakeAWSRegion, awsID, started.UTC().Format(time.RFC3339))
	signature, rsa2048, err := c.aws.Sign(document)
	if err != nil {
		c.t.Fatal(err)
	}
	return wire.AWSInstanceIdentity{Signature: signature, Document: document, SignatureRSA2048: rsa2048}
}

func (c *clouds3) azureProof(nonce string) wire.AzureInstanceIdentity {
	c.t.Helper()
	now := time.Now()
	text, err := c.azure.Sign(testnet.AzureDocument{VMID: azureID, SubscriptionID: "05e8b285-0000-46a3-b4c9-f51ba67d6acc",
		Nonce: nonce, Created: now, Expires: now.Add(6 * time.Hour)}.String())
	if err != nil {
		c.t.Fatal(err)
	}
	proof := wire.AzureInstanceIdentity{Signature: text, Encoding: "pkcs7"}
	proof.Challenge = nonce
	return proof
}

func (c *clouds3) googleProof(audience string, change func(map[string]any)) wire.GoogleInstanceIdentity {
	c.t.Helper()
	claims := testnet.GoogleClaims(audience, googleID, "proj", "us-central1-a", time.Now())
	if change != nil {
		change(claims)
	}
	token, err := c.google.Sign(claims)
	if err != nil {
		c.t.Fatal(err)
	}
	return wire.GoogleInstanceIdentity{JSONWebToken: token}
}

// cloudConfig declares an agent of each machine.
const cloudConfig = `agents:
  - {name: a, instance: {provider: aws, id: ` + awsID + `}}
  - {name: z, instance: {provider: azure, id: ` + azureID + `}}
  - {name: g, instance: {provider: google, id: "` + googleID + `"}}
`

// cloudSite serves agents of the three clouds, with something more in the file.
func cloudSite(t *testing.T, more string) (*clouds3, *site) {
	t.Helper()
	c, config := newClouds(t)
	return c, cloudServe(t, config, more)
}

func cloudServe(t *testing.T, config Config, more string) *site {
	t.Helper()
	config.ConfigFile = filepath.Join(t.TempDir(), "berth.yaml")
	writeConfig(t, config.ConfigFile, cloudConfig+more)
	return serve(t, config)
}

// prove posts a proof and returns the answer, with the token if there is one.
func (x *site) prove(provider string, proof any) (status int, body string, token wire.Secret) {
	x.t.Helper()
	text, err := json.Marshal(proof)
	if err != nil {
		x.t.Fatal(err)
	}
	status, body = x.call("POST", "/api/v2/workspaceagents/"+provider+"-instance-identity", string(text))
	return status, body, wire.Secret(between(body, `"session_token":"`, `"`))
}

// accept expects a token for a proof, refuse an answer that begins so.
func (x *site) accept(provider string, proof any) wire.Secret {
	x.t.Helper()
	status, body, token := x.prove(provider, proof)
	if status != http.StatusOK || token == "" {
		x.t.Fatalf("%s: %d %s", provider, status, body)
	}
	return token
}

func (x *site) refuse(provider string, proof any, status int, want string) {
	x.t.Helper()
	got, body, _ := x.prove(provider, proof)
	if got != status || !strings.Contains(body, want) {
		x.t.Errorf("%s: %d %s, want %d %s", provider, got, body, status, want)
	}
}

func (x *site) challenge(provider string) wire.IdentityChallenge {
	x.t.Helper()
	status, body := x.call("POST", wire.PathIdentityChallenge, fmt.Sprintf(`{"provider":%q}`, provider))
	var c wire.IdentityChallenge
	if err := json.Unmarshal([]byte(body), &c); err != nil || status != http.StatusOK {
		x.t.Fatalf("challenge: %d %s", status, body)
	}
	return c
}

// installation is one agent with its proof key.
type installation struct{ ed25519.PrivateKey }

func newInstallation(t *testing.T) installation {
	t.Helper()
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return installation{key}
}

func (i installation) sign(provider, payload string, p *wire.IdentityProof) {
	p.ProofKey = base64.StdEncoding.EncodeToString(i.Public().(ed25519.PublicKey))
	p.Proof = base64.StdEncoding.EncodeToString(ed25519.Sign(i.PrivateKey, wire.IdentityProofMessage(provider, p.Challenge, payload)))
}

func TestThreeClouds(t *testing.T) {
	c, x := cloudSite(t, "")
	good := func(token wire.Secret) {
		t.Helper()
		if _, err := x.connect(token).agent.GetManifest(t.Context(), &agentpb.GetManifestRequest{}); err != nil {
			t.Error(err)
		}
	}
	// As stock agents do it, which know of no challenge.
	good(x.accept("aws", c.awsProof(time.Now())))
	good(x.accept("azure", c.azureProof("")))
	good(x.accept("google", c.googleProof("coder", nil)))

	for provider, text := range map[string]string{
		"aws":    `{"message":"Invalid AWS identity.","detail":"Signature verification failed."}`,
		"azure":  `{"message":"Invalid Azure identity.","detail":"Signature verification failed."}`,
		"google": `{"message":"Invalid GCP identity.","detail":"Signature verification failed."}`,
	} {
		x.refuse(provider, map[string]string{"signature": "AAAA", "document": "{}", "encoding": "pkcs7", "json_web_token": "a.b.c"}, 401, text)
	}
	required := `"detail":"Validation failed for tag \"required\" with value: \"\""`
	x.refuse("azure", map[string]string{"signature": "x"}, 400, `{"message":"Validation failed.","validations":[{"field":"encoding",`+required)
	x.refuse("google", map[string]string{}, 400, `{"message":"Validation failed.","validations":[{"field":"json_web_token",`+required)
	x.refuse("google", 7, 400, `{"message":"Request body must be valid JSON."`)
	x.refuse("google", c.googleProof("coder", func(claims map[string]any) { claims["google"] = "x" }), 400, `{"message":"Error decoding JWT claims."}`)
	x.refuse("google", c.googleProof("another", nil), 401, "Invalid GCP identity.")
	x.refuse("google", c.googleProof("coder", func(claims map[string]any) {
		claims["google"] = map[string]any{"compute_engine": map[string]any{"instance_id": "42"}}
	}), 404, `{"message":"Instance with id \"42\" not found."}`)
	proof := c.azureProof("")
	proof.AgentName = " other "
	x.refuse("azure", proof, 404, `{"message":"No agent found with instance ID \"`+azureID+`\" and name \"other\"."}`)
	x.refuse("aws", map[string]string{"signature": strings.Repeat("A", 64<<10), "document": "{}"}, 413, "Request body is too large.")

	// What is said of each in the log is for the operator only.
	for _, want := range []string{
		`audit: a machine's identity" provider=aws result=accepted`, "instance=" + awsID, "account=111122223333", "region=" + testnet.FakeAWSRegion,
		`provider=azure result=accepted`, `provider=google result=refused`, "reason=", `provider=azure result=unknown`,
	} {
		if !strings.Contains(x.log.String(), want) {
			t.Errorf("the log lacks %q", want)
		}
	}
	_, metrics := x.call("GET", "/api/v2/berth/metrics", "", x.asUser()...)
	for _, want := range []string{
		"# TYPE berth_identity_exchanges_total counter\n", `berth_identity_exchanges_total{provider="aws",result="accepted"} 1` + "\n",
		`berth_identity_exchanges_total{provider="google",result="unknown"} 1` + "\n",
		"# TYPE berth_identity_pin_expiry_days gauge\n", `berth_identity_pin_expiry_days{provider="aws"} `, `berth_identity_pin_expiry_days{provider="azure"} `,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("the metrics lack %q:\n%s", want, metrics)
		}
	}
}

func TestChallenges(t *testing.T) {
	c, x := cloudSite(t, "")
	for _, provider := range clouds {
		got := x.challenge(provider)
		if len(got.Challenge) != 32 || strings.Trim(got.Challenge, "abcdefghijklmnopqrstuvwxyz0123456789") != "" || !got.RSA2048 {
			t.Errorf("%s: %+v", provider, got)
		}
		if left := time.Until(got.ExpiresAt); left < 50*time.Second || left > time.Minute {
			t.Errorf("%s: ends in %s", provider, left)
		}
		want := ""
		if provider == "google" {
			want = x.url + "?challenge=" + got.Challenge
		}
		if got.Audience != want {
			t.Errorf("%s: audience %q, want %q", provider, got.Audience, want)
		}
		for _, other := range clouds {
			if ok := x.checkChallenge(other, got.Challenge, time.Now()); ok != (other == provider) {
				t.Errorf("a challenge for %s is one for %s: %v", provider, other, ok)
			}
		}
		if x.checkChallenge(provider, got.Challenge, got.ExpiresAt) {
			t.Errorf("%s: good when it is over", provider)
		}
		b := []byte(got.Challenge)
		for i := range b {
			b[i] ^= 1
			if x.checkChallenge(provider, string(b), time.Now()) {
				t.Errorf("%s: good with character %d changed", provider, i)
			}
			b[i] ^= 1
		}
	}
	for _, text := range []string{"{}", `{"provider":"moon"}`, `{"provider":""}`, "x"} {
		if status, body := x.call("POST", wire.PathIdentityChallenge, text); status != http.StatusBadRequest {
			t.Errorf("%s: %d %s", text, status, body)
		}
	}

	// A document answers its challenge, once.
	challenge := x.challenge("azure").Challenge
	proof := c.azureProof(challenge)
	x.accept("azure", proof)
	x.refuse("azure", proof, 401, "Invalid Azure identity.")
	x.refuse("azure", c.azureProof(challenge), 401, "Invalid Azure identity.")
	// Not another's, nor one that was not made here.
	wrong := c.azureProof(x.challenge("azure").Challenge)
	wrong.Challenge = x.challenge("azure").Challenge
	x.refuse("azure", wrong, 401, "Invalid Azure identity.")
	x.refuse("azure", c.azureProof(x.challenge("google").Challenge), 401, "unknown, used or over")
	x.refuse("azure", c.azureProof(strings.Repeat("a", 32)), 401, "unknown, used or over")

	google := x.challenge("google")
	token := c.googleProof(google.Audience, nil)
	x.refuse("google", token, 401, "Invalid GCP identity.") // without saying which challenge it answers
	token.Challenge = google.Challenge
	x.accept("google", token)
	again := c.googleProof(google.Audience, func(claims map[string]any) { claims["jti"] = "another" })
	again.Challenge = google.Challenge
	x.refuse("google", again, 401, "Invalid GCP identity.")
	old := c.googleProof("coder", nil)
	old.Challenge = x.challenge("google").Challenge
	x.refuse("google", old, 401, "Invalid GCP identity.")
}

func TestChallengesRequired(t *testing.T) {
	c, x := cloudSite(t, "identity: {require_challenge: true}\n")
	x.refuse("azure", c.azureProof(""), 401, "asks for a challenge")
	x.refuse("google", c.googleProof("coder", nil), 401, "asks for a challenge")
	x.refuse("aws", c.awsProof(time.Now()), 401, "asks for a challenge")
	x.accept("azure", c.azureProof(x.challenge("azure").Challenge))
	google := x.challenge("google")
	token := c.googleProof(google.Audience, nil)
	token.Challenge = google.Challenge
	x.accept("google", token)
	// An AWS document cannot hold it; the key answers.
	proof := c.awsProof(time.Now())
	proof.Challenge = x.challenge("aws").Challenge
	x.refuse("aws", proof, 401, "asks for a challenge")
	newInstallation(t).sign("aws", proof.Signature, &proof.IdentityProof)
	x.accept("aws", proof)
}

func TestProofKeys(t *testing.T) {
	c, x := cloudSite(t, "")
	mine, other := newInstallation(t), newInstallation(t)
	started := time.Now()
	prove := func(by *installation, change func(*wire.AWSInstanceIdentity)) wire.AWSInstanceIdentity {
		proof := c.awsProof(started)
		proof.Challenge = x.challenge("aws").Challenge
		if by != nil {
			by.sign("aws", proof.Signature, &proof.IdentityProof)
		}
		if change != nil {
			change(&proof)
		}
		return proof
	}
	for name, change := range map[string]func(*wire.AWSInstanceIdentity){
		"another challenge": func(p *wire.AWSInstanceIdentity) { p.Challenge = x.challenge("aws").Challenge },
		"another payload":   func(p *wire.AWSInstanceIdentity) { p.Signature = strings.ReplaceAll(p.Signature, "\n", "") },
		"another key": func(p *wire.AWSInstanceIdentity) {
			p.ProofKey = base64.StdEncoding.EncodeToString(other.Public().(ed25519.PublicKey))
		},
		"no proof":    func(p *wire.AWSInstanceIdentity) { p.Proof = "" },
		"no key":      func(p *wire.AWSInstanceIdentity) { p.ProofKey = "" },
		"a short key": func(p *wire.AWSInstanceIdentity) { p.ProofKey = "AAAA" },
		"not base64":  func(p *wire.AWSInstanceIdentity) { p.ProofKey = "%" },
	} {
		t.Run(name, func(*testing.T) { x.refuse("aws", prove(&mine, change), 401, "Invalid AWS identity.") })
	}
	// A stock agent was here first; the key that comes later is taken.
	x.accept("aws", prove(nil, nil))
	first := x.accept("aws", prove(&mine, nil))
	x.accept("aws", prove(&mine, nil))
	x.refuse("aws", prove(&other, nil), 409, "berth agent forget a")
	x.refuse("aws", prove(nil, nil), 409, `"field":"proof_key"`)
	if !strings.Contains(x.log.String(), "result=other_key") {
		t.Error("the log says nothing of the other key")
	}
	// An operator forgets the machine: the tokens end, and who comes next holds the agent.
	agent, err := x.store.AgentByName(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	l := x.connect(first)
	forget := "/api/v2/berth/agents/" + agent.ID.String() + "/forget"
	if status, body := x.call("POST", forget, "", x.asUser()...); status != http.StatusNoContent {
		t.Fatalf("forget: %d %s", status, body)
	}
	<-l.Closed()
	x.accept("aws", prove(&other, nil))
	x.refuse("aws", prove(&mine, nil), 409, "another key")
	// An agent that is taken away and declared again is another one.
	for _, text := range []string{"agents: []\n", cloudConfig} {
		writeConfig(t, x.config.ConfigFile, text)
		if err := x.Reload(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	x.accept("aws", prove(&mine, nil))
	// Where disks do not last, an operator lets anybody on the machine in.
	writeConfig(t, x.config.ConfigFile, cloudConfig+"identity: {reuse: true}\n")
	if err := x.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	x.accept("aws", prove(&other, nil))
	x.accept("aws", prove(nil, nil))
	made, _ := x.create("by-hand")
	if status, body := x.call("POST", "/api/v2/berth/agents/"+made.String()+"/forget", "", x.asUser()...); status != http.StatusConflict {
		t.Errorf("forgetting what comes from no machine: %d %s", status, body)
	}
}

func TestReplays(t *testing.T) {
	c, x := cloudSite(t, "")
	mine, other := newInstallation(t), newInstallation(t)
	// Without a key a proof is good once.
	bare := c.azureProof("")
	x.accept("azure", bare)
	x.refuse("azure", bare, 401, "used before")
	thief := bare
	other.sign("azure", thief.Signature, &thief.IdentityProof)
	x.refuse("azure", thief, 401, "used before")
	// A thief who comes late changes nothing for the machine.
	x.accept("azure", c.azureProofBy(mine))
	// With it the same installation may ask again when the answer was lost.
	proof := c.googleProof("coder", nil)
	mine.sign("google", proof.JSONWebToken, &proof.IdentityProof)
	x.accept("google", proof)
	x.accept("google", proof)
	other.sign("google", proof.JSONWebToken, &proof.IdentityProof)
	x.refuse("google", proof, 401, "used before")
	// A machine that was started again does not go back.
	now := time.Now()
	x.accept("aws", c.awsProof(now.Add(-time.Hour)))
	x.accept("aws", c.awsProof(now.Add(-time.Hour)))
	x.accept("aws", c.awsProof(now))
	x.refuse("aws", c.awsProof(now.Add(-time.Hour)), 401, "Invalid AWS identity.")
	x.accept("aws", c.awsProof(now))
}

// azureProofBy is a document with its owner's proof.
func (c *clouds3) azureProofBy(i installation) wire.AzureInstanceIdentity {
	proof := c.azureProof("0123456789")
	proof.Challenge = ""
	i.sign("azure", proof.Signature, &proof.IdentityProof)
	return proof
}

func TestAllowLists(t *testing.T) {
	c, config := newClouds(t)
	for _, test := range []struct {
		list               string
		aws, azure, google int
	}{
		{"", 200, 200, 200},
		{"{aws: {accounts: ['111122223333'], regions: [" + testnet.FakeAWSRegion + "]}}", 200, 200, 200},
		{"{aws: {accounts: ['999999999999']}}", 404, 200, 200},
		{"{aws: {regions: [eu-central-1]}}", 404, 200, 200},
		{"{azure: {subscriptions: [05E8B285-0000-46a3-b4c9-f51ba67d6acc], regions: [BerthLocal]}}", 200, 200, 200},
		{"{azure: {subscriptions: [11111111-1111-1111-1111-111111111111]}}", 200, 404, 200},
		{"{azure: {regions: [eastus]}}", 200, 404, 200},
		{"{azure: {domains: [metadata.azure.us]}}", 200, 401, 200},
		{"{google: {projects: [proj], regions: [us-central1]}}", 200, 200, 200},
		{"{google: {projects: [other]}}", 200, 200, 404},
		{"{google: {regions: [europe-west1]}}", 200, 200, 404},
		{"{google: {audience: berth.example}}", 200, 200, 401},
	} {
		t.Run(test.list, func(t *testing.T) {
			x := cloudServe(t, config, "identity: "+test.list+"\n")
			for provider, p := range map[string]struct {
				proof any
				want  int
			}{"aws": {c.awsProof(time.Now()), test.aws}, "azure": {c.azureProof(""), test.azure}, "google": {c.googleProof("coder", nil), test.google}} {
				if status, body, _ := x.prove(provider, p.proof); status != p.want {
					t.Errorf("%s: %d %s, want %d", provider, status, body, p.want)
				}
			}
		})
	}
}

// The file may name what else is trusted.
func TestOwnCertificates(t *testing.T) {
	c, _ := newClouds(t)
	dir := t.TempDir()
	keep := func(name string, certs ...*x509.Certificate) string {
		t.Helper()
		var text []byte
		for _, cert := range certs {
			text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	more := fmt.Sprintf("identity:\n  aws: {certificates: {%s: [%s]}}\n  azure: {certificates: [%s]}\n  google: {keys_url: %s}\n",
		testnet.FakeAWSRegion, keep("aws.pem", c.aws.Certificates()...), keep("azure.pem", c.azure.Root(), c.azure.Issuing()), c.keys.URL)
	x := cloudServe(t, Config{}, more)
	x.accept("aws", c.awsProof(time.Now()))
	x.accept("azure", c.azureProof(""))
	x.accept("google", c.googleProof("coder", nil))
	for text, want := range map[string]string{
		"identity: {aws: {certificates: {x: [" + dir + "/none]}}}":                      "no such file",
		"identity: {azure: {certificates: [" + keep("empty.pem") + "]}}":                "holds no certificate",
		"identity: {azure: {certificates: [" + keep("leaf.pem", c.azure.Leaf()) + "]}}": "is no CA",
		"identity: {azure: {domains: [azure.com]}}":                                     `domain "azure.com" is none`,
		"identity: {google: {keys_url: x}}":                                             `keys_url "x" is no web address`,
		"identity: {mars: {}}":                                                          "unknown key mars",
		"identity: {aws: {accounts: x}}":                                                "cannot unmarshal",
	} {
		declared, err := parseConfig([]byte(text))
		if err == nil {
			_, err = newIdentityRules(Config{}, declared.identity)
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

func TestKeysOutOfReach(t *testing.T) {
	c, x := cloudSite(t, "")
	c.down = true
	req, err := http.NewRequestWithContext(t.Context(), "POST", x.url+"/api/v2/workspaceagents/google-instance-identity",
		strings.NewReader(`{"json_web_token":"`+c.googleProof("coder", nil).JSONWebToken+`"}`))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := x.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") != "5" {
		t.Errorf("%s, Retry-After %q", resp.Status, resp.Header.Get("Retry-After"))
	}
}

// After anything that made readers of others crash or hang, the next good login works.
func TestIdentityCrashers(t *testing.T) {
	c, x := cloudSite(t, "")
	for i, b := range [][]byte{{0x1f, 0x80}, {0x1f, 0x05}, {0x30, 0x81}, {0x30, 0x84, 0x01}, {}, {0x30, 0x80, 0x24, 0x80}} {
		text := base64.StdEncoding.EncodeToString(b)
		x.refuse("azure", map[string]string{"signature": text + "=", "encoding": "pkcs7"}, 401, "Invalid Azure identity.")
		if text != "" {
			x.refuse("azure", map[string]string{"signature": text, "encoding": "pkcs7"}, 401, "Invalid Azure identity.")
			x.refuse("aws", map[string]string{"signature": text, "document": `{"region":"us-east-1"}`}, 401, "Invalid AWS identity.")
			x.refuse("google", map[string]string{"json_web_token": text + "." + text + "." + text}, 401, "Invalid GCP identity.")
		}
		// Documents of the same second differ by their nonces.
		next := c.azureProof(fmt.Sprintf("%010d", i))
		next.Challenge = ""
		x.accept("azure", next)
		x.accept("aws", c.awsProof(time.Now()))
		x.accept("google", c.googleProof("coder", func(claims map[string]any) { claims["jti"] = text }))
	}
}

func TestStrangersAreLimited(t *testing.T) {
	_, x := cloudSite(t, "")
	now := time.Now()
	here := network(netip.MustParseAddr("127.0.0.1"))
	for range strangerBurst {
		if wait := x.strangers.allow(here, now); wait > 0 {
			t.Fatalf("limited at once: %s", wait)
		}
	}
	for _, path := range []string{wire.PathIdentityChallenge, "/api/v2/workspaceagents/aws-instance-identity"} {
		req, err := http.NewRequestWithContext(t.Context(), "POST", x.url+path, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		// Some requests fit in again while this test goes on.
		x.strangers.mu.Lock()
		x.strangers.full[here] = time.Now().Add(2 * strangerBurst * strangerEvery)
		x.strangers.mu.Unlock()
		resp, err := x.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if resp.StatusCode != http.StatusTooManyRequests || resp.Header.Get("Retry-After") == "" {
			t.Errorf("%s: %s, Retry-After %q", path, resp.Status, resp.Header.Get("Retry-After"))
		}
	}
}

func TestRate(t *testing.T) {
	var l rate
	now := time.Now()
	a, b := netip.MustParsePrefix("10.0.0.1/32"), netip.MustParsePrefix("10.0.0.2/32")
	for i := range strangerBurst {
		if wait := l.allow(a, now); wait > 0 {
			t.Fatalf("request %d has to wait %s", i, wait)
		}
	}
	if wait := l.allow(a, now); wait != strangerEvery {
		t.Errorf("one too many has to wait %s", wait)
	}
	if wait := l.allow(b, now); wait > 0 {
		t.Errorf("another address has to wait %s", wait)
	}
	if wait := l.allow(a, now.Add(strangerEvery)); wait > 0 {
		t.Errorf("after its wait it has to wait %s", wait)
	}
	for i := range 3 * maxStrangers {
		l.allow(netip.PrefixFrom(netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)}), 32), now)
		if len(l.full) > maxStrangers {
			t.Fatalf("%d addresses are remembered", len(l.full))
		}
	}
	for text, want := range map[string]string{"10.0.0.1": "10.0.0.1/32", "::ffff:10.0.0.1": "10.0.0.1/32", "2001:db8:1:2:3::4": "2001:db8:1:2::/64"} {
		r := &http.Request{RemoteAddr: netip.AddrPortFrom(netip.MustParseAddr(text), 1).String()}
		if got := network(remoteAddr(r)).String(); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
	if got := network(remoteAddr(&http.Request{RemoteAddr: "@"})); got != (netip.Prefix{}) {
		t.Errorf("a Unix socket: %s", got)
	}
}

// A token that a machine got ends when no link holds it, and what is open with it ends, too. One that a
// person made does not.
func TestTokensExpire(t *testing.T) {
	c, config := newClouds(t)
	config.TokenLife = 5 * time.Second
	x := cloudServe(t, config, "")
	good := func(token wire.Secret) bool {
		status, _ := x.call("GET", "/api/v2/workspaceagents/me/reinit?wait=true", "", as(token)...)
		return status != http.StatusUnauthorized
	}
	_, made := x.declared("a")
	exchanged := x.accept("aws", c.awsProof(time.Now()))
	if !good(exchanged) || !good(made) {
		t.Fatal("a fresh token is not good")
	}
	l := x.connect(exchanged)
	// The first look after its end finds it over, and ends the link.
	eventually(t, "the token ends", func() bool { return !good(exchanged) })
	<-l.Closed()
	if !good(made) {
		t.Error("a token of a person's making ended")
	}
}

// A revoked token's open streams end at once: its link, and where it waits to be claimed.
func TestRevokedStreamsEnd(t *testing.T) {
	c, x := cloudSite(t, "")
	token := x.accept("aws", c.awsProof(time.Now()))
	l := x.connect(token)
	events := x.events("/api/v2/workspaceagents/me/reinit", as(token)...)
	agent, err := x.store.AgentByName(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if status, body := x.call("POST", "/api/v2/berth/agents/"+agent.ID.String()+"/revoke", "", x.asUser()...); status != http.StatusNoContent {
		t.Fatalf("revoke: %d %s", status, body)
	}
	<-l.Closed()
	if _, err := io.ReadAll(events.body); err != nil {
		t.Errorf("the events end with %v", err)
	}
	// The machine proves itself anew.
	x.connect(x.accept("aws", c.awsProof(time.Now())))
}
