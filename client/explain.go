package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/berthd/berth/wire"
)

// Kind sorts problems by what can be done about them.
type Kind string

// The kinds of problems.
const (
	// KindAddress: the URL does not lead to a control server; it has to be corrected.
	KindAddress Kind = "address"
	// KindUnreachable: nothing answers; it may come back.
	KindUnreachable Kind = "unreachable"
	// KindTrust: the server's certificate is not trusted.
	KindTrust Kind = "trust"
	// KindClock: this machine's clock is so far off that nothing can be checked by it.
	KindClock Kind = "clock"
	// KindRefused: the token is not good (401) or not enough (403).
	KindRefused Kind = "refused"
	// KindUnknown: the server does not know the instance or agent (404); it may learn of it.
	KindUnknown Kind = "unknown"
	// KindAmbiguous: several agents fit (409); a name has to be given.
	KindAmbiguous Kind = "ambiguous"
	// KindEarly: the server is not done yet with what this needs (425); it will be.
	KindEarly Kind = "early"
	// KindOften: the server is asked too often (429).
	KindOften Kind = "often"
	// KindBusy: the server or what it needs is not there for a while (503).
	KindBusy Kind = "busy"
	// KindMachine: this machine cannot prove who it is; the server has no part in it.
	KindMachine Kind = "machine"
	// KindVersion: client and server share no API version.
	KindVersion Kind = "version"
	// KindServer: the server failed.
	KindServer Kind = "server"
	// KindOther: none of these.
	KindOther Kind = "other"
)

// Problem is an error in plain words.
type Problem struct {
	Kind Kind
	// Cause says what is wrong, Fix what to do about it. Both are free of secrets.
	Cause, Fix string
	// RetryAfter is how long the server asks to wait; 0 when it does not say.
	RetryAfter time.Duration

	err error
}

// Error returns one sentence: the cause and the fix.
func (p *Problem) Error() string {
	if p.Fix == "" {
		return p.Cause
	}
	return p.Cause + "; " + p.Fix
}

// Unwrap returns the error that was explained.
func (p *Problem) Unwrap() error { return p.err }

// Explain says in plain words what an error of this package, or of an exchange with the same server,
// means. It returns nil for nil, and the same problem for a problem.
func Explain(err error) *Problem {
	if err == nil {
		return nil
	}
	var known *Problem
	if errors.As(err, &known) {
		return known
	}
	p := explain(err)
	p.err = err
	return p
}

func explain(err error) *Problem {
	var answer *wire.Error
	if errors.As(err, &answer) {
		return explainAnswer(answer)
	}
	var unexpected *wire.UnexpectedResponse
	if errors.As(err, &unexpected) {
		return explainUnexpected(unexpected)
	}
	if p := explainTLS(err); p != nil {
		return p
	}
	return explainNetwork(err)
}

func explainAnswer(e *wire.Error) *Problem {
	p := &Problem{Kind: KindOther, Cause: "the server answered: " + strings.TrimSuffix(e.Error(), ".")}
	if _, ok := e.Validation("version"); ok {
		p.Kind, p.Fix = KindVersion, "upgrade the older of the two sides"
		return p
	}
	p.RetryAfter = e.RetryAfter
	switch e.StatusCode {
	case http.StatusUnauthorized:
		p.Kind, p.Fix = KindRefused, "give a token that is valid for this server, or let the instance identity be exchanged anew"
		p.mindClocks(e.ClockOffset)
	case http.StatusForbidden:
		p.Kind, p.Fix = KindRefused, "use a token with the right to do this"
	case http.StatusNotFound:
		p.Kind, p.Fix = KindUnknown, "check that the agent or instance is declared on this server"
	case http.StatusConflict:
		p.Kind, p.Fix = KindAmbiguous, "set BERTH_AGENT_NAME to the agent that this machine is"
		if _, ok := e.Validation("proof_key"); ok {
			p.Fix = "if this machine lost its state directory, have the server forget its key; if not, find out who else proves to be it"
		}
	case http.StatusBadRequest:
		if strings.Contains(e.Message, "latest history") {
			p.Kind, p.Fix = KindUnknown, "wait until the workspace's new build is done, or build it anew; it is tried again"
		}
	case http.StatusTooEarly:
		p.Kind, p.Fix = KindEarly, "wait until the workspace's build is done; it is tried again"
	case http.StatusTooManyRequests:
		p.Kind, p.Fix = KindOften, "wait; it is tried again less often. If it goes on, find what else asks from this address"
	case http.StatusServiceUnavailable:
		p.Kind, p.Fix = KindBusy, "wait; it is tried again"
	default:
		if e.StatusCode >= 500 {
			p.Kind, p.Fix = KindServer, "look at the server's log; it is tried again"
		}
	}
	return p
}

