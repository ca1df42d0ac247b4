package attest

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// A certificate says where its issuer's can be had. Anybody can make a certificate that says anything,
// and send it before he is known: what is fetched here is a stranger's choice. So it is fetched only
// from hosts on a list, whose addresses are public, a few at a time, and it is small.

// issuerHosts are where Microsoft and DigiCert publish theirs.
var issuerHosts = []string{"www.microsoft.com", "caissuers.microsoft.com", "cacerts.digicert.com"}

const (
	// maxIssuer bounds a certificate, in bytes; they have 1000 to 2000.
	maxIssuer = 64 << 10
	// fetchTimeout bounds one fetch, with redirects.
	fetchTimeout = 5 * time.Second
	// fetchers may fetch at the same time; others are told to come again.
	fetchers = 4
	// A certificate is kept for keepIssuer; that it could not be had is remembered for keepFailure, so
	// that nobody can make this server ask a host again and again.
	keepIssuer  = 24 * time.Hour
	keepFailure = time.Minute
	// maxIssuers are remembered. There are some dozens in the world.
	maxIssuers = 256
	// maxIssuerURLs of a certificate are tried; Azure's have two.
	maxIssuerURLs = 4
	// maxRedirects are followed, all within the list.
	maxRedirects = 2
)

// issuers fetches certificates of issuers, and remembers them by URL.
type issuers struct {
	client *http.Client
	slots  chan struct{}

	// lookup and dial reach the network. allow decides which addresses may be dialled.
	lookup func(ctx context.Context, host string) ([]netip.Addr, error)
	dial   func(ctx context.Context, network, address string) (net.Conn, error)
	allow  func(netip.Addr) bool

	mu    sync.Mutex
	found map[string]fetched
}

type fetched struct {
	cert  *x509.Certificate
	err   error
	until time.Time
}

func newIssuers() *issuers {
	f := &issuers{
		slots: make(chan struct{}, fetchers),
		lookup: func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		},
		dial:  new(net.Dialer).DialContext,
		allow: public,
		found: map[string]fetched{},
	}
	f.client = &http.Client{
		// No proxy: its address would be dialled in place of the host's, which it would look up by itself.
		Transport: &http.Transport{
			DialContext: f.dialPublic, DisableKeepAlives: true,
			TLSHandshakeTimeout: fetchTimeout, ResponseHeaderTimeout: fetchTimeout, MaxResponseHeaderBytes: 16 << 10,
		},
		CheckRedirect: func(r *http.Request, via []*http.Request) error {
			if len(via) > maxRedirects {
				return errors.New("too many redirects")
			}
			return onList(r.URL)
		},
	}
	return f
}

// of fetches the certificate that signed cert, from the first of its URLs that has it.
func (f *issuers) of(ctx context.Context, cert *x509.Certificate) (*x509.Certificate, error) {
	urls := cert.IssuingCertificateURL
	if len(urls) == 0 {
		return nil, fmt.Errorf("the certificate of %q does not say where its issuer's is", cert.Subject)
	}
	var errs []error
	for _, raw := range urls[:min(len(urls), maxIssuerURLs)] {
		issuer, err := f.get(ctx, raw)
		if err == nil && !issued(issuer, cert) {
			err = errors.New("what is there did not sign it")
		}
		if err == nil {
			return issuer, nil
		}
		errs = append(errs, fmt.Errorf("its issuer's at %.200q: %w", raw, err))
	}
	return nil, errors.Join(errs...)
}

// onList tells whether a URL may be asked.
func onList(u *url.URL) error {
	switch port := u.Port(); {
	case u.Scheme != "http" && u.Scheme != "https", u.User != nil, port != "" && port != "80" && port != "443":
		return errors.New("not a plain web address")
	case !slices.Contains(issuerHosts, strings.ToLower(u.Hostname())):
		return fmt.Errorf("host %.100q is not one that publishes them", u.Hostname())
	}
	return nil
}

func (f *issuers) get(ctx context.Context, raw string) (*x509.Certificate, error) {
	u, err := url.Parse(raw)
	if err != nil {
		return nil, errors.New("not a URL")
	}
	if err := onList(u); err != nil {
		return nil, err
	}
	u.Fragment = ""
	key := u.String()
	if r, ok := f.remembered(key); ok {
		return r.cert, r.err
	}
	// Nobody waits for a turn: whoever waits keeps others from being checked, and a stranger can have it
	// that each fetch takes its whole time, where there is no way out.
	select {
	case f.slots <- struct{}{}:
		defer func() { <-f.slots }()
	default:
		return nil, fmt.Errorf("%w: %d certificates are being fetched already", ErrUnavailable, fetchers)
	}
	cert, err := f.fetch(ctx, key)
	if ctx.Err() != nil {
		return nil, ctx.Err() // the caller left, which says nothing about the certificate
	}
	f.remember(key, cert, err)
	return cert, err
}

func (f *issuers) remembered(key string) (fetched, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r, ok := f.found[key]
	return r, ok && time.Now().Before(r.until)
}

func (f *issuers) remember(key string, cert *x509.Certificate, err error) {
	now := time.Now()
	r := fetched{cert, err, now.Add(keepIssuer)}
	if err != nil {
		r.until = now.Add(keepFailure)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.found) >= maxIssuers {
		// Failures are what a stranger can make many of.
		for k, old := range f.found {
			if old.err != nil || now.After(old.until) {
				delete(f.found, k)
			}
		}
	}
	if len(f.found) >= maxIssuers {
		clear(f.found)
	}
	f.found[key] = r
}

func (f *issuers) fetch(ctx context.Context, raw string) (*x509.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, raw, nil)
	if err != nil {
		return nil, err
	}
	resp, err := f.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %d", resp.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxIssuer+1))
	if err != nil {
		return nil, err
	}
	if len(body) > maxIssuer {
		return nil, fmt.Errorf("more than %d bytes", maxIssuer)
	}
	if block, _ := pem.Decode(body); block != nil {
		body = block.Bytes
	}
	return x509.ParseCertificate(body)
}

// dialPublic looks a host up once and dials what it found, if that is public: whoever answers for the
// name cannot lead the connection elsewhere.
func (f *issuers) dialPublic(ctx context.Context, network, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	addrs, err := f.lookup(ctx, host)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, addr := range addrs {
		addr = addr.Unmap()
		if !f.allow(addr) {
			errs = append(errs, fmt.Errorf("%s is at %s, which is not public", host, addr))
			continue
		}
		conn, err := f.dial(ctx, network, net.JoinHostPort(addr.String(), port))
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(append(errs, fmt.Errorf("no address of %s could be reached", host))...)
}

// special are ranges that belong to nobody on the Internet (the IANA registries of special-purpose
// addresses), beside those that package netip names. Some of IPv6 stand for any address of IPv4.
var special = prefixes(
	"0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4",
	"2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",
)

// unicast6 is all of IPv6 that is handed out.
var unicast6 = netip.MustParsePrefix("2000::/3")

func prefixes(texts ...string) []netip.Prefix {
	var all []netip.Prefix
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

// public tells whether an address is one of the Internet.
func public(addr netip.Addr) bool {
	addr = addr.Unmap()
	return addr.IsGlobalUnicast() && !addr.IsPrivate() && addr.Zone() == "" && (addr.Is4() || unicast6.Contains(addr)) &&
		!slices.ContainsFunc(special, func(p netip.Prefix) bool { return p.Contains(addr) })
}
