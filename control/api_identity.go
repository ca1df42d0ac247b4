package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/identity/attest"
	"github.com/berthd/berth/wire"
)

// maxIdentityBody bounds a body that anybody may send; documents and signatures are a few KiB.
const maxIdentityBody = 64 << 10

// checkBudget bounds the check of one proof, in which keys and certificates may be fetched.
const checkBudget = 20 * time.Second

// How exchanges end, in metrics and the audit log.
const (
	resultAccepted    = "accepted"
	resultLimited     = "limited"     // too many from one address, or at once
	resultMalformed   = "malformed"   // not even a proof
	resultRefused     = "refused"     // the proof is not good
	resultUnavailable = "unavailable" // it could not be checked
	resultChallenge   = "challenge"   // the challenge is missing, wrong, over or used
	resultReplay      = "replay"      // the proof was used before, or is older than the machine's last
	resultForbidden   = "forbidden"   // an account or region that is not allowed
	resultUnknown     = "unknown"     // no agent comes from that machine
	resultAmbiguous   = "ambiguous"   // several do
	resultOtherKey    = "other_key"   // another installation holds the agent
	resultFailed      = "failed"      // this server's fault
)

func (s *Server) postIdentityChallenge(w http.ResponseWriter, r *http.Request) {
	if wait := s.strangers.allow(network(remoteAddr(r)), time.Now()); wait > 0 {
		later(w, http.StatusTooManyRequests, wait, tooMany)
		return
	}
	var req wire.IdentityChallengeRequest
	if !readJSON(w, r, maxIdentityBody, &req) {
		return
	}
	if !slices.Contains(clouds, req.Provider) {
		writeError(w, &wire.Error{StatusCode: http.StatusBadRequest, Message: "Validation failed.", Validations: []wire.Validation{{
			Field: "provider", Detail: "A provider is one of: " + strings.Join(clouds, ", ")}}})
		return
	}
	challenge, ends := s.newChallenge(req.Provider, time.Now())
	answer := wire.IdentityChallenge{Challenge: challenge, RSA2048: true, ExpiresAt: ends}
	if req.Provider == wire.ProviderGoogle {
		answer.Audience = s.challengeAudience(challenge)
	}
	writeJSON(w, http.StatusOK, answer)
}

// clouds are those whose machines can prove what they are.
var clouds = []string{wire.ProviderAWS, wire.ProviderAzure, wire.ProviderGoogle}

const tooMany = "Too many requests."

func (s *Server) postAWSInstanceIdentity(w http.ResponseWriter, r *http.Request) {
	var req wire.AWSInstanceIdentity
	s.exchange(w, r, &exchange{
		provider: wire.ProviderAWS, title: "AWS", body: &req,
		read: func(e *exchange) *wire.Error {
			e.name, e.proof, e.payload = req.AgentName, req.IdentityProof, req.Signature
			return required("signature", req.Signature, "document", req.Document)
		},
		verify: func(ctx context.Context, rules *identityRules) (attest.Instance, error) {
			return rules.aws.Verify(ctx, attest.AWSProof{Document: req.Document, Signature: req.Signature, RSA2048: req.SignatureRSA2048})
		},
	})
}

func (s *Server) postAzureInstanceIdentity(w http.ResponseWriter, r *http.Request) {
	var req wire.AzureInstanceIdentity
	s.exchange(w, r, &exchange{
		provider: wire.ProviderAzure, title: "Azure", body: &req,
		read: func(e *exchange) *wire.Error {
			e.name, e.proof, e.payload = req.AgentName, req.IdentityProof, req.Signature
			return required("signature", req.Signature, "encoding", req.Encoding)
		},
		verify: func(ctx context.Context, rules *identityRules) (attest.Instance, error) {
			return rules.azure.Verify(ctx, attest.AzureProof{Signature: req.Signature, Encoding: req.Encoding, Nonce: req.Challenge})
		},
	})
}

func (s *Server) postGoogleInstanceIdentity(w http.ResponseWriter, r *http.Request) {
	var req wire.GoogleInstanceIdentity
	s.exchange(w, r, &exchange{
		provider: wire.ProviderGoogle, title: "GCP", body: &req,
		read: func(e *exchange) *wire.Error {
			e.name, e.proof, e.payload = req.AgentName, req.IdentityProof, req.JSONWebToken
			return required("json_web_token", req.JSONWebToken)
		},
		verify: func(ctx context.Context, rules *identityRules) (attest.Instance, error) {
			audience := rules.audience
			if req.Challenge != "" {
				audience = s.challengeAudience(req.Challenge)
			}
			return rules.google.Verify(ctx, attest.GoogleProof{Token: req.JSONWebToken, Audience: audience})
		},
	})
}

// exchange is one try of a machine to prove what it is.
type exchange struct {
	provider, title string
	body            any
	// read takes the parts that all clouds have from the body, and says what is missing.
	read func(*exchange) *wire.Error
	// verify checks what the cloud signed.
	verify func(context.Context, *identityRules) (attest.Instance, error)

	name    string
	proof   wire.IdentityProof
	payload string

	// What is known so far, for the log.
	instance attest.Instance
	agent    store.Agent
	key      []byte
}

