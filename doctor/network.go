package doctor

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/berthd/berth/client"
	"github.com/berthd/berth/identity"
	"github.com/berthd/berth/tailnet"
	"github.com/berthd/berth/wire"
)

func remote(cfg Config) []probe {
	if cfg.Server.URL == nil {
		return nil
	}
	return (&network{Config: cfg, visited: make(chan struct{}), mapped: make(chan struct{})}).probes()
}

func (n *network) probes() []probe {
	return []probe{
		one("dns", n.dns),
		{[]string{"proxy", "server", "ca", "clock"}, n.visit},
		one("websocket", n.websocket),
		one("identity", n.identity),
		one("token", n.token),
		{[]string{"relay", "udp"}, n.mesh},
		one("mtu", n.mtu),
	}
}

// network is one look at the network. Some probes wait for what others find.
type network struct {
	Config

	visited  chan struct{} // closed when the server was asked; answered and blame are set then
	answered bool
	blame    string        // the check that says why it was not
	mapped   chan struct{} // closed when relays is set, nil if there is none
	relays   *wire.DERPMap
}

// client talks to the server by a transport.
func (n *network) client(transport http.RoundTripper, header http.Header) (*client.Client, error) {
	return client.New(client.Config{URL: n.Server.URL, HTTP: &http.Client{Transport: transport, CheckRedirect: n.Server.HTTP.CheckRedirect}, Header: header})
}

func explained(name string, err error) Check {
	p := client.Explain(err)
	return Check{Name: name, Status: Fail, Cause: p.Cause, Fix: p.Fix}
}

// proxy is the one that requests to the server go through; nil if none.
func (n *network) proxy() *url.URL {
	t, ok := n.Server.HTTP.Transport.(*http.Transport)
	if !ok || t.Proxy == nil {
		return nil
	}
	u, err := t.Proxy(&http.Request{URL: n.Server.URL})
	if err != nil {
		return nil
	}
	return u
}

func (n *network) dns(ctx context.Context) Check {
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	host, whose := n.Server.URL.Hostname(), ""
	if proxy := n.proxy(); proxy != nil {
		host, whose = proxy.Hostname(), " is the proxy's, which resolves the server's name"
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return Check{Status: OK, Detail: host + " needs no name" + whose}
	}
	addrs, err := net.DefaultResolver.LookupHost(ctx, host)
	if err != nil {
		return explained("dns", err)
	}
	return Check{Status: OK, Detail: host + " is " + strings.Join(addrs, ", ") + whose}
}

// observer notes what the first answer says beside its body.
type observer struct {
	http.RoundTripper
	once sync.Once
	date time.Time
	took time.Duration
}

// RoundTrip implements [http.RoundTripper].
func (o *observer) RoundTrip(req *http.Request) (*http.Response, error) {
	began := time.Now()
	resp, err := o.RoundTripper.RoundTrip(req)
	if err == nil {
		o.once.Do(func() {
			o.took = time.Since(began)
			o.date, _ = http.ParseTime(resp.Header.Get("Date"))
		})
	}
	return resp, err
}

// visit asks the server who it is. What goes wrong on the way is the fault of one of several.
func (n *network) visit(ctx context.Context) []Check {
	defer close(n.visited)
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	seen := &observer{RoundTripper: n.Server.HTTP.Transport}
	c, err := n.client(seen, n.Server.Header)
	var info wire.BuildInfo
	if err == nil {
		info, err = c.BuildInfo(ctx)
	}
	checks := map[string]Check{
		"proxy":  ok("proxy", "none for this server"),
		"server": ok("server", "%s, answered in %v", info.Version, seen.took.Round(100*time.Microsecond)),
		"ca":     ok("ca", "the certificate is trusted"),
		"clock":  ok("clock", "as the server's, to two minutes"),
	}
	if proxy := n.proxy(); proxy != nil {
		checks["proxy"] = ok("proxy", "%s", (&url.URL{Scheme: proxy.Scheme, Host: proxy.Host}).String())
	}
	if n.Server.URL.Scheme == "http" {
		checks["ca"] = ok("ca", "the URL says http: there is no certificate")
	}
	if p := client.ExplainClock(time.Until(seen.date).Round(time.Second)); !seen.date.IsZero() && p != nil {
		checks["clock"] = Check{Name: "clock", Status: Warn, Cause: p.Cause, Fix: p.Fix}
	} else if seen.date.IsZero() {
		checks["clock"] = skip("clock", "the server does not say what time it is")
	}
	if n.answered = err == nil; !n.answered {
		n.blame = blame(err)
		for _, later := range []string{"server", "ca"} {
			checks[later] = skip(later, "see %s", n.blame)
		}
		if seen.date.IsZero() {
			checks["clock"] = skip("clock", "see %s", n.blame)
		}
		if n.blame != "dns" { // which finds it out itself
			checks[n.blame] = explained(n.blame, err)
		}
		if unknown := new(x509.UnknownAuthorityError); errors.As(err, unknown) && unknown.Cert != nil {
			failed := checks["ca"]
			failed.Detail = fmt.Sprintf("it was issued by %.100q", unknown.Cert.Issuer)
			checks["ca"] = failed
		}
	}
	return []Check{checks["proxy"], checks["server"], checks["ca"], checks["clock"]}
}

