package attest

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"

	"github.com/berthd/berth/wire"
)

// Where Google's tokens come from, and its keys.
const (
	GoogleIssuer = "https://accounts.google.com"
	GoogleKeys   = "https://www.googleapis.com/oauth2/v3/certs"
)

// maxGoogleToken is in bytes; real ones have 1200 to 2000.
const maxGoogleToken = 16 << 10

// maxGoogleSpan is how long Google's tokens last.
const maxGoogleSpan = time.Hour

// googleInstanceID is a 64-bit number in decimal.
var googleInstanceID = regexp.MustCompile(`^[1-9][0-9]{0,19}$`)

// GoogleConfig says whom a [Google] believes. The zero value means Google.
type GoogleConfig struct {
	// Issuer and KeysURL are for a stand-in for Google.
	Issuer  string
	KeysURL *url.URL
	// HTTP fetches the keys; nil is a client of its own, which uses the proxy of the environment.
	HTTP *http.Client
	// Now is the clock; nil is the real one.
	Now func() time.Time
}

// Google verifies identity tokens of Google Compute Engine.
type Google struct {
	issuer string
	keys   *googleKeys
	clock  clock
}

// NewGoogle returns a verifier. It fetches keys when it needs them.
func NewGoogle(config GoogleConfig) *Google {
	keysURL := GoogleKeys
	if config.KeysURL != nil {
		keysURL = config.KeysURL.String()
	}
	return &Google{
		issuer: cmp.Or(config.Issuer, GoogleIssuer), clock: config.Now,
		keys: newGoogleKeys(keysURL, config.HTTP, config.Now),
	}
}

// GoogleProof is what a Google machine sends.
type GoogleProof struct {
	// Token is an identity token in the full format.
	Token string
	// Audience is whom it must be made for. Required.
	Audience string
}

// Verify checks that a token was made by Google for a machine and an audience, and is not over. Its
// error is [ErrClaims] when Google signed something else, and [ErrUnavailable] when Google's keys
// cannot be had.
func (g *Google) Verify(ctx context.Context, proof GoogleProof) (instance Instance, err error) {
	defer recovered(&instance, &err)
	if instance, err = g.verify(ctx, proof); err != nil {
		return Instance{}, fmt.Errorf("cannot verify Google identity: %w", err)
	}
	return instance, nil
}

func (g *Google) verify(ctx context.Context, proof GoogleProof) (Instance, error) {
	if len(proof.Token) > maxGoogleToken {
		return Instance{}, fmt.Errorf("token of %d bytes (limit %d)", len(proof.Token), maxGoogleToken)
	}
	kid, err := readJWT(proof.Token)
	if err != nil {
		return Instance{}, err
	}
	key, err := g.keys.get(ctx, kid)
	if err != nil {
		return Instance{}, err
	}
	// An audience that is empty would not be checked.
	if proof.Audience == "" {
		return Instance{}, errors.New("no audience is expected")
	}
	verifier := oidc.NewVerifier(g.issuer, &oidc.StaticKeySet{PublicKeys: []crypto.PublicKey{key}}, &oidc.Config{
		ClientID: proof.Audience, SupportedSigningAlgs: []string{oidc.RS256},
		Now: func() time.Time { return g.clock.now().Add(-expirySkew) },
	})
	token, err := verifier.Verify(ctx, proof.Token)
	if err != nil {
		return Instance{}, err
	}
	now := g.clock.now()
	switch span := token.Expiry.Sub(token.IssuedAt); {
	case token.IssuedAt.After(now.Add(futureSkew)):
		return Instance{}, fmt.Errorf("token was made at %s, in the future; is this machine's clock right?", token.IssuedAt.UTC().Format(time.RFC3339))
	case span <= 0, span > maxGoogleSpan+expirySkew:
		return Instance{}, fmt.Errorf("token lasts %s", span)
	}
	var payload payloadBytes
	if err := token.Claims(&payload); err != nil {
		return Instance{}, err
	}
	instance, err := parseGoogleClaims(payload)
	if err != nil {
		return Instance{}, err
	}
	instance.Issued, instance.Expires = token.IssuedAt.UTC(), token.Expiry.UTC()
	instance.Payload = payloadHash([]byte(proof.Token))
	return instance, nil
}

// readJWT checks that a token is what its signature covers and nothing else, in the one encoding there
// is, and returns the id of its key. Nothing is believed yet.
func readJWT(token string) (kid string, err error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return "", errors.New("not a token of three parts")
	}
	var decoded [3][]byte
	for i, part := range parts {
		// Decoders skip line breaks and bits that are not used.
		decoded[i], err = base64.RawURLEncoding.Strict().DecodeString(part)
		if err != nil || base64.RawURLEncoding.EncodeToString(decoded[i]) != part {
			return "", fmt.Errorf("part %d of the token is not base64", i+1)
		}
	}
	header, err := parseObject(decoded[0])
	if err != nil {
		return "", fmt.Errorf("header of the token: %w", err)
	}
	if _, ok := header["crit"]; ok {
		return "", errors.New("header of the token: extensions are not supported")
	}
	alg, err := header.text("alg")
	if err != nil || alg != oidc.RS256 {
		return "", fmt.Errorf("the token is signed by algorithm %.20q, not %s", alg, oidc.RS256)
	}
	kid, err = header.text("kid")
	if err != nil || kid == "" {
		return "", errors.New("the token does not name its key")
	}
	// All is read again after the signature was checked; twice the same name is for nobody to choose.
	if _, err := parseObject(decoded[1]); err != nil {
		return "", fmt.Errorf("claims of the token: %w", err)
	}
	return kid, nil
}

// payloadBytes takes the claims as they are.
type payloadBytes []byte

// UnmarshalJSON implements [json.Unmarshaler].
func (p *payloadBytes) UnmarshalJSON(text []byte) error {
	*p = bytes.Clone(text)
	return nil
}

// parseGoogleClaims reads signed claims.
func parseGoogleClaims(text []byte) (Instance, error) {
	claims, err := parseObject(text)
	if err != nil {
		return Instance{}, fmt.Errorf("%w: %w", ErrClaims, err)
	}
	// A list, even of one, is not what Google writes: what is for several is what others hold, too.
	if _, err := claims.text("aud"); err != nil {
		return Instance{}, err
	}
	google, err := claims.object("google")
	if err != nil {
		return Instance{}, fmt.Errorf("%w: %w", ErrClaims, err)
	}
	machine, err := google.object("compute_engine")
	if err != nil {
		return Instance{}, fmt.Errorf("%w: %w", ErrClaims, err)
	}
	instance := Instance{Provider: wire.ProviderGoogle, Partition: "google"}
	for name, into := range map[string]*string{"instance_id": &instance.ID, "project_id": &instance.Account, "zone": &instance.Zone} {
		if *into, err = machine.text(name); err != nil {
			return Instance{}, fmt.Errorf("%w: %w", ErrClaims, err)
		}
	}
	if !googleInstanceID.MatchString(instance.ID) {
		return Instance{}, fmt.Errorf("instance_id %q is not one; is the token in the full format, and of a machine of its own?", instance.ID)
	}
	instance.Region = instance.Zone
	if i := strings.LastIndexByte(instance.Zone, '-'); i > 0 {
		instance.Region = instance.Zone[:i]
	}
	return instance, nil
}
