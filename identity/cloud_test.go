package identity_test

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
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

	"github.com/berthd/berth/identity"
	"github.com/berthd/berth/internal/testnet"
	"github.com/berthd/berth/wire"
)

// posted is the body of any exchange.
type posted struct {
	Signature        string `json:"signature"`
	Document         string `json:"document"`
	SignatureRSA2048 string `json:"signature_rsa2048"`
	Encoding         string `json:"encoding"`
	JSONWebToken     string `json:"json_web_token"`
	AgentName        string `json:"agent_name"`
	wire.IdentityProof
}

// payload is what the cloud signed.
func (p posted) payload() string {
	if p.JSONWebToken != "" {
		return p.JSONWebToken
	}
	return p.Signature
}

// server is a control server's side of an exchange.
type server struct {
	*identity.Exchanger
	// stock has it know no challenges, as other servers do; noChallenge answers such a question.
	stock       bool
	noChallenge func(http.ResponseWriter)
	// challenge, if set, is given instead of a good one.
	challenge *wire.IdentityChallenge
	// refuse, when set, answers every exchange.
	refuse http.HandlerFunc

	paths []string // of the exchanges
	asked []posted
	given []wire.IdentityChallenge
}

func newServer(t *testing.T) *server {
	t.Helper()
	s := &server{}
	srv := httptest.NewServer(s)
	t.Cleanup(srv.Close)
	u, err := url.Parse(srv.URL + "/base")
	if err != nil {
		t.Fatal(err)
	}
	s.Exchanger = &identity.Exchanger{URL: u, HTTP: srv.Client(), ProofKey: filepath.Join(t.TempDir(), "key")}
	return s
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	answer := func(status int, body any) {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(body)
	}
	path, _ := strings.CutPrefix(r.URL.Path, "/base")
	switch {
	case r.Method != http.MethodPost:
		answer(http.StatusMethodNotAllowed, wire.Error{Message: "Method not allowed."})
	case path == wire.PathIdentityChallenge && s.noChallenge != nil:
		s.noChallenge(w)
	case path == wire.PathIdentityChallenge && s.stock:
		answer(http.StatusNotFound, wire.Error{Message: "Route not found."})
	case path == wire.PathIdentityChallenge:
		var request wire.IdentityChallengeRequest
		json.NewDecoder(r.Body).Decode(&request)
		c := wire.IdentityChallenge{Challenge: fmt.Sprintf("%032d", len(s.given)), RSA2048: true, ExpiresAt: time.Now().Add(time.Minute)}
		if request.Provider == wire.ProviderGoogle {
			c.Audience = "https://berth.example?challenge=" + c.Challenge
		}
		if s.challenge != nil {
			c = *s.challenge
		}
		s.given = append(s.given, c)
		answer(http.StatusOK, c)
	case s.refuse != nil:
		s.refuse(w, r)
	default:
		var p posted
		if err := json.NewDecoder(r.Body).Decode(&p); err != nil {
			answer(http.StatusBadRequest, wire.Error{Message: err.Error()})
			return
		}
		s.asked, s.paths = append(s.asked, p), append(s.paths, path)
		answer(http.StatusOK, wire.SessionToken{SessionToken: fmt.Sprintf("token-%d", len(s.asked))})
	}
}

// serve runs a fake metadata service, or anything in its place.
func serve(t *testing.T, h http.Handler) (endpoint string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- testnet.Serve(ctx, ln, h) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "http://" + ln.Addr().String()
}

