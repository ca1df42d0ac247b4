// Package identity proves which machine this is and trades the proof for a session token.
//
// A [Source] is where an agent's token comes from: [Token] and [TokenFile] where it was handed
// over, [AWS] where the cloud vouches for the machine and the [Exchanger] trades what it signed for
// a token. Ask [Source.Token] before each connection: it reads or exchanges anew. Another cloud is
// another Source in a file of its own, with its request on the Exchanger.
package identity

import (
	"context"
	"errors"
	"strings"

	"github.com/berthd/berth/wire"
)

// Source yields the token for the next connection. Its methods may be called at the same time.
type Source interface {
	// Token reads or exchanges anew where the source is not fixed. An answer of the control server
	// is in the error as [*wire.Error] or [*wire.UnexpectedResponse].
	Token(ctx context.Context) (wire.Secret, error)
	// String names the source for people, without anything secret.
	String() string
}

// Token is a fixed token. White space around it is not part of it.
func Token(token wire.Secret) Source { return fixed(token) }

type fixed wire.Secret

func (f fixed) Token(context.Context) (wire.Secret, error) {
	return clean(string(f))
}

func (fixed) String() string { return "token" }

// clean returns what a token file or variable holds as a token that can stand in a header.
func clean(text string) (wire.Secret, error) {
	token := strings.TrimSpace(text)
	if token == "" {
		return "", errors.New("the token is empty")
	}
	if strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", errors.New("the token holds white space or characters that are not printable ASCII; it must be one word")
	}
	return wire.Secret(token), nil
}
