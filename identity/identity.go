// Package identity proves which machine this is and trades the proof for a session token.
//
// A [Source] is where an agent's token comes from: [Token], [TokenFile], [Credential] and
// [KubernetesToken] where it was handed over, [AWS], [Azure] and [Google] where the cloud vouches for
// the machine and the [Exchanger] trades what it signed for a token, and [Auto] where the machine
// shall find out. Ask [Source.Token] before each connection: it reads or exchanges anew. Whatever is
// wrong on the machine or with its cloud is a [*Failure], in words.
//
// Another cloud is another implementation of cloud in a file of its own.
package identity

import (
	"context"
	"strings"

	"github.com/berthd/berth/wire"
)

// Source yields the token for the next connection. Its methods may be called at the same time.
type Source interface {
	// Token reads or exchanges anew where the source is not fixed. What is wrong on this machine is
	// in the error as [*Failure], an answer of the control server as [*wire.Error] or
	// [*wire.UnexpectedResponse].
	Token(ctx context.Context) (wire.Secret, error)
	// Renews tells whether another token may come by itself after the server refused one. Where it
	// does not, somebody has to hand over another.
	Renews() bool
	// String names the source for people, without anything secret.
	String() string
}

// Check reads what a source takes from this machine and its cloud, and asks the control server nothing. Its error is as
// that of [Source.Token].
func Check(ctx context.Context, s Source) error {
	if c, ok := s.(interface{ check(context.Context) error }); ok {
		return c.check(ctx)
	}
	_, err := s.Token(ctx)
	return err
}

// Failure is what keeps a machine from proving itself, apart from the control server.
type Failure struct {
	// Cause says what is wrong, Fix what to do about it. Both are free of secrets.
	Cause, Fix string

	err error
}

// Error returns one sentence: the cause and the fix.
func (f *Failure) Error() string { return f.Cause + "; " + f.Fix }

// Unwrap returns the error behind it, which may be nil.
func (f *Failure) Unwrap() error { return f.err }

// Token is a fixed token. White space around it is not part of it.
func Token(token wire.Secret) Source { return fixed(token) }

type fixed wire.Secret

func (f fixed) Token(context.Context) (wire.Secret, error) {
	token, problem := clean(string(f))
	if problem != "" {
		return "", &Failure{Cause: "the token cannot be used: " + problem, Fix: "set BERTH_TOKEN to the token that the server gave, and nothing else"}
	}
	return token, nil
}

func (fixed) Renews() bool { return false }

func (fixed) String() string { return "token" }

// clean returns what a token file or variable holds as a token that can stand in a header, or what is
// wrong with it.
func clean(text string) (token wire.Secret, problem string) {
	word := strings.TrimSpace(text)
	if word == "" {
		return "", "it is empty"
	}
	if strings.ContainsFunc(word, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", "it holds white space or characters that are not printable ASCII, and must be one word"
	}
	return wire.Secret(word), ""
}