func fakeAWS(t *testing.T) *testnet.FakeAWS {
	t.Helper()
	f, err := testnet.NewFakeAWS()
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func fakeAzure(t *testing.T) *testnet.FakeAzure {
	t.Helper()
	f, err := testnet.NewFakeAzure(testnet.AzureLeaf{})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func fakeGoogle(t *testing.T) *testnet.FakeGoogle {
	t.Helper()
	f, err := testnet.NewFakeGoogle()
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// TestClouds gets a token in each cloud, twice, from a server that knows challenges and from one that
// does not. A metadata call that went through a proxy would fail.
func TestClouds(t *testing.T) {
	aws, azure, google := fakeAWS(t), fakeAzure(t), fakeGoogle(t)
	for _, test := range []struct {
		name     string
		fake     http.Handler
		variable func(endpoint string) (name, value string)
		source   func(identity.CloudConfig) identity.Source
		path     string
		check    func(t *testing.T, p posted, c wire.IdentityChallenge)
	}{
		{
			"aws", aws, func(e string) (string, string) { return "AWS_EC2_METADATA_SERVICE_ENDPOINT", e + "/" },
			identity.AWS, "/api/v2/workspaceagents/aws-instance-identity",
			func(t *testing.T, p posted, c wire.IdentityChallenge) {
				signature, err := base64.StdEncoding.DecodeString(p.Signature)
				if err != nil {
					t.Fatal(err)
				}
				sum := sha256.Sum256([]byte(p.Document))
				if err := rsa.VerifyPKCS1v15(aws.Certificates()[0].PublicKey.(*rsa.PublicKey), crypto.SHA256, sum[:], signature); err != nil {
					t.Errorf("the document is not what was signed: %v", err)
				}
				if (p.SignatureRSA2048 != "") != c.RSA2048 {
					t.Errorf("rsa2048 of %d bytes, the server takes it: %v", len(p.SignatureRSA2048), c.RSA2048)
				}
			},
		},
		{
			"azure", azure, func(e string) (string, string) { return identity.EnvAzureEndpoint, e },
			identity.Azure, "/api/v2/workspaceagents/azure-instance-identity",
			func(t *testing.T, p posted, c wire.IdentityChallenge) {
				der, err := base64.StdEncoding.DecodeString(p.Signature)
				if err != nil {
					t.Fatal(err)
				}
				// The envelope holds the document in clear.
				if p.Encoding != "pkcs7" || !strings.Contains(string(der), azure.InstanceID()) || !strings.Contains(string(der), `"nonce":"`+c.Challenge) {
					t.Errorf("%s without %s or nonce %q: %q", p.Encoding, azure.InstanceID(), c.Challenge, der)
				}
			},
		},
		{
			"google", google, func(e string) (string, string) { return "GCE_METADATA_HOST", strings.TrimPrefix(e, "http://") },
			identity.Google, "/api/v2/workspaceagents/google-instance-identity",
			func(t *testing.T, p posted, c wire.IdentityChallenge) {
				signed, signature, _ := cutLast(p.JSONWebToken)
				raw, err := base64.RawURLEncoding.DecodeString(signature)
				if err != nil {
					t.Fatal(err)
				}
				_, key := google.Signer().PublicKey()
				sum := sha256.Sum256([]byte(signed))
				if err := rsa.VerifyPKCS1v15(key, crypto.SHA256, sum[:], raw); err != nil {
					t.Errorf("the token is not what was signed: %v", err)
				}
				claims, err := base64.RawURLEncoding.DecodeString(strings.Split(signed, ".")[1])
				if err != nil {
					t.Fatal(err)
				}
				audience := "coder"
				if c.Audience != "" {
					audience = c.Audience
				}
				if !strings.Contains(string(claims), `"aud":"`+audience+`"`) || !strings.Contains(string(claims), google.InstanceID()) {
					t.Errorf("claims %s, want audience %s and instance %s", claims, audience, google.InstanceID())
				}
			},
		},
	} {
		for _, stock := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, stock %v", test.name, stock), func(t *testing.T) {
				t.Setenv(test.variable(serve(t, test.fake)))
				s := newServer(t)
				s.stock = stock
				var stages []string
				source := test.source(identity.CloudConfig{
					AgentName: "main", Exchange: s.Exchanger,
					Stage: func(name, source string, took time.Duration) {
						if took <= 0 || !strings.HasSuffix(source, "instance identity") {
							t.Errorf("%s of %q took %v", name, source, took)
						}
						stages = append(stages, name)
					},
				})
				for i := range 2 {
					token, err := source.Token(t.Context())
					if err != nil {
						t.Fatal(err)
					}
					if want := fmt.Sprintf("token-%d", i+1); token.Reveal() != want {
						t.Errorf("token %q, want %q", token.Reveal(), want)
					}
				}
				want := []string{identity.StageFetched, identity.StageExchanged, identity.StageFetched, identity.StageExchanged}
				if diff := cmp.Diff(want, stages); diff != "" {
					t.Errorf("stages (-want +got):\n%s", diff)
				}
				for i, p := range s.asked {
					if s.paths[i] != test.path || p.AgentName != "main" {
						t.Errorf("agent %q at %s", p.AgentName, s.paths[i])
					}
					var given wire.IdentityChallenge
					if !stock {
						given = s.given[i]
					}
					test.check(t, p, given)
					checkProof(t, test.name, s, p, given)
				}
				if !stock && s.asked[0].ProofKey != s.asked[1].ProofKey {
					t.Error("the proof key changed")
				}
			})
		}
	}
}