// ExplainClock says what it means that the server's clock is ahead of this machine's by so much. It returns nil while
// that is less than what is signed may be off.
func ExplainClock(offset time.Duration) *Problem {
	const signed = 2 * time.Minute
	if offset.Abs() < signed {
		return nil
	}
	return &Problem{Kind: KindClock,
		Cause: fmt.Sprintf("the server's clock differs from this machine's by %v", offset.Abs()),
		Fix:   "set the clocks, by NTP for example"}
}

// mindClocks tells of clocks that differ, which may be why a proof was refused.
func (p *Problem) mindClocks(offset time.Duration) {
	if clock := ExplainClock(offset); clock != nil {
		p.Cause += ", and " + clock.Cause
		p.Fix = clock.Fix + "; then " + p.Fix
	}
}

func explainUnexpected(e *wire.UnexpectedResponse) *Problem {
	switch {
	case e.Location != "":
		return &Problem{Kind: KindAddress,
			Cause: fmt.Sprintf("the server redirects to %s", e.Location),
			Fix:   "use that address as the URL if it is the control server; if it is a login page, a proxy stands in between"}
	case e.StatusCode == http.StatusBadRequest && strings.Contains(e.Body, "HTTPS"):
		return &Problem{Kind: KindAddress,
			Cause: "the URL says http, but the server speaks https",
			Fix:   "change the URL to https://"}
	case e.StatusCode == http.StatusUpgradeRequired:
		return &Problem{Kind: KindAddress,
			Cause: "something between here and the server strips the Upgrade header (status 426)",
			Fix:   "let the proxy pass WebSockets"}
	case e.StatusCode == http.StatusProxyAuthRequired:
		return &Problem{Kind: KindAddress,
			Cause: "the proxy wants a login (status 407)",
			Fix:   "put user and password into HTTPS_PROXY, or the server into NO_PROXY"}
	case e.StatusCode == http.StatusBadGateway || e.StatusCode == http.StatusServiceUnavailable || e.StatusCode == http.StatusGatewayTimeout:
		return &Problem{Kind: KindBusy,
			Cause: fmt.Sprintf("a proxy in front of the server cannot reach it (status %d)", e.StatusCode),
			Fix:   "wait; it is tried again", RetryAfter: e.RetryAfter}
	case e.StatusCode == http.StatusTooManyRequests:
		return &Problem{Kind: KindOften,
			Cause: "a proxy in front of the server is asked too often (status 429)",
			Fix:   "wait; it is tried again less often", RetryAfter: e.RetryAfter}
	case e.ContentType == "text/html":
		return &Problem{Kind: KindAddress,
			Cause: fmt.Sprintf("an HTML page came back instead of the API (status %d)", e.StatusCode),
			Fix:   "check the URL: it leads to a web site or a login page, not to the control server"}
	}
	return &Problem{Kind: KindAddress,
		Cause: fmt.Sprintf("no control server answers at the URL: %v", e),
		Fix:   "check the URL"}
}

