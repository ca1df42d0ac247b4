package testnet

import (
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
)

// FakeAzureMode is how a [FakeAzure] behaves.
type FakeAzureMode int32

const (
	// AzureOn answers as a virtual machine's metadata service.
	AzureOn FakeAzureMode = iota
	// AzureBusy answers 429, as when the machine asks more than five times a second.
	AzureBusy
	// AzureGone answers 410, as while the service is being updated.
	AzureGone
	// AzureNew knows API versions of 2025 and later only.
	AzureNew
)

// FakeAzureSubscription is what a [FakeAzure] belongs to.
const FakeAzureSubscription = "8d10da13-8125-4ba9-a717-bf7490507b3d"

// azureLifetime is how long Azure's documents have been seen to last.
const azureLifetime = 6 * time.Hour

var (
	azureVersions    = []string{"2018-10-01", "2019-04-30", "2019-11-01", "2020-09-01", "2021-02-01", "2021-12-13", "2023-11-15", "2025-04-07"}
	azureNewVersions = []string{"2025-04-07", "2026-01-01"}
)

// FakeAzure is the metadata service of one virtual machine of Azure, with a chain of certificates of
// its own. It is an [http.Handler] that may be used by many at once.
type FakeAzure struct {
	vmID   string
	signer *AzureSigner
	mode   atomic.Int32
	asked  atomic.Int32
}

// NewFakeAzure returns the metadata service of a new virtual machine with a random id. leaf says what
// its certificate holds.
func NewFakeAzure(leaf AzureLeaf) (*FakeAzure, error) {
	signer, err := NewAzureSigner(leaf)
	if err != nil {
		return nil, err
	}
	return &FakeAzure{vmID: uuid.NewString(), signer: signer}, nil
}

// InstanceID is the vmId in the signed document.
func (f *FakeAzure) InstanceID() string { return f.vmID }

// Signer signs the documents; a server that shall believe this fake trusts its certificates.
func (f *FakeAzure) Signer() *AzureSigner { return f.signer }

// SetMode changes the behaviour for the requests to come.
func (f *FakeAzure) SetMode(mode FakeAzureMode) { f.mode.Store(int32(mode)) }

// Asked counts the requests for a document.
func (f *FakeAzure) Asked() int { return int(f.asked.Load()) }

// ServeHTTP implements [http.Handler].
func (f *FakeAzure) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	refuse := func(status int, text string) { azureAnswer(w, status, map[string]any{"error": text}) }
	query := r.URL.Query()
	switch {
	case r.Method != http.MethodGet:
		refuse(http.StatusMethodNotAllowed, "Method not allowed. HTTP method is not supported")
	case r.Header.Get("X-Forwarded-For") != "":
		refuse(http.StatusBadRequest, "Bad request. The request must not pass through a proxy")
	case !strings.EqualFold(r.Header.Get("Metadata"), "true"):
		refuse(http.StatusBadRequest, "Bad request. Required metadata header not specified")
	case r.URL.Path == "/metadata/versions":
		azureAnswer(w, http.StatusOK, map[string]any{"apiVersions": f.versions()})
	case r.URL.Path != "/metadata/attested/document":
		refuse(http.StatusNotFound, "Not found")
	case !f.knows(query["api-version"]):
		versions := f.versions()
		azureAnswer(w, http.StatusBadRequest, map[string]any{
			"error":           "Bad request. api-version is invalid or was not specified in the request. For more information refer to aka.ms/azureimds",
			"newest-versions": versions[max(0, len(versions)-3):],
		})
	default:
		f.asked.Add(1)
		f.serveDocument(w, query["nonce"])
	}
}

func (f *FakeAzure) serveDocument(w http.ResponseWriter, nonce []string) {
	refuse := func(status int, text string) { azureAnswer(w, status, map[string]any{"error": text}) }
	switch mode := FakeAzureMode(f.mode.Load()); {
	case mode == AzureBusy:
		w.Header().Set("Retry-After", "1")
		refuse(http.StatusTooManyRequests, "Too many requests")
	case mode == AzureGone:
		refuse(http.StatusGone, "Gone. The service is being updated, try again within 70 seconds")
	case len(nonce) > 1 || len(nonce) == 1 && !azureNonce(nonce[0]):
		refuse(http.StatusBadRequest, "Bad request. The nonce is at most 32 letters and digits")
	default:
		now := time.Now()
		document := AzureDocument{VMID: f.vmID, SubscriptionID: FakeAzureSubscription, Created: now, Expires: now.Add(azureLifetime)}
		if len(nonce) == 1 {
			document.Nonce = nonce[0]
		}
		signature, err := f.signer.Sign(document.String())
		if err != nil {
			refuse(http.StatusInternalServerError, err.Error())
			return
		}
		azureAnswer(w, http.StatusOK, map[string]any{"encoding": "pkcs7", "signature": signature})
	}
}

func (f *FakeAzure) versions() []string {
	if FakeAzureMode(f.mode.Load()) == AzureNew {
		return azureNewVersions
	}
	return azureVersions
}

// knows tells whether one API version was given, and one that is served.
func (f *FakeAzure) knows(given []string) bool {
	return len(given) == 1 && slices.Contains(f.versions(), given[0])
}

func azureNonce(nonce string) bool {
	return len(nonce) <= 32 && !strings.ContainsFunc(nonce, func(r rune) bool {
		return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9')
	})
}

func azureAnswer(w http.ResponseWriter, status int, body map[string]any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("Server", "IMDS/150.870.65.1854")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // a caller that left misses it
}