func cutLast(token string) (before, after string, found bool) {
	i := strings.LastIndex(token, ".")
	return token[:max(i, 0)], token[i+1:], i >= 0
}

// checkProof checks what berth adds to an exchange, which is nothing where there was no challenge.
func checkProof(t *testing.T, provider string, s *server, p posted, given wire.IdentityChallenge) {
	t.Helper()
	if given.Challenge == "" {
		if diff := cmp.Diff(wire.IdentityProof{}, p.IdentityProof); diff != "" {
			t.Errorf("a stock server got more than it knows (-want +got):\n%s", diff)
		}
		return
	}
	key, err := base64.StdEncoding.DecodeString(p.ProofKey)
	if err != nil || len(key) != ed25519.PublicKeySize {
		t.Fatalf("proof key %q: %v", p.ProofKey, err)
	}
	proof, err := base64.StdEncoding.DecodeString(p.Proof)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(p.payload()))
	message := fmt.Sprintf("berth-identity-proof-v1\n%s\n%s\n%x\n", provider, given.Challenge, sum)
	if p.Challenge != given.Challenge || !ed25519.Verify(key, []byte(message), proof) {
		t.Errorf("challenge %q with a proof that does not verify; given was %q", p.Challenge, given.Challenge)
	}
	info, err := os.Stat(s.ProofKey)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("the proof key's file: %v, %v", info, err)
	}
}

// answer serves one fixed response with headers given by name and value.
func answer(status int, body string, header ...string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(status)
		w.Write([]byte(body))
	})
}

// awsAnswer gives a token to whoever asks, and then the same text for every file.
func awsAnswer(text string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "60")
		if r.Method == http.MethodPut {
			w.Write([]byte("t"))
			return
		}
		w.Write([]byte(text))
	})
}