// refusal is an answer that lets nobody in. The caller gets the answer, the log the reason.
type refusal struct {
	result string
	answer *wire.Error
	wait   time.Duration // when to come again; 0 says nothing about it
	reason error
}

// exchange gives a machine that proved what it is a fresh token for its agent.
func (s *Server) exchange(w http.ResponseWriter, r *http.Request, e *exchange) {
	token, refused := s.admit(w, r, e)
	switch {
	case refused == nil:
		s.audit(r, e, resultAccepted, nil)
		writeJSON(w, http.StatusOK, wire.SessionToken{SessionToken: token.Reveal()})
		return
	case refused.answer == nil: // answered already
	case refused.wait > 0:
		later(w, refused.answer.StatusCode, refused.wait, refused.answer.Message)
	default:
		writeError(w, refused.answer)
	}
	s.audit(r, e, refused.result, refused.reason)
}

func (s *Server) admit(w http.ResponseWriter, r *http.Request, e *exchange) (wire.Secret, *refusal) {
	now := time.Now()
	if wait := s.strangers.allow(network(remoteAddr(r)), now); wait > 0 {
		return "", &refusal{resultLimited, &wire.Error{StatusCode: http.StatusTooManyRequests, Message: tooMany}, wait, nil}
	}
	if !readJSON(w, r, maxIdentityBody, e.body) {
		return "", &refusal{result: resultMalformed}
	}
	if answer := e.read(e); answer != nil {
		return "", &refusal{result: resultMalformed, answer: answer}
	}
	e.name = strings.TrimSpace(e.name)
	leave, err := s.checks.enter(r.Context())
	if err != nil {
		return "", &refusal{resultLimited, &wire.Error{StatusCode: http.StatusServiceUnavailable, Message: "Too many machines at once."}, comeAgain, nil}
	}
	defer leave()
	ctx, cancel := context.WithTimeout(r.Context(), checkBudget)
	defer cancel()
	rules := s.identity.Load()
	if refused := s.verify(ctx, rules, e, now); refused != nil {
		return "", refused
	}
	return s.grant(ctx, r, rules, e, now)
}

// invalid is the answer to a proof that is not good. It does not say why: a machine's owner finds that
// in the log, and nobody else is told.
func (e *exchange) invalid(detail string) *wire.Error {
	return &wire.Error{StatusCode: http.StatusUnauthorized, Message: "Invalid " + e.title + " identity.", Detail: detail}
}

const (
	detailSignature = "Signature verification failed."
	detailChallenge = "The challenge is unknown, used or over; ask for another one."
	detailRequired  = "This server asks for a challenge and a proof that answers it."
	detailReplay    = "The proof was used before; make a new one."
)

// verify checks everything that needs no memory.
func (s *Server) verify(ctx context.Context, rules *identityRules, e *exchange, now time.Time) *refusal {
	challenge := e.proof.Challenge
	if challenge != "" && !s.checkChallenge(e.provider, challenge, now) {
		return &refusal{resultChallenge, e.invalid(detailChallenge), 0, errors.New("the challenge was not made here, or is over")}
	}
	var err error
	if e.key, err = proofKey(e.provider, e.payload, e.proof); err != nil {
		return &refusal{resultRefused, e.invalid(detailSignature), 0, err}
	}
	// An AWS document does not hold the challenge; only the proof key can answer it.
	if rules.requireChallenge && (challenge == "" || e.provider == wire.ProviderAWS && e.key == nil) {
		return &refusal{resultChallenge, e.invalid(detailRequired), 0, errors.New("no answer to a challenge, which require_challenge asks for")}
	}
	e.instance, err = e.verify(ctx, rules)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, attest.ErrClaims):
		return &refusal{resultRefused, &wire.Error{StatusCode: http.StatusBadRequest, Message: "Error decoding JWT claims."}, 0, err}
	case errors.Is(err, attest.ErrUnavailable):
		return &refusal{resultUnavailable, &wire.Error{StatusCode: http.StatusServiceUnavailable, Message: "The identity cannot be checked now."}, 5 * time.Second, err}
	}
	return &refusal{resultRefused, e.invalid(detailSignature), 0, err}
}

