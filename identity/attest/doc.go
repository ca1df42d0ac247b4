// Package attest checks, on the server, what package identity sends to prove which machine it
// runs on.
//
// [NewAWS] makes a verifier and [AWS.Verify] turns a signed document into an [Instance], or says
// why not. Everything in an Instance was read from the signed bytes and from nowhere else. A
// verifier for another cloud is a type of its own beside [AWS] with a Verify that yields the same
// Instance: (Provider, ID) together name a machine.
package attest

import "time"

// Instance is a machine whose identity was proven.
type Instance struct {
	// Provider is the cloud that vouches, "aws". IDs of different providers may collide.
	Provider string
	// ID is the cloud's name for the machine, never empty.
	ID string
	// Account and Region are where the machine runs, for allow-lists and audit.
	Account, Region string
	// Started is when the cloud started the machine, the only time its document knows: AWS signs
	// once per start, so a document never expires and proves nothing about now.
	Started time.Time
}