// TestMetadataFailures: each is told with its cause and its fix, and nothing is posted to the server.
func TestMetadataFailures(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	nobody := "http://" + closed.Addr().String()
	hop, off, aws := fakeAWS(t), fakeAWS(t), fakeAWS(t)
	hop.SetMode(testnet.AWSHopLimit)
	off.SetMode(testnet.AWSOff)
	busy, gone, azure := fakeAzure(t), fakeAzure(t), fakeAzure(t)
	busy.SetMode(testnet.AzureBusy)
	gone.SetMode(testnet.AzureGone)
	bare, pod, google := fakeGoogle(t), fakeGoogle(t), fakeGoogle(t)
	bare.SetMode(testnet.GoogleNoServiceAccount)
	pod.SetMode(testnet.GoogleWorkloadIdentity)
	big := strings.Repeat("x", 1<<20)
	redirect := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/elsewhere") {
			t.Errorf("followed to %s", r.URL)
		}
		http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
	})
	v1 := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodPut:
			w.WriteHeader(http.StatusMethodNotAllowed)
		case strings.Contains(r.URL.Path, "instance-identity"):
			t.Error("read without a token")
		}
	})
	addsForwarded := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Header.Set("X-Forwarded-For", "10.0.0.1")
		w.Header().Set("Via", "1.1 proxy")
		google.ServeHTTP(w, r)
	})
	restricted := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "attested") {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		azure.ServeHTTP(w, r)
	})
	hidesFlavor := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Header.Del("Metadata-Flavor")
		google.ServeHTTP(w, r)
	})

	for _, test := range []struct {
		name       string
		source     func(identity.CloudConfig) identity.Source
		service    http.Handler // nil: nobody listens
		cause, fix string
	}{
		{"hop limit", identity.AWS, hop, "hop limit of 1", "aws ec2 modify-instance-metadata-options --instance-id <id> --http-put-response-hop-limit 2"},
		{"switched off", identity.AWS, off, "switched off for this instance", "--http-endpoint enabled"},
		{"nobody there", identity.AWS, nil, "no metadata service at " + nobody, "firewall"},
		{"another kind of service", identity.AWS, http.NotFoundHandler(), "not AWS's metadata service (status 404)", "--auth auto"},
		{"IMDSv1 only", identity.AWS, v1, "not AWS's metadata service (status 405)", "--auth auto"},
		{"redirect", identity.AWS, redirect, "status 307", "something else answers"},
		{"endless token", identity.AWS, answer(200, big, "X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "60"), "too large", "something else answers"},
		{"endless document", identity.AWS, awsAnswer(big), "too large", "something else answers"},
		{"no document", identity.AWS, awsAnswer("<html>"), "it is not JSON", "emulator"},
		{"proxy", identity.AWS, answer(407, "", "Via", "1.1 squid"), "a proxy answers in place of AWS's", "exempt"},
		{"AWS on Azure", identity.AWS, azure, "not on AWS but on Azure", "--auth azure-instance-identity"},
		{"AWS on Google", identity.AWS, google, "not on AWS but on Google Cloud", "--auth google-instance-identity"},

		{"nobody there", identity.Azure, nil, "no metadata service", "firewall"},
		{"busy", identity.Azure, busy, "asked too often", "wait"},
		{"gone", identity.Azure, gone, "being updated", "70 s"},
		{"Azure on AWS", identity.Azure, aws, "not on Azure but on AWS", "--auth aws-instance-identity"},
		{"Azure on Google", identity.Azure, google, "not on Azure but on Google Cloud", "--auth google-instance-identity"},
		{"no document", identity.Azure, answer(200, "<html>"), "it is not JSON", "something else answers"},
		{"no signature", identity.Azure, answer(200, "{}"), "holds no signature", "something else answers"},
		{"strange signature", identity.Azure, answer(200, `{"signature":"%"}`), "not base64", "something else answers"},
		{"endless document", identity.Azure, answer(200, big), "too large", "something else answers"},
		{"restricted", identity.Azure, restricted, "Azure's metadata service at http://127.0.0.1:", "what on this machine or in its cloud restricts"},
		{"refuses", identity.Azure, answer(400, "{}"), "not Azure's metadata service (status 400)", "--auth auto"},

		{"nobody there", identity.Google, nil, "no metadata service", "firewall"},
		{"no service account", identity.Google, bare, "no service account", "gcloud compute instances set-service-account"},
		{"workload identity", identity.Google, pod, "GKE", "--auth kubernetes-service-account"},
		{"proxy takes out a header", identity.Google, hidesFlavor, "takes out Metadata-Flavor", "exempt"},
		{"proxy adds a header", identity.Google, addsForwarded, "status 403", "exempt"},
		{"Google on AWS", identity.Google, aws, "not on Google Cloud but on AWS", "--auth aws-instance-identity"},
		{"Google on Azure", identity.Google, azure, "not on Google Cloud but on Azure", "--auth azure-instance-identity"},
		{"no token", identity.Google, answer(200, "<html>", "Metadata-Flavor", "Google"), "no signed token", "something else answers"},
		{"another audience", identity.Google, answer(200, jwt(t, map[string]any{"aud": "x"})), "another audience", "something else answers"},
		{"endless token", identity.Google, answer(200, big), "too large", "something else answers"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := newServer(t)
			endpoint := nobody
			if test.service != nil {
				endpoint = serve(t, test.service)
			}
			source := test.source(identity.CloudConfig{Exchange: s.Exchanger, Endpoint: endpoint})
			_, err := source.Token(t.Context())
			wantFailure(t, err, test.cause, test.fix)
			if len(s.asked) != 0 {
				t.Errorf("the server was asked %d times", len(s.asked))
			}
		})
	}
}

