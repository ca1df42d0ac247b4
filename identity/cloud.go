package identity

import (
	"context"
	"time"

	"github.com/berthd/berth/wire"
)

// cloud is what differs from one cloud to another.
type cloud interface {
	// provider is its name on the wire, title its name for people.
	provider() string
	title() string
	// endpoints are where its metadata service may be, as the environment says or by default; the one
	// that takes a connection first is used. told is the variable that says so, empty if none does.
	endpoints() (list []string, told string)
	// fetch gets the proof that the cloud signs.
	fetch(ctx context.Context, m *metadata, want request) (proof, error)
	// explain knows what a failed request to this cloud means beyond what holds for any of them.
	explain(ctx context.Context, m *metadata) *Failure
	// probe tells whether it is this cloud's service that answers.
	probe(ctx context.Context, m *metadata) bool
}

// request says what a proof is wanted for.
type request struct {
	// agentName selects among several agents of the machine; empty when there is one.
	agentName string
	// challenge is empty when the server gives none.
	challenge wire.IdentityChallenge
}

// proof is the body of an exchange.
type proof struct {
	body any
	// payload is the member of body that the cloud signed.
	payload string
	// own are the members of body that berth adds.
	own *wire.IdentityProof
}

// clouds are all of them, in the order in which they are asked for.
var clouds = []cloud{awsCloud{}, azureCloud{}, googleCloud{}}

// authOf is the value of --auth that chooses a cloud.
func authOf(c cloud) string { return c.provider() + "-instance-identity" }

// CloudConfig says how a machine in a cloud gets its token.
type CloudConfig struct {
	// AgentName selects among several agents of the machine; empty when there is one.
	AgentName string
	// Exchange reaches the control server.
	Exchange *Exchanger
	// Endpoint of the metadata service, such as http://127.0.0.1:8000; empty means what the
	// environment says ([AWS], [Azure], [Google]), else 169.254.169.254.
	Endpoint string
	// Stage, if set, is told each step that is done, whose identity it was, and how long it took.
	Stage func(name, source string, took time.Duration)
}

// Stages that an exchanging source reports.
const (
	StageFetched   = "identity fetched"
	StageExchanged = "token exchanged"
)

// cloudSource proves which machine of a cloud this is.
type cloudSource struct {
	CloudConfig
	cloud cloud
}

func newCloudSource(c cloud, config CloudConfig) Source {
	if config.Stage == nil {
		config.Stage = func(string, string, time.Duration) {}
	}
	return &cloudSource{config, c}
}

func (s *cloudSource) String() string { return s.cloud.title() + " instance identity" }

func (s *cloudSource) Renews() bool { return true }

func (s *cloudSource) Token(ctx context.Context) (wire.Secret, error) {
	challenge, err := s.Exchange.challenge(ctx, s.cloud.provider())
	if err != nil {
		return "", err
	}
	start := time.Now()
	signed, err := s.fetch(ctx, challenge)
	if err != nil {
		return "", err
	}
	s.Stage(StageFetched, s.String(), time.Since(start))
	start = time.Now()
	token, err := s.Exchange.exchange(ctx, s.cloud.provider(), challenge, signed)
	if err != nil {
		return "", err
	}
	s.Stage(StageExchanged, s.String(), time.Since(start))
	return token, nil
}

// check fetches a proof for no server.
func (s *cloudSource) check(ctx context.Context) error {
	_, err := s.fetch(ctx, wire.IdentityChallenge{})
	return err
}

// fetchTimeout bounds all requests of a proof together, each of which takes three seconds at most.
const fetchTimeout = 8 * time.Second

func (s *cloudSource) fetch(ctx context.Context, challenge wire.IdentityChallenge) (proof, error) {
	endpoints := []string{s.Endpoint}
	if s.Endpoint == "" {
		endpoints, _ = s.cloud.endpoints()
	}
	m := newMetadata(reachable(ctx, endpoints))
	defer m.close()
	within, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	signed, err := s.cloud.fetch(within, m, request{s.AgentName, challenge})
	if err != nil {
		return proof{}, m.explain(ctx, s.cloud, err)
	}
	return signed, nil
}