func explainTLS(err error) *Problem {
	var (
		unknown  x509.UnknownAuthorityError
		hostname x509.HostnameError
		invalid  x509.CertificateInvalidError
		record   tls.RecordHeaderError
	)
	switch {
	case errors.Is(err, http.ErrSchemeMismatch), errors.As(err, &record):
		return &Problem{Kind: KindAddress,
			Cause: "the URL says https, but the server speaks plain http",
			Fix:   "change the URL to http://, or put TLS in front of the server"}
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return explainExpired(invalid.Cert, time.Now())
	case errors.As(err, &unknown):
		return &Problem{Kind: KindTrust,
			Cause: "the server's certificate is signed by an authority that this machine does not trust",
			Fix:   "give the authority's certificate with BERTH_CA_FILE, or install it on the system"}
	case errors.As(err, &hostname):
		return &Problem{Kind: KindTrust,
			Cause: fmt.Sprintf("the server's certificate is not for %s", hostname.Host),
			Fix:   "use the name that the certificate is for, or have it issued for this one"}
	case refusedOurs(err):
		return &Problem{Kind: KindTrust,
			Cause: "the server, or a proxy in front of it, takes no client without a certificate that it trusts",
			Fix:   "give one with BERTH_CLIENT_CERT and BERTH_CLIENT_KEY, or have the one that is given renewed"}
	case errors.As(err, &invalid):
		return &Problem{Kind: KindTrust, Cause: "the server's certificate is not valid: " + invalid.Error(), Fix: "replace it on the server"}
	}
	return nil
}

// refusedOurs tells whether the other side refused this one's certificate, or that there was none. The package has no type for
// what the other side says, only these words.
func refusedOurs(err error) bool {
	return slices.ContainsFunc([]string{"certificate required", "bad certificate", "unknown certificate authority", "expired certificate"}, func(words string) bool {
		return strings.Contains(err.Error(), "remote error: tls: "+words)
	})
}

// explainExpired tells an old certificate from a wrong clock: no certificate is issued for the future,
// so one that is not valid yet means that this machine's clock is behind.
func explainExpired(cert *x509.Certificate, now time.Time) *Problem {
	if cert != nil && now.Before(cert.NotBefore) {
		return &Problem{Kind: KindClock,
			Cause: fmt.Sprintf("this machine's clock says %s, before the server's certificate was made (%s)",
				now.UTC().Format(time.DateOnly), cert.NotBefore.UTC().Format(time.DateOnly)),
			Fix: "set the clock, for example with timedatectl set-ntp true"}
	}
	p := &Problem{Kind: KindTrust, Cause: "the server's certificate has expired", Fix: "renew it on the server, or set this machine's clock if it is ahead"}
	if cert != nil {
		p.Cause += " on " + cert.NotAfter.UTC().Format(time.DateOnly)
	}
	return p
}

func explainNetwork(err error) *Problem {
	var (
		dns     *net.DNSError
		op      *net.OpError
		timeout interface{ Timeout() bool }
	)
	if errors.As(err, &op) && op.Op == "proxyconnect" {
		return &Problem{Kind: KindUnreachable,
			Cause: "the proxy in front of the server is not reached: " + explainNetwork(op.Err).Cause,
			Fix:   "correct HTTP_PROXY and HTTPS_PROXY, or put the server into NO_PROXY"}
	}
	where := "the server"
	if op != nil && op.Addr != nil {
		where = op.Addr.String()
	}
	switch {
	case errors.As(err, &dns):
		return &Problem{Kind: KindUnreachable,
			Cause: fmt.Sprintf("the name %s cannot be resolved", dns.Name),
			Fix:   "check the URL and this machine's DNS"}
	case errors.Is(err, syscall.ECONNREFUSED):
		return &Problem{Kind: KindUnreachable,
			Cause: fmt.Sprintf("nothing listens at %s: the connection was refused", where),
			Fix:   "check the port of the URL and that the server runs"}
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		return &Problem{Kind: KindUnreachable,
			Cause: fmt.Sprintf("there is no route to %s", where),
			Fix:   "check this machine's network"}
	case errors.Is(err, context.Canceled):
		return &Problem{Kind: KindOther, Cause: "stopped before the server answered"}
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return &Problem{Kind: KindUnreachable,
			Cause: fmt.Sprintf("no answer from %s in time", where),
			Fix:   "check that no firewall drops the traffic and that the server runs"}
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return &Problem{Kind: KindUnreachable,
			Cause: fmt.Sprintf("%s closed the connection without an answer", where),
			Fix:   "check that the URL's scheme and port are right; it may also be restarting"}
	}
	return &Problem{Kind: KindOther, Cause: err.Error()}
}