func TestAWSDisabled(t *testing.T) {
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	s := newServer(t)
	_, err := identity.AWS(identity.CloudConfig{Exchange: s.Exchanger, Endpoint: serve(t, fakeAWS(t))}).Token(t.Context())
	wantFailure(t, err, "AWS_EC2_METADATA_DISABLED=true", "unset it")
}

// TestAWSHangs: a service that takes connections and says nothing is given up within its deadlines.
func TestAWSHangs(t *testing.T) {
	s := newServer(t)
	silent := serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	start := time.Now()
	_, err := identity.AWS(identity.CloudConfig{Exchange: s.Exchanger, Endpoint: silent}).Token(t.Context())
	wantFailure(t, err, "does not answer", "firewall")
	if took := time.Since(start); took > 15*time.Second {
		t.Errorf("took %v", took)
	}
}

func TestAzureTakesTheNewestVersion(t *testing.T) {
	azure := fakeAzure(t)
	azure.SetMode(testnet.AzureNew)
	s := newServer(t)
	if _, err := identity.Azure(identity.CloudConfig{Exchange: s.Exchanger, Endpoint: serve(t, azure)}).Token(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestAzureRetries: 429 and 410 pass while the document is asked for again.
func TestAzureRetries(t *testing.T) {
	for _, mode := range []testnet.FakeAzureMode{testnet.AzureBusy, testnet.AzureGone} {
		azure := fakeAzure(t)
		azure.SetMode(mode)
		endpoint := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			azure.ServeHTTP(w, r)
			azure.SetMode(testnet.AzureOn)
		}))
		s := newServer(t)
		if _, err := identity.Azure(identity.CloudConfig{Exchange: s.Exchanger, Endpoint: endpoint}).Token(t.Context()); err != nil || azure.Asked() != 2 {
			t.Errorf("mode %d: %v after %d requests", mode, err, azure.Asked())
		}
	}
}