// blame names the check whose matter an error is.
func blame(err error) string {
	var (
		dns    *net.DNSError
		op     *net.OpError
		answer *wire.UnexpectedResponse
	)
	switch kind := client.Explain(err).Kind; {
	case errors.As(err, &op) && op.Op == "proxyconnect", errors.As(err, &answer) && answer.StatusCode == http.StatusProxyAuthRequired:
		return "proxy"
	case errors.As(err, &dns):
		return "dns"
	case kind == client.KindTrust:
		return "ca"
	case kind == client.KindClock:
		return "clock"
	}
	return "server"
}

// reached waits until the server was asked. It returns a skipped check if that failed.
func (n *network) reached(ctx context.Context) (Check, bool) {
	select {
	case <-n.visited:
	case <-ctx.Done():
		return Check{Status: Skip, Detail: "there was no time left"}, false
	}
	if !n.answered {
		return Check{Status: Skip, Detail: "see " + n.blame}, false
	}
	return Check{}, true
}

func (n *network) websocket(ctx context.Context) Check {
	defer close(n.mapped)
	if c, ok := n.reached(ctx); !ok {
		return c
	}
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	c, err := n.client(n.Server.HTTP.Transport, n.Server.Header)
	if err != nil {
		return explained("websocket", err)
	}
	m, err := c.RelayMap(ctx)
	if answer := new(wire.Error); errors.As(err, &answer) && answer.StatusCode == http.StatusNotFound {
		return Check{Status: Skip, Detail: "this server gives its relay map to nobody"}
	}
	if err != nil {
		return explained("websocket", err)
	}
	n.relays = m
	return Check{Status: OK, Detail: "they come through"}
}

func (n *network) identity(ctx context.Context) Check {
	if n.Identity == nil {
		if n.About != nil {
			return Check{Status: Skip, Detail: "only the berthd that runs knows who this machine is"}
		}
		return Check{Status: Skip, Detail: "see settings"}
	}
	if err := identity.Check(ctx, n.Identity); err != nil {
		if f := new(identity.Failure); errors.As(err, &f) {
			return Check{Status: Fail, Cause: f.Cause, Fix: f.Fix}
		}
		return explained("identity", err)
	}
	return Check{Status: OK, Detail: n.Identity.String()}
}

func (n *network) token(ctx context.Context) Check {
	if n.About != nil && n.About.Linked {
		return Check{Status: OK, Detail: "the berthd that runs is linked by one"}
	}
	if c, ok := n.reached(ctx); !ok {
		return c
	}
	switch {
	case n.Identity == nil:
		return Check{Status: Skip, Detail: "see settings"}
	case n.NoToken != "":
		return Check{Status: Skip, Detail: n.NoToken}
	}
	token, err := n.Identity.Token(ctx)
	if f := new(identity.Failure); errors.As(err, &f) {
		return Check{Status: Skip, Detail: "see identity"}
	}
	if err == nil {
		var c *client.Client
		c, err = client.New(client.Config{URL: n.Server.URL, HTTP: n.Server.HTTP, Header: n.Server.Header, Token: func() wire.Secret { return token }})
		if err == nil {
			err = c.CheckToken(ctx)
		}
	}
	if err != nil {
		return explained("token", err)
	}
	return Check{Status: OK, Detail: "the server takes it"}
}

// mesh asks relays and STUN servers.
func (n *network) mesh(ctx context.Context) []Check {
	select {
	case <-n.mapped:
	case <-ctx.Done():
	}
	if n.relays == nil {
		return []Check{skip("relay", "see websocket"), skip("udp", "see websocket")}
	}
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	found, err := tailnet.Look(ctx, tailnet.Config{AccessURL: n.Server.URL, TLS: n.Server.TLS, Header: func() http.Header { return n.Server.Header }}, n.relays.Proto())
	if err != nil {
		return []Check{{Name: "relay", Status: Fail, Cause: err.Error(), Fix: "correct the relays in the server's configuration"}, skip("udp", "see relay")}
	}
	return []Check{relay(found.Relays), n.udp(found.STUN)}
}

func relay(answers []tailnet.RelayAnswer) Check {
	var good []string
	var bad error
	for _, a := range answers {
		if a.Err != nil {
			bad = errors.Join(bad, fmt.Errorf("%s: %s", a.Region, client.Explain(a.Err).Cause))
			continue
		}
		good = append(good, fmt.Sprintf("%s in %v", a.Region, a.Latency.Round(100*time.Microsecond)))
	}
	c := Check{Name: "relay", Status: OK, Detail: strings.Join(good, ", ")}
	const fix = "let HTTPS out to it, and see that it runs"
	switch {
	case len(good) == 0:
		c.Status, c.Cause, c.Fix = Fail, fmt.Sprintf("no relay answers, so peers cannot find this workspace: %v", bad), fix
	case bad != nil:
		c.Status, c.Cause, c.Fix = Warn, fmt.Sprintf("a relay does not answer: %v", bad), fix
	}
	return c
}

func (n *network) udp(answers []tailnet.STUNAnswer) Check {
	var seen, silent []string
	for _, a := range answers {
		if a.Err != nil {
			silent = append(silent, a.Server)
			continue
		}
		seen = append(seen, a.Seen.String())
	}
	switch {
	case n.RelayOnly:
		return ok("udp", "direct paths are switched off")
	case len(answers) == 0:
		return ok("udp", "the server names no STUN server: direct paths are found within one network only")
	case len(seen) == 0:
		return Check{Name: "udp", Status: Warn, Cause: "no STUN server answers over UDP (" + strings.Join(silent, ", ") + "): everything goes through the relay",
			Fix: "let UDP out, and its answers in; or choose --relay-only if that is how it shall be"}
	}
	return ok("udp", "seen at %s", strings.Join(seen, ", "))
}
