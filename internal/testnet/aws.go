package testnet

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"
)

// FakeAWSRegion is where a [FakeAWS] claims to run. It is no region of AWS, so that its
// certificate, once trusted, vouches for nothing that AWS signs.
const FakeAWSRegion = "berth-local-1"

// FakeAWSMode is how a [FakeAWS] behaves.
type FakeAWSMode int32

const (
	// AWSOn answers as an instance whose metadata service requires tokens (IMDSv2).
	AWSOn FakeAWSMode = iota
	// AWSOff answers 403, as when the metadata service is switched off for the instance.
	AWSOff
	// AWSHopLimit never answers a request for a token and everything else as before: how a response
	// limited to one hop looks from a container with a network of its own.
	AWSHopLimit
	// AWSOneHop answers requests for a token in packets that travel one hop only, as EC2 does by
	// default. It works under [Serve].
	AWSOneHop
)

// Headers of IMDSv2.
const (
	awsTokenHeader = "X-Aws-Ec2-Metadata-Token"
	awsTTLHeader   = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"
	awsMaxTTL      = 21600 // six hours, in seconds
)

// FakeAWS is the metadata service of one EC2 instance, with a signing key of its own. It is an
// [http.Handler] that may be used by many at once.
type FakeAWS struct {
	instanceID string
	signer     *AWSSigner
	files      map[string]string
	secret     []byte // what session tokens are made with
	mode       atomic.Int32
}

// NewFakeAWS returns the metadata service of a new instance with a random id, just started.
func NewFakeAWS() (*FakeAWS, error) {
	id := make([]byte, 8)
	secret := make([]byte, 32)
	rand.Read(id)
	rand.Read(secret)
	// 17 hex digits, of which AWS starts with a zero.
	f := &FakeAWS{instanceID: "i-0" + hex.EncodeToString(id), secret: secret}
	var err error
	if f.signer, err = NewAWSSigner(); err != nil {
		return nil, err
	}
	document := f.document(time.Now().UTC())
	signature, rsa2048, err := f.signer.Sign(document)
	if err != nil {
		return nil, err
	}
	f.files = map[string]string{
		"/latest/dynamic/instance-identity/document":  document,
		"/latest/dynamic/instance-identity/signature": signature,
		"/latest/dynamic/instance-identity/rsa2048":   rsa2048,
		"/latest/meta-data/instance-id":               f.instanceID,
	}
	return f, nil
}

// InstanceID is the id in the signed document.
func (f *FakeAWS) InstanceID() string { return f.instanceID }

// Certificates verify the document; a server that shall believe this fake trusts them, for documents
// of [FakeAWSRegion].
func (f *FakeAWS) Certificates() []*x509.Certificate { return f.signer.Certificates() }

// SetMode changes the behaviour for the requests to come.
func (f *FakeAWS) SetMode(mode FakeAWSMode) { f.mode.Store(int32(mode)) }

// ServeHTTP implements [http.Handler].
func (f *FakeAWS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	mode := FakeAWSMode(f.mode.Load())
	switch {
	case mode == AWSOff:
		http.Error(w, "403 - Forbidden", http.StatusForbidden)
	case r.URL.Path == "/latest/api/token":
		if mode == AWSHopLimit {
			<-r.Context().Done()
			return
		}
		if mode == AWSOneHop {
			if err := oneHop(w, r); err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
		}
		f.serveToken(w, r)
	case r.Method != http.MethodGet:
		http.Error(w, "405 - Method Not Allowed", http.StatusMethodNotAllowed)
	case !f.validToken(r.Header.Get(awsTokenHeader)):
		http.Error(w, "401 - Unauthorized", http.StatusUnauthorized)
	default:
		f.serveFile(w, r)
	}
}

// serveToken refuses what came through a proxy: tokens are to stay on the machine.
func (f *FakeAWS) serveToken(w http.ResponseWriter, r *http.Request) {
	ttl, err := strconv.Atoi(r.Header.Get(awsTTLHeader))
	switch {
	case r.Method != http.MethodPut:
		http.Error(w, "405 - Method Not Allowed", http.StatusMethodNotAllowed)
	case r.Header.Get("X-Forwarded-For") != "":
		http.Error(w, "403 - Forbidden", http.StatusForbidden)
	case err != nil || ttl < 1 || ttl > awsMaxTTL:
		http.Error(w, "400 - Bad Request", http.StatusBadRequest)
	default:
		w.Header().Set("Content-Type", "text/plain")
		w.Header().Set(awsTTLHeader, strconv.Itoa(ttl))
		io.WriteString(w, f.token(time.Now().Add(time.Duration(ttl)*time.Second)))
	}
}

func (f *FakeAWS) serveFile(w http.ResponseWriter, r *http.Request) {
	text, ok := f.files[r.URL.Path]
	if !ok {
		http.Error(w, "404 - Not Found", http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "text/plain")
	io.WriteString(w, text)
}

// token is good until its expiry, which it carries under a MAC: nothing has to be remembered.
func (f *FakeAWS) token(expiry time.Time) string {
	stamp := binary.BigEndian.AppendUint64(nil, uint64(expiry.Unix()))
	mac := hmac.New(sha256.New, f.secret)
	mac.Write(stamp)
	return base64.URLEncoding.EncodeToString(mac.Sum(stamp))
}

func (f *FakeAWS) validToken(token string) bool {
	raw, err := base64.URLEncoding.DecodeString(token)
	if err != nil || len(raw) < 8 {
		return false
	}
	expiry := time.Unix(int64(binary.BigEndian.Uint64(raw)), 0)
	return hmac.Equal([]byte(f.token(expiry)), []byte(token)) && time.Now().Before(expiry)
}

// document has AWS's members, spacing, and lack of a final newline.
func (f *FakeAWS) document(started time.Time) string {
	return fmt.Sprintf(`{
  "accountId" : "111122223333",
  "architecture" : "x86_64",
  "availabilityZone" : %q,
  "billingProducts" : null,
  "devpayProductCodes" : null,
  "marketplaceProductCodes" : null,
  "imageId" : "ami-0123456789abcdef0",
  "instanceId" : %q,
  "instanceType" : "t3.micro",
  "kernelId" : null,
  "pendingTime" : %q,
  "privateIp" : "10.0.0.10",
  "ramdiskId" : null,
  "region" : %q,
  "version" : "2017-09-30"
}`, FakeAWSRegion+"a", f.instanceID, started.Format(time.RFC3339), FakeAWSRegion)
}