func TestExchangeErrors(t *testing.T) {
	s := newServer(t)
	source := identity.AWS(identity.CloudConfig{Exchange: s.Exchanger, Endpoint: serve(t, fakeAWS(t))})
	for _, status := range []int{400, 401, 403, 404, 409, 425, 429, 500, 503} {
		s.refuse = func(w http.ResponseWriter, _ *http.Request) {
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
	s.refuse = func(w http.ResponseWriter, r *http.Request) { w.Write([]byte("<html>welcome")) }
	var page *wire.UnexpectedResponse
	if _, err := source.Token(t.Context()); !errors.As(err, &page) || page.StatusCode != 200 {
		t.Errorf("a page: %v", err)
	}
	s.refuse = func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Write([]byte(`{"session_token":""}`))
	}
	if _, err := source.Token(t.Context()); err == nil || !strings.Contains(err.Error(), "it is empty") {
		t.Errorf("empty token: %v", err)
	}
}

// TestServersWithoutChallenges: whatever refuses the question does not keep a machine from proving
// itself as it does to a stock server; what may pass is told as it is.
func TestServersWithoutChallenges(t *testing.T) {
	aws := serve(t, fakeAWS(t))
	for _, test := range []struct {
		status int
		media  string
		goesOn bool
	}{
		{404, "application/json", true}, {405, "application/json", true}, {401, "application/json", true},
		{404, "text/html", true}, {403, "text/html", true}, {400, "text/plain", true},
		{429, "application/json", false}, {503, "application/json", false}, {500, "application/json", false},
		{407, "text/plain", false}, {429, "text/html", false}, {502, "text/html", false}, {200, "text/html", false},
	} {
		s := newServer(t)
		s.noChallenge = func(w http.ResponseWriter) {
			w.Header().Set("Content-Type", test.media)
			w.WriteHeader(test.status)
			w.Write([]byte(`{"message":"No."}`))
		}
		_, err := identity.AWS(identity.CloudConfig{Exchange: s.Exchanger, Endpoint: aws}).Token(t.Context())
		if (err == nil) != test.goesOn || (len(s.asked) == 1) != test.goesOn {
			t.Errorf("%d %s: %v after %d exchanges, want that it goes on: %v", test.status, test.media, err, len(s.asked), test.goesOn)
		}
	}
}

// TestChallengesThatAreRefused: what a cloud signs must be good for a control server only.
func TestChallengesThatAreRefused(t *testing.T) {
	good := strings.Repeat("a1", 16)
	google, azure := serve(t, fakeGoogle(t)), serve(t, fakeAzure(t))
	for _, test := range []struct {
		name      string
		source    func(identity.CloudConfig) identity.Source
		endpoint  string
		challenge wire.IdentityChallenge
	}{
		{"empty", identity.Azure, azure, wire.IdentityChallenge{}},
		{"short", identity.Azure, azure, wire.IdentityChallenge{Challenge: good[1:]}},
		{"other characters", identity.Azure, azure, wire.IdentityChallenge{Challenge: good[1:] + "&"}},
		{"no audience", identity.Google, google, wire.IdentityChallenge{Challenge: good}},
		{"another service", identity.Google, google, wire.IdentityChallenge{Challenge: good, Audience: "https://vault.example"}},
		{"another challenge", identity.Google, google, wire.IdentityChallenge{Challenge: good, Audience: "https://berth.example?challenge=" + strings.Repeat("b", 32)}},
		{"endless", identity.Google, google, wire.IdentityChallenge{Challenge: good, Audience: "https://" + strings.Repeat("b", 4096) + "?challenge=" + good}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newServer(t)
			s.challenge = &test.challenge
			_, err := test.source(identity.CloudConfig{Exchange: s.Exchanger, Endpoint: test.endpoint}).Token(t.Context())
			if err == nil || !strings.Contains(err.Error(), "cannot use the server's challenge") || len(s.asked) != 0 {
				t.Errorf("%v after %d exchanges", err, len(s.asked))
			}
		})
	}
}

func TestProofKeyThatCannotBeUsed(t *testing.T) {
	aws := serve(t, fakeAWS(t))
	for name, test := range map[string]struct {
		prepare func(t *testing.T, path string) string
		cause   string
	}{
		"no directory": {func(t *testing.T, path string) string { return filepath.Join(path, "below", "key") }, "no such file"},
		"damaged": {func(t *testing.T, path string) string {
			if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
			return path
		}, "no PEM block"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			s.ProofKey = test.prepare(t, s.ProofKey)
			_, err := identity.AWS(identity.CloudConfig{Exchange: s.Exchanger, Endpoint: aws}).Token(t.Context())
			wantFailure(t, err, test.cause, "remove it")
		})
	}
}

