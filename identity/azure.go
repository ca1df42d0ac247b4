package identity

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/berthd/berth/wire"
)

// EnvAzureEndpoint moves Azure's metadata service, for which Azure itself has no variable.
const EnvAzureEndpoint = "BERTH_AZURE_METADATA_ENDPOINT"

// azureVersion of the metadata API has all that is needed and is served in every Azure cloud.
const azureVersion = "2020-09-01"

// azureRetries is how often a request that Azure wants to see again later is made, azurePause how
// long the first pause is. It takes five a second from a machine, whoever makes them there.
const (
	azureRetries = 4
	azurePause   = 500 * time.Millisecond
)

// Azure proves which virtual machine this is with the document that its metadata service attests. The
// service is at BERTH_AZURE_METADATA_ENDPOINT, else at 169.254.169.254.
func Azure(config CloudConfig) Source { return newCloudSource(azureCloud{}, config) }

type azureCloud struct{}

func (azureCloud) provider() string { return wire.ProviderAzure }

func (azureCloud) title() string { return "Azure" }

func (azureCloud) endpoints() (list []string, told string) {
	if e := os.Getenv(EnvAzureEndpoint); e != "" {
		return []string{e}, EnvAzureEndpoint
	}
	return []string{linkLocal}, ""
}

func (c azureCloud) fetch(ctx context.Context, m *metadata, want request) (proof, error) {
	text, err := c.attested(ctx, m, azureVersion, want.challenge.Challenge)
	if err == nil && m.status == http.StatusBadRequest {
		if newest := azureNewestVersion(text); newest != "" {
			text, err = c.attested(ctx, m, newest, want.challenge.Challenge)
		}
	}
	if err != nil {
		return proof{}, err
	}
	if m.status != http.StatusOK {
		return proof{}, fmt.Errorf("status %d", m.status)
	}
	body, err := parseAzureAttested(text)
	if err != nil {
		return proof{}, &Failure{
			Cause: fmt.Sprintf("what answers at %s gives no attested document as Azure's metadata service does: %v", m.endpoint, err),
			Fix:   "see whether something else answers in its place, " + instead, err: err,
		}
	}
	body.AgentName = want.agentName
	return proof{&body, body.Signature, &body.IdentityProof}, nil
}

// attested asks for the document, and again where Azure says that it may be had a little later.
func (azureCloud) attested(ctx context.Context, m *metadata, version, nonce string) (string, error) {
	query := url.Values{"api-version": {version}}
	if nonce != "" {
		query.Set("nonce", nonce)
	}
	for attempt, pause := 1, azurePause; ; attempt, pause = attempt+1, 2*pause {
		text, err := m.ask(ctx, http.MethodGet, "/metadata/attested/document?"+query.Encode(), "Metadata", "true")
		if err != nil || attempt == azureRetries || !azureLater(m.status) {
			return text, err
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return "", ctx.Err()
		}
	}
}

// azureLater tells whether an answer means that the same request may succeed soon.
func azureLater(status int) bool {
	return status == http.StatusTooManyRequests || status == http.StatusGone || status >= 500
}

// azureNewestVersion reads from the refusal of an API version which one to ask for instead; "" if it
// names none.
func azureNewestVersion(text string) string {
	var refusal struct {
		Newest []string `json:"newest-versions"`
	}
	if json.Unmarshal([]byte(text), &refusal) != nil || len(refusal.Newest) == 0 {
		return ""
	}
	newest := slices.Max(refusal.Newest) // they are dates
	if _, err := time.Parse(time.DateOnly, newest); err != nil {
		return ""
	}
	return newest
}

// parseAzureAttested reads the answer with the document, which the server verifies.
func parseAzureAttested(text string) (wire.AzureInstanceIdentity, error) {
	var answer struct {
		Encoding  string `json:"encoding"`
		Signature string `json:"signature"`
	}
	if err := json.Unmarshal([]byte(text), &answer); err != nil {
		return wire.AzureInstanceIdentity{}, fmt.Errorf("it is not JSON: %w", err)
	}
	if answer.Signature == "" {
		return wire.AzureInstanceIdentity{}, errors.New("it holds no signature")
	}
	if _, err := base64.StdEncoding.DecodeString(answer.Signature); err != nil {
		return wire.AzureInstanceIdentity{}, errors.New("its signature is not base64")
	}
	return wire.AzureInstanceIdentity{Signature: answer.Signature, Encoding: cmp.Or(answer.Encoding, "pkcs7")}, nil
}

func (azureCloud) explain(_ context.Context, m *metadata) *Failure {
	switch {
	case m.status == http.StatusTooManyRequests:
		return &Failure{
			Cause: "Azure's metadata service is asked too often from this machine (status 429): it takes 5 requests a second",
			Fix:   "wait; it is tried again. If it goes on, find the program that asks so often",
		}
	case m.status == http.StatusGone:
		return &Failure{
			Cause: "Azure's metadata service is being updated (status 410)",
			Fix:   "wait; it is back within " + strconv.Itoa(azureGoneSeconds) + " s",
		}
	}
	return nil
}

// azureGoneSeconds is how long Azure says that status 410 may last at most.
const azureGoneSeconds = 70

func (azureCloud) probe(ctx context.Context, m *metadata) bool {
	text, err := m.ask(ctx, http.MethodGet, "/metadata/versions", "Metadata", "true")
	if err != nil || m.status != http.StatusOK {
		return false
	}
	var versions struct {
		APIVersions []string `json:"apiVersions"`
	}
	return json.Unmarshal([]byte(text), &versions) == nil && len(versions.APIVersions) > 0
}