// grant finds the agent of a machine that proved what it is, and makes its token. A machine whose
// account or region is not the declared or an allowed one is as unknown as one that nobody declared.
func (s *Server) grant(ctx context.Context, r *http.Request, rules *identityRules, e *exchange, now time.Time) (wire.Secret, *refusal) {
	internal := func(err error) *refusal {
		return &refusal{resultFailed, &wire.Error{StatusCode: http.StatusInternalServerError, Message: "Internal error fetching workspace agent."}, 0, err}
	}
	if !rules.allows(e.instance) {
		return "", &refusal{resultForbidden, notFound(e.instance.ID), 0, errors.New("the account or region is not on the list of the configuration")}
	}
	agents, err := s.store.AgentsOfInstance(ctx, e.instance.Provider, e.instance.ID)
	if err != nil {
		return "", internal(err)
	}
	agent, refused := choose(agents, e.instance, e.name)
	if refused != nil {
		return "", refused
	}
	e.agent = agent
	use := store.Use{Agent: agent.ID, ProofKey: e.key, Payload: e.instance.Payload, At: now.UTC()}
	switch err := s.remember(ctx, rules, e.instance, agent, use, e.proof.Challenge, remoteAddr(r).String()); {
	case errors.Is(err, errOtherKey):
		return "", &refusal{resultOtherKey, &wire.Error{
			StatusCode: http.StatusConflict,
			Message:    fmt.Sprintf("Instance with id %q proved itself with another key before.", e.instance.ID),
			Detail:     fmt.Sprintf("If that was an installation that is gone, an operator can run: berth agent forget %s", agent.Name),
			Validations: []wire.Validation{{
				Field: "proof_key", Detail: "not the key of the machine's first exchange"}},
		}, 0, err}
	case errors.Is(err, errReplay), errors.Is(err, errOlder):
		return "", &refusal{resultReplay, e.invalid(detailReplay), 0, err}
	case err != nil:
		return "", internal(err)
	}
	token, err := s.store.MintToken(ctx, agent.ID, true)
	if err != nil {
		return "", internal(err)
	}
	return token, nil
}

func notFound(id string) *wire.Error {
	return &wire.Error{StatusCode: http.StatusNotFound, Message: fmt.Sprintf("Instance with id %q not found.", id)}
}

// choose finds the agent of a machine, or the words that say why there is none.
func choose(agents []store.Agent, instance attest.Instance, name string) (store.Agent, *refusal) {
	var fit []store.Agent
	var names []string
	for _, a := range agents {
		declared := a.Instance
		if declared.Account != "" && declared.Account != instance.Account || declared.Region != "" && declared.Region != instance.Region {
			continue
		}
		names = append(names, a.Name)
		if name == "" || a.Name == name {
			fit = append(fit, a)
		}
	}
	switch {
	case len(names) == 0 && len(agents) > 0:
		return store.Agent{}, &refusal{resultForbidden, notFound(instance.ID), 0, errors.New("the account or region is not the declared one")}
	case len(names) == 0:
		return store.Agent{}, &refusal{result: resultUnknown, answer: notFound(instance.ID)}
	case len(fit) == 0:
		return store.Agent{}, &refusal{result: resultUnknown, answer: &wire.Error{
			StatusCode: http.StatusNotFound, Message: fmt.Sprintf("No agent found with instance ID %q and name %q.", instance.ID, name)}}
	case len(fit) > 1:
		return store.Agent{}, &refusal{result: resultAmbiguous, answer: &wire.Error{
			StatusCode: http.StatusConflict,
			Message:    fmt.Sprintf("Multiple agents found with instance ID %q. Set CODER_AGENT_NAME to one of: %s", instance.ID, strings.Join(names, ", "))}}
	}
	return fit[0], nil
}

// audit records how an exchange ended: in the log all there is to know, in the metrics that it did.
func (s *Server) audit(r *http.Request, e *exchange, result string, reason error) {
	s.metrics.count(exchangeSeries(e.provider, result))
	level := slog.LevelWarn
	switch result {
	case resultAccepted:
		level = slog.LevelInfo
	case resultMalformed, resultLimited:
		level = slog.LevelDebug // whoever can send those can send many
	}
	attrs := []slog.Attr{slog.String("provider", e.provider), slog.String("result", result), slog.String("ip", remoteAddr(r).String())}
	for _, a := range []struct{ name, value string }{
		{"instance", e.instance.ID}, {"account", e.instance.Account}, {"region", e.instance.Region}, {"partition", e.instance.Partition},
		{"payload", e.instance.Payload}, {"agent", e.agent.Name}, {"key", fingerprint(e.key)},
	} {
		if a.value != "" {
			attrs = append(attrs, slog.String(a.name, a.value))
		}
	}
	if e.agent.Name == "" && e.name != "" {
		attrs = append(attrs, slog.String("asked_for", short(e.name)))
	}
	if reason != nil {
		// It quotes what a stranger sent, who shall not fill the log.
		attrs = append(attrs, slog.String("reason", store.CutText(reason.Error(), maxText)))
	}
	s.log.LogAttrs(r.Context(), level, "audit: a machine's identity", attrs...)
}

// postBerthForget lets any installation on the machine of an agent become it again, and ends what was
// given to the one that was known.
func (s *Server) postBerthForget(w http.ResponseWriter, r *http.Request, a store.Agent) {
	if a.Instance == nil {
		writeError(w, &wire.Error{StatusCode: http.StatusConflict, Message: fmt.Sprintf("Agent %q comes from no machine of a cloud.", a.Name)})
		return
	}
	if err := s.store.ForgetMachine(r.Context(), a.ID, *a.Instance); err != nil {
		writeError(w, internalError(err))
		return
	}
	if err := s.store.RevokeTokens(r.Context(), a.ID); err != nil {
		writeError(w, internalError(err))
		return
	}
	s.log.Info("forgot the machine of an agent", "agent", a.Name, "provider", a.Instance.Provider, "instance", a.Instance.ID)
	w.WriteHeader(http.StatusNoContent)
}