// TestAuto finds the cloud by what the machine shows of it, says how, and is quick about it.
func TestAuto(t *testing.T) {
	mark := func(file, text string) string {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	aws, azure, google := serve(t, fakeAWS(t)), serve(t, fakeAzure(t)), serve(t, fakeGoogle(t))
	hop := fakeAWS(t)
	hop.SetMode(testnet.AWSHopLimit)
	for _, test := range []struct {
		name     string
		firmware string
		env      map[string]string
		cloud    string
		how      string
	}{
		{"AWS by variable", t.TempDir(), map[string]string{"AWS_EC2_METADATA_SERVICE_ENDPOINT": aws}, "AWS", "AWS_EC2_METADATA_SERVICE_ENDPOINT"},
		{"AWS, tokens kept back", t.TempDir(), map[string]string{"AWS_EC2_METADATA_SERVICE_ENDPOINT": serve(t, hop)}, "AWS", "AWS_EC2_METADATA_SERVICE_ENDPOINT"},
		{"Azure by variable", t.TempDir(), map[string]string{"BERTH_AZURE_METADATA_ENDPOINT": azure}, "Azure", "BERTH_AZURE_METADATA_ENDPOINT"},
		{"Google by variable", t.TempDir(), map[string]string{"GCE_METADATA_HOST": strings.TrimPrefix(google, "http://")}, "Google Cloud", "GCE_METADATA_HOST"},
		{"a variable for nothing", mark("sys_vendor", "Amazon EC2"), map[string]string{"GCE_METADATA_HOST": "127.0.0.1:1"}, "AWS", "sys_vendor says Amazon EC2"},
		{"AWS by firmware", mark("bios_vendor", "Amazon EC2"), nil, "AWS", "bios_vendor says Amazon EC2"},
		{"Azure by firmware", mark("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77"), nil, "Azure", "chassis_asset_tag"},
		{"Google by firmware", mark("product_name", "Google Compute Engine"), nil, "Google Cloud", "product_name"},
	} {
		t.Run(test.name, func(t *testing.T) {
			// Nobody answers at what is not named.
			for _, name := range []string{"AWS_EC2_METADATA_SERVICE_ENDPOINT", "BERTH_AZURE_METADATA_ENDPOINT"} {
				t.Setenv(name, "http://127.0.0.1:1")
			}
			t.Setenv("GCE_METADATA_HOST", "127.0.0.1:1")
			for name, value := range test.env {
				t.Setenv(name, value)
			}
			s := newServer(t)
			var cloud, how string
			source := identity.Auto(identity.AutoConfig{
				CloudConfig: identity.CloudConfig{Exchange: s.Exchanger},
				Firmware:    test.firmware,
				Found:       func(c, h string) { cloud, how = c, h },
			})
			// A machine that claims to be elsewhere than it is gets no token; it is found all the same.
			token, err := source.Token(t.Context())
			if cloud != test.cloud || !strings.Contains(how, test.how) {
				t.Errorf("found %q, as %q; want %s, as %q: %v", cloud, how, test.cloud, test.how, err)
			}
			if test.env != nil && strings.HasSuffix(test.name, "by variable") && (err != nil || token.Reveal() != "token-1") {
				t.Errorf("token %q, %v", token.Reveal(), err)
			}
			if want := test.cloud + " instance identity"; source.String() != want {
				t.Errorf("called %q, want %q", source, want)
			}
		})
	}
}

// TestAutoGivesUpInTime: where connections are taken and nothing is said, no cloud is found, within the
// two seconds that it may take and what a busy machine adds.
func TestAutoGivesUpInTime(t *testing.T) {
	silent := serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", silent)
	t.Setenv("BERTH_AZURE_METADATA_ENDPOINT", silent)
	t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(silent, "http://"))
	s := newServer(t)
	start := time.Now()
	source := identity.Auto(identity.AutoConfig{CloudConfig: identity.CloudConfig{Exchange: s.Exchanger}, Firmware: t.TempDir()})
	_, err := source.Token(t.Context())
	wantFailure(t, err, "in no cloud that is known", "--auth token")
	took := time.Since(start)
	t.Logf("gave up after %v", took.Round(time.Millisecond))
	if took > 5*time.Second {
		t.Errorf("took %v", took)
	}
}
