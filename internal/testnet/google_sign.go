package testnet

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"sync"
	"time"
)

// GoogleSigner signs identity tokens as Google does. As an [http.Handler] it serves the set of keys
// that verify them.
type GoogleSigner struct {
	mu      sync.Mutex
	keys    []googleKey // the newest signs
	fetched int
}

type googleKey struct {
	id  string
	key *rsa.PrivateKey
}

// NewGoogleSigner returns a signer with one key.
func NewGoogleSigner() (*GoogleSigner, error) {
	g := new(GoogleSigner)
	if err := g.Rotate(); err != nil {
		return nil, err
	}
	return g, nil
}

// Rotate makes a new key, with which tokens are signed from now on. Of the older ones the last stays
// published.
func (g *GoogleSigner) Rotate() error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return fmt.Errorf("cannot make a key for the fake Google: %w", err)
	}
	id := make([]byte, 20)
	rand.Read(id)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.keys = append(g.keys[max(0, len(g.keys)-1):], googleKey{hex.EncodeToString(id), key})
	return nil
}

// PublicKey is the newest key and its id.
func (g *GoogleSigner) PublicKey() (id string, key *rsa.PublicKey) {
	newest := g.newest()
	return newest.id, &newest.key.PublicKey
}

func (g *GoogleSigner) newest() googleKey {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.keys[len(g.keys)-1]
}

// Fetched counts how often the keys were served.
func (g *GoogleSigner) Fetched() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.fetched
}

// Sign returns a token with the claims.
func (g *GoogleSigner) Sign(claims map[string]any) (string, error) {
	newest := g.newest()
	header, err := json.Marshal(map[string]string{"alg": "RS256", "kid": newest.id, "typ": "JWT"})
	if err != nil {
		return "", err
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		return "", fmt.Errorf("cannot encode the claims: %w", err)
	}
	text := base64.RawURLEncoding.EncodeToString(header) + "." + base64.RawURLEncoding.EncodeToString(payload)
	sum := sha256.Sum256([]byte(text))
	signature, err := rsa.SignPKCS1v15(nil, newest.key, crypto.SHA256, sum[:])
	if err != nil {
		return "", fmt.Errorf("cannot sign for the fake Google: %w", err)
	}
	return text + "." + base64.RawURLEncoding.EncodeToString(signature), nil
}

// ServeHTTP implements [http.Handler] with the set of keys, which may be kept for an hour.
func (g *GoogleSigner) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	type jwk struct {
		Kty string `json:"kty"`
		Alg string `json:"alg"`
		Use string `json:"use"`
		Kid string `json:"kid"`
		N   string `json:"n"`
		E   string `json:"e"`
	}
	g.mu.Lock()
	g.fetched++
	var set struct {
		Keys []jwk `json:"keys"`
	}
	for _, k := range g.keys {
		exponent := binary.BigEndian.AppendUint32(nil, uint32(k.key.E))[1:]
		set.Keys = append(set.Keys, jwk{"RSA", "RS256", "sig", k.id,
			base64.RawURLEncoding.EncodeToString(k.key.N.Bytes()), base64.RawURLEncoding.EncodeToString(exponent)})
	}
	g.mu.Unlock()
	w.Header().Set("Content-Type", "application/json; charset=UTF-8")
	w.Header().Set("Cache-Control", "public, max-age=3600, must-revalidate, no-transform")
	_ = json.NewEncoder(w).Encode(set) // a caller that left misses it
}

// GoogleClaims are the claims of a machine's token in the full format, as of now.
func GoogleClaims(audience, instanceID, project, zone string, now time.Time) map[string]any {
	return map[string]any{
		"aud": audience, "azp": "112179062720391305885", "sub": "112179062720391305885",
		"email": "1071284184436-compute@developer.gserviceaccount.com", "email_verified": true,
		"iss": "https://accounts.google.com", "iat": now.Unix(), "exp": now.Add(time.Hour).Unix(),
		"google": map[string]any{"compute_engine": map[string]any{
			"instance_creation_timestamp": now.Add(-time.Minute).Unix(), "instance_id": instanceID, "instance_name": "vm",
			"project_id": project, "project_number": 1071284184436, "zone": zone,
		}},
	}
}
