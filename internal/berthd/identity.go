package berthd

import (
	"log/slog"
	"strings"
	"time"

	"github.com/berthd/berth/agent"
	"github.com/berthd/berth/identity"
)

// proofKeyFile is where in the state directory the machine's proof key is kept.
const proofKeyFile = "identity_ed25519_key"

// exchanger reaches the server with proofs of identity.
func exchanger(server agent.Server) *identity.Exchanger {
	return &identity.Exchanger{URL: server.URL, HTTP: server.HTTP, Header: server.Header}
}

// source returns where the token comes from.
func (s *identitySettings) source(exchange *identity.Exchanger, log *slog.Logger, tell func(agent.Event)) (identity.Source, error) {
	cloud := identity.CloudConfig{
		AgentName: strings.TrimSpace(s.agentName),
		Exchange:  exchange,
		Stage: func(name, source string, took time.Duration) {
			steps := map[string]agent.Step{identity.StageFetched: agent.StepIdentity, identity.StageExchanged: agent.StepExchange}
			tell(agent.Event{Time: time.Now(), Step: steps[name], Took: took.Milliseconds(), Detail: source})
		},
	}
	switch s.auth {
	case "token":
		if source := s.handedOver(log); source != nil {
			return source, nil
		}
		return nil, usagef("there is no token: set BERTH_TOKEN (or CODER_AGENT_TOKEN), --token-file or a systemd credential %q, or choose --auth auto", s.credential)
	case "auto":
		if source := s.handedOver(log); source != nil {
			log.Info("the identity is a token", "because", source.String()+" is given")
			return source, nil
		}
		return identity.Auto(identity.AutoConfig{CloudConfig: cloud, Found: func(cloud, how string) {
			log.Info("this machine is in a cloud", "cloud", cloud, "because", how)
		}}), nil
	case "aws-instance-identity":
		return identity.AWS(cloud), nil
	case "azure-instance-identity":
		return identity.Azure(cloud), nil
	case "google-instance-identity":
		return identity.Google(cloud), nil
	case "kubernetes-service-account":
		path := s.tokenFile
		if path == "" {
			path = identity.KubernetesTokenPath
		}
		return identity.KubernetesToken(path), nil
	}
	return nil, usagef("--auth %q is not known: use token, auto, aws-instance-identity, azure-instance-identity, google-instance-identity or kubernetes-service-account", s.auth)
}

// handedOver returns the token that somebody gave to this machine, nil if nobody did.
func (s *identitySettings) handedOver(log *slog.Logger) identity.Source {
	if source := identity.Credential(s.credentials, s.credential); source != nil {
		return source
	}
	if s.token != "" {
		return identity.Token(s.token)
	}
	if s.tokenFile != "" {
		return identity.TokenFile(s.tokenFile, func(warning string) { log.Warn(warning) })
	}
	return nil
}

// onRefused says what a refused token leads to. Unless told otherwise, these stay: one whose end is that
// of its container, and with it of the terminals; and an agent that a stock start script
// started, since nothing starts it again. A stock server refuses its token while the next build runs,
// and takes the same one afterwards where a prebuilt workspace was claimed.
func (s *settings) onRefused(endsContainer bool) agent.RefusedPolicy {
	exit := s.identity.exitOnRefused
	switch {
	case exit != nil && *exit:
		return agent.ExitWhenRefused
	case exit != nil || endsContainer || s.stock:
		return agent.StayWhenRefused
	}
	return agent.ExitWhenLost
}
