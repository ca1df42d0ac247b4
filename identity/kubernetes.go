package identity

import (
	"context"
	"fmt"
	"time"

	"github.com/berthd/berth/wire"
)

// KubernetesTokenPath is where a pod finds its projected token unless its template says otherwise.
const KubernetesTokenPath = "/var/run/secrets/berth/token"

// KubernetesToken reads a projected service-account token, a JWT that the kubelet replaces before it
// expires; so it is read anew at each call. It is sent to the server as the token itself: the server
// has to know how to review it.
func KubernetesToken(path string) Source { return kubernetesToken(path) }

type kubernetesToken string

func (k kubernetesToken) String() string { return "Kubernetes service-account token " + string(k) }

func (kubernetesToken) Renews() bool { return true }

func (k kubernetesToken) Token(context.Context) (wire.Secret, error) {
	text, _, err := readTokenFile(string(k))
	if err != nil {
		f := unreadable(k.String(), string(k), err)
		f.Fix = "give the pod a volume with a projected serviceAccountToken there, or --token-file the path it has"
		return "", f
	}
	token, problem := clean(text)
	if problem != "" {
		return "", &Failure{Cause: fmt.Sprintf("the %s cannot be used: %s", k, problem), Fix: "mount a projected serviceAccountToken there"}
	}
	claims, err := readClaims(token.Reveal())
	if err != nil {
		return "", &Failure{Cause: fmt.Sprintf("the %s cannot be used: %v", k, err), Fix: "mount a projected serviceAccountToken there; use --auth token for a token of another kind", err: err}
	}
	if expiry := time.Unix(int64(claims.Expiry), 0); claims.Expiry != 0 && time.Now().After(expiry) {
		return "", &Failure{
			Cause: fmt.Sprintf("the %s expired at %s", k, expiry.UTC().Format(time.RFC3339)),
			Fix:   "mount the whole volume and no subPath of it, which the kubelet does not renew; and see that this machine's clock is right",
		}
	}
	return token, nil
}
