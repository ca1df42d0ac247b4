package attest

import (
	"cmp"
	"context"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// maxKeys bounds a set of keys, in bytes; Google's has some 1500.
	maxKeys = 64 << 10
	// keysTimeout bounds one fetch of the keys.
	keysTimeout = 5 * time.Second
	// Keys are kept as long as their server says, within these.
	leastKeysAge, mostKeysAge = time.Minute, 24 * time.Hour
	// refetchAfter is how long after a fetch an unknown key makes for another: anybody can name one.
	refetchAfter = 30 * time.Second
	// refetchFailed is how long after a failed fetch the next one may be.
	refetchFailed = 2 * time.Second
)

// googleKeys are the keys of an issuer, fetched when they are needed.
type googleKeys struct {
	url    string
	client *http.Client
	clock  clock
	// fetching is held by the one who fetches.
	fetching chan struct{}

	mu      sync.Mutex
	keys    map[string]*rsa.PublicKey
	until   time.Time // when keys end
	next    time.Time // when the next fetch may be
	failure error     // of the last fetch
}

func newGoogleKeys(url string, client *http.Client, now func() time.Time) *googleKeys {
	if client == nil {
		client = &http.Client{
			// The environment's proxy is used: the address is the operator's, unlike those in a certificate.
			Transport:     &http.Transport{Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true, MaxResponseHeaderBytes: 16 << 10},
			CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("keys are not to be had by a redirect") },
		}
	}
	return &googleKeys{url: url, client: client, clock: now, fetching: make(chan struct{}, 1)}
}

// get returns the key with an id. One that is not known makes for a fetch, but not for many.
func (k *googleKeys) get(ctx context.Context, kid string) (*rsa.PublicKey, error) {
	key, fetch, err := k.look(kid)
	if !fetch {
		return key, err
	}
	select {
	case k.fetching <- struct{}{}:
		defer func() { <-k.fetching }()
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
	}
	// Somebody may have fetched meanwhile.
	if key, fetch, err = k.look(kid); !fetch {
		return key, err
	}
	k.fetch(ctx)
	if key, fetch, err = k.look(kid); fetch {
		return nil, fmt.Errorf("%w: the keys of %s are old already", ErrUnavailable, k.url)
	}
	return key, err
}

// look finds a key, or says whether it is time to fetch, or why there is none.
func (k *googleKeys) look(kid string) (key *rsa.PublicKey, fetch bool, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := k.clock.now()
	fresh := now.Before(k.until)
	key, ok := k.keys[kid]
	switch {
	case fresh && ok:
		return key, false, nil
	case !now.Before(k.next):
		return nil, true, nil
	case !fresh:
		return nil, false, fmt.Errorf("%w: %w", ErrUnavailable, k.failure)
	}
	return nil, false, fmt.Errorf("the token's key %.64q is not one of the issuer's", kid)
}

func (k *googleKeys) fetch(ctx context.Context) {
	// Others wait for it, too: it does not end with the one who happened to come first.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), keysTimeout)
	defer cancel()
	keys, age, err := k.request(ctx)
	k.mu.Lock()
	defer k.mu.Unlock()
	now := k.clock.now()
	if err != nil {
		k.failure, k.next = err, now.Add(refetchFailed)
		return
	}
	k.keys, k.until, k.next = keys, now.Add(age), now.Add(min(refetchAfter, age))
}

func (k *googleKeys) request(ctx context.Context) (keys map[string]*rsa.PublicKey, age time.Duration, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, k.url, nil)
	if err != nil {
		return nil, 0, fmt.Errorf("cannot fetch keys: %w", err)
	}
	resp, err := k.client.Do(req)
	if err != nil {
		return nil, 0, fmt.Errorf("cannot fetch keys: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, 0, fmt.Errorf("cannot fetch keys from %s: status %d", k.url, resp.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxKeys+1))
	if err == nil && len(body) > maxKeys {
		err = fmt.Errorf("more than %d bytes", maxKeys)
	}
	if err == nil {
		keys, err = parseKeys(body)
	}
	if err != nil {
		return nil, 0, fmt.Errorf("cannot use keys from %s: %w", k.url, err)
	}
	return keys, keysAge(resp.Header, k.clock.now()), nil
}

// keysAge is how long an answer may be kept.
func keysAge(h http.Header, now time.Time) time.Duration {
	age := time.Duration(-1)
	for part := range strings.SplitSeq(h.Get("Cache-Control"), ",") {
		if text, ok := strings.CutPrefix(strings.ToLower(strings.TrimSpace(part)), "max-age="); ok {
			if n, err := strconv.ParseInt(text, 10, 32); err == nil {
				age = time.Duration(n) * time.Second
			}
		}
	}
	if at, err := http.ParseTime(h.Get("Expires")); age < 0 && err == nil {
		age = at.Sub(now)
	}
	return min(max(age, leastKeysAge), mostKeysAge)
}

// parseKeys reads the RSA keys of a JSON Web Key Set (RFC 7517) that sign by RS256.
func parseKeys(text []byte) (map[string]*rsa.PublicKey, error) {
	var set struct {
		Keys []struct {
			Kty, Alg, Use, Kid, N, E string
		} `json:"keys"`
	}
	if err := json.Unmarshal(text, &set); err != nil {
		return nil, err
	}
	keys := map[string]*rsa.PublicKey{}
	for _, k := range set.Keys {
		if k.Kty != "RSA" || k.Kid == "" || cmp.Or(k.Alg, "RS256") != "RS256" || cmp.Or(k.Use, "sig") != "sig" {
			continue
		}
		n, err := base64.RawURLEncoding.DecodeString(k.N)
		if err != nil {
			return nil, fmt.Errorf("key %q: %w", k.Kid, err)
		}
		e, err := base64.RawURLEncoding.DecodeString(k.E)
		if err != nil {
			return nil, fmt.Errorf("key %q: %w", k.Kid, err)
		}
		key := &rsa.PublicKey{N: new(big.Int).SetBytes(n)}
		if exponent := new(big.Int).SetBytes(e); exponent.IsInt64() && exponent.Int64() <= 1<<31-1 {
			key.E = int(exponent.Int64())
		}
		const leastBits = 2048
		if key.N.BitLen() < leastBits || key.E < 3 {
			return nil, fmt.Errorf("key %q is no RSA key of %d bits or more", k.Kid, leastBits)
		}
		keys[k.Kid] = key
	}
	if len(keys) == 0 {
		return nil, errors.New("no RSA key in it")
	}
	return keys, nil
}
