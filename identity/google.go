package identity

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"

	gcp "cloud.google.com/go/compute/metadata"

	"github.com/berthd/berth/wire"
)

// googleEndpointEnv is a variable of Google's client: host and port.
const googleEndpointEnv = "GCE_METADATA_HOST"

// googleAudience is what stock servers take a token for.
const googleAudience = "coder"

// Google proves which Compute Engine instance this is with an identity token of its service account.
// The metadata service is at GCE_METADATA_HOST, else at 169.254.169.254.
func Google(config CloudConfig) Source { return newCloudSource(googleCloud{}, config) }

type googleCloud struct{}

func (googleCloud) provider() string { return wire.ProviderGoogle }

func (googleCloud) title() string { return "Google Cloud" }

func (googleCloud) endpoints() (list []string, told string) {
	if host := os.Getenv(googleEndpointEnv); host != "" {
		return []string{"http://" + host}, googleEndpointEnv
	}
	return []string{linkLocal}, ""
}

func (googleCloud) fetch(ctx context.Context, m *metadata, want request) (proof, error) {
	endpoint, err := url.Parse(m.endpoint)
	if err != nil {
		return proof{}, err
	}
	audience := cmp.Or(want.challenge.Audience, googleAudience)
	client := gcp.NewClient(&http.Client{Transport: toHost{m, endpoint.Host}, CheckRedirect: m.client().CheckRedirect})
	token, err := client.GetWithContext(ctx, "instance/service-accounts/default/identity?"+url.Values{"audience": {audience}, "format": {"full"}}.Encode())
	if err != nil {
		return proof{}, err
	}
	token = strings.TrimSpace(token)
	if err := checkGoogleToken(token, audience); err != nil {
		f := &Failure{
			Cause: fmt.Sprintf("what answers at %s gives no identity token as Google's metadata service does: %v", m.endpoint, err),
			Fix:   "see whether something else answers in its place, " + instead, err: err,
		}
		if errors.Is(err, errNoInstance) {
			f.Cause = "Google's identity token names no instance: this is a pod on GKE with Workload Identity"
			f.Fix = "use the pod's own token (--auth kubernetes-service-account), " + instead
		}
		return proof{}, f
	}
	body := &wire.GoogleInstanceIdentity{JSONWebToken: token, AgentName: want.agentName}
	return proof{body, token, &body.IdentityProof}, nil
}

// toHost sends requests to another host than the one they name, which Google's client takes from the
// environment alone.
type toHost struct {
	*metadata
	host string
}

// RoundTrip implements [http.RoundTripper].
func (t toHost) RoundTrip(req *http.Request) (*http.Response, error) {
	req = req.Clone(req.Context())
	req.URL.Host, req.Host = t.host, ""
	return t.metadata.RoundTrip(req)
}

var errNoInstance = errors.New("it names no instance")

// checkGoogleToken finds out what would make the server refuse a token though it is genuine.
func checkGoogleToken(token, audience string) error {
	c, err := readClaims(token)
	switch {
	case err != nil:
		return err
	case !slices.Contains(c.Audience, audience):
		return errors.New("it is for another audience")
	case c.Google.ComputeEngine.InstanceID == nil:
		return errNoInstance
	}
	return nil
}

func (googleCloud) explain(_ context.Context, m *metadata) *Failure {
	switch {
	case m.status == http.StatusNotFound && isGoogle(m.header):
		return &Failure{
			Cause: "this instance has no service account, without which Google makes no identity token (status 404)",
			Fix:   "run gcloud compute instances set-service-account <instance> --service-account <email> --scopes cloud-platform while it is stopped, " + instead,
		}
	case m.status == http.StatusForbidden && isGoogle(m.header):
		return &Failure{
			Cause: "Google's metadata service refuses this request (status 403): a proxy in between takes out Metadata-Flavor or adds X-Forwarded-For, or identity tokens are forbidden here",
			Fix:   "exempt the metadata service from the proxy; on GKE see that the node pool's metadata server is on, " + instead,
		}
	}
	return nil
}

func isGoogle(answer http.Header) bool { return answer.Get("Metadata-Flavor") == "Google" }

func (googleCloud) probe(ctx context.Context, m *metadata) bool {
	_, err := m.ask(ctx, http.MethodGet, "/", "Metadata-Flavor", "Google")
	return err == nil && isGoogle(m.header)
}
