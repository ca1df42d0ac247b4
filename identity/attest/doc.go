// Package attest checks, on the server, what package identity sends to prove which machine it
// runs on.
//
// There is a verifier for each cloud: [NewAWS], [NewAzure] and [NewGoogle]. All have one shape:
// Verify takes what a machine sent and returns an [Instance], or says why not. Everything in an
// Instance was read from signed bytes and from nowhere else. (Provider, ID) together name a machine.
//
// The order is the same everywhere, because each published hole of this kind skipped a link of it:
// the encoding must be the only one there is for what it says, then the signature must fit, then the
// chain of the signer, then the signer's name, and then the id is read.
//
// A verifier says nothing about freshness that the signed bytes do not say: challenges, replays and
// allow-lists are for the caller, who has a memory. Whatever a stranger sends, Verify returns; its
// error has detail for a log, not for the stranger. Verifiers may be used by many at once.
package attest

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"runtime/debug"
	"time"
)

// Instance is a machine whose identity was proven.
type Instance struct {
	// Provider is the cloud that vouches, such as "aws". IDs of different providers may collide.
	Provider string
	// ID is the cloud's name for the machine, never empty. Azure's is in lower case.
	ID string
	// Account is the AWS account, Azure subscription or Google project, and Region where the machine
	// runs, for allow-lists and audit. Azure's document does not say the region: it is the one of the
	// metadata service that signed, and empty if its certificate names none.
	Account, Region string
	// Zone is a part of a region. Azure does not say.
	Zone string
	// Partition is the part of the cloud with operators of its own: an AWS partition such as "aws-cn",
	// or the domain of Azure's metadata service such as "metadata.azure.us".
	Partition string
	// Issued is when the cloud signed, and Expires until when that holds. AWS signs once per start of
	// the machine: its document never expires, which the zero time says, and proves nothing about now.
	Issued, Expires time.Time
	// Payload identifies what was signed, as hex of a SHA-256: the same proof has the same.
	Payload string
}

// Errors that a caller answers differently from a plain refusal.
var (
	// ErrClaims means that a token was signed by Google, but its claims are not what they should be.
	ErrClaims = errors.New("unexpected claims")
	// ErrUnavailable means that what is needed to check cannot be had now; the proof may be good.
	ErrUnavailable = errors.New("cannot check now")
)

// Clocks differ. A statement may come from the future by futureSkew, and be over for expirySkew.
const (
	futureSkew = 5 * time.Minute
	expirySkew = time.Minute
)

// clock is the time by which dates are judged; nil is the real one.
type clock func() time.Time

func (c clock) now() time.Time {
	if c == nil {
		return time.Now()
	}
	return c()
}

// recovered turns a panic into a refusal. Parsers of others have had holes of that kind, which a
// stranger can reach.
func recovered(instance *Instance, err *error) {
	if p := recover(); p != nil {
		*instance, *err = Instance{}, fmt.Errorf("a parser failed: %v\n%s", p, debug.Stack())
	}
}

func payloadHash(parts ...[]byte) string {
	h := sha256.New()
	for _, p := range parts {
		h.Write(p)
	}
	return hex.EncodeToString(h.Sum(nil))
}
