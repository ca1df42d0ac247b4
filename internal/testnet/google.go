package testnet

import (
	"crypto/rand"
	"encoding/binary"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// FakeGoogleMode is how a [FakeGoogle] behaves.
type FakeGoogleMode int32

const (
	// GoogleOn answers as the metadata service of a virtual machine with a service account.
	GoogleOn FakeGoogleMode = iota
	// GoogleNoServiceAccount answers 404, as on a machine without one.
	GoogleNoServiceAccount
	// GoogleWorkloadIdentity gives tokens that name no instance, as to a pod on GKE.
	GoogleWorkloadIdentity
)

// What a [FakeGoogle] belongs to.
const (
	FakeGoogleProject = "berth-local"
	FakeGoogleZone    = "berth-local1-a"
)

// FakeGoogle is the metadata service of one Compute Engine instance, with a signing key of its own. It
// is an [http.Handler] that may be used by many at once.
type FakeGoogle struct {
	instanceID string
	signer     *GoogleSigner
	mode       atomic.Int32
}

// NewFakeGoogle returns the metadata service of a new instance with a random id.
func NewFakeGoogle() (*FakeGoogle, error) {
	signer, err := NewGoogleSigner()
	if err != nil {
		return nil, err
	}
	id := make([]byte, 8)
	rand.Read(id)
	return &FakeGoogle{instanceID: strconv.FormatUint(binary.BigEndian.Uint64(id)>>1, 10), signer: signer}, nil
}

// InstanceID is the id in the signed token.
func (f *FakeGoogle) InstanceID() string { return f.instanceID }

// Signer signs the tokens; a server that shall believe this fake takes its set of keys for Google's.
func (f *FakeGoogle) Signer() *GoogleSigner { return f.signer }

// SetMode changes the behaviour for the requests to come.
func (f *FakeGoogle) SetMode(mode FakeGoogleMode) { f.mode.Store(int32(mode)) }

// ServeHTTP implements [http.Handler].
func (f *FakeGoogle) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Metadata-Flavor", "Google")
	w.Header().Set("Server", "Metadata Server for VM")
	path, below := strings.CutPrefix(r.URL.Path, "/computeMetadata/v1/")
	switch {
	case r.URL.Path == "/":
		googleAnswer(w, "computeMetadata/\n")
	case !below:
		http.Error(w, "Error 404 (Not Found)", http.StatusNotFound)
	case r.Header.Get("Metadata-Flavor") != "Google":
		http.Error(w, "Error 403 (Forbidden): Missing Metadata-Flavor:Google header.", http.StatusForbidden)
	case r.Header.Get("X-Forwarded-For") != "":
		http.Error(w, "Error 403 (Forbidden): X-Forwarded-For is not allowed.", http.StatusForbidden)
	case r.Method != http.MethodGet:
		http.Error(w, "Error 405 (Method Not Allowed)", http.StatusMethodNotAllowed)
	case path == "instance/id":
		googleAnswer(w, f.instanceID)
	case path == "instance/service-accounts/default/identity" && FakeGoogleMode(f.mode.Load()) != GoogleNoServiceAccount:
		f.serveIdentity(w, r)
	default:
		http.Error(w, "Error 404 (Not Found)", http.StatusNotFound)
	}
}

// serveIdentity signs a new token at each request, for the audience that is asked for.
func (f *FakeGoogle) serveIdentity(w http.ResponseWriter, r *http.Request) {
	audience, format := r.URL.Query().Get("audience"), r.URL.Query().Get("format")
	if audience == "" {
		http.Error(w, "non-empty audience parameter required", http.StatusBadRequest)
		return
	}
	claims := GoogleClaims(audience, f.instanceID, FakeGoogleProject, FakeGoogleZone, time.Now())
	if format != "full" || FakeGoogleMode(f.mode.Load()) == GoogleWorkloadIdentity {
		delete(claims, "google")
	}
	token, err := f.signer.Sign(claims)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	googleAnswer(w, token)
}

func googleAnswer(w http.ResponseWriter, text string) {
	w.Header().Set("Content-Type", "application/text")
	_, _ = io.WriteString(w, text) // a caller that left misses it
}
