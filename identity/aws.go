package identity

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"

	"github.com/berthd/berth/wire"
)

// Deadlines of all steps together, and of the question whether anything answers at all.
const (
	awsFetchTimeout = 8 * time.Second
	awsProbeTimeout = time.Second
)

// Variables of the AWS SDK, and where its service is when they say nothing.
const (
	awsEndpointEnv     = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
	awsDisabledEnv     = "AWS_EC2_METADATA_DISABLED"
	awsDefaultEndpoint = "http://169.254.169.254"
)

// AWSConfig says how an EC2 instance gets its token.
type AWSConfig struct {
	// AgentName selects among several agents of the instance; empty when there is one.
	AgentName string
	// Exchange reaches the control server.
	Exchange *Exchanger
	// Endpoint of the metadata service; empty means AWS_EC2_METADATA_SERVICE_ENDPOINT, else
	// http://169.254.169.254.
	Endpoint string
	// Stage, if set, is told each step that is done and how long it took.
	Stage func(name string, took time.Duration)
}

// Stages that an exchanging source reports.
const (
	StageFetched   = "identity fetched"
	StageExchanged = "token exchanged"
)

// AWS proves which EC2 instance this is with the document that its metadata service signs. It
// speaks IMDSv2 only, and never through a proxy.
func AWS(config AWSConfig) Source {
	if config.Endpoint == "" {
		config.Endpoint = os.Getenv(awsEndpointEnv)
	}
	if config.Endpoint == "" {
		config.Endpoint = awsDefaultEndpoint
	}
	config.Endpoint = strings.TrimRight(config.Endpoint, "/")
	if config.Stage == nil {
		config.Stage = func(string, time.Duration) {}
	}
	return &awsSource{config}
}

type awsSource struct{ AWSConfig }

func (*awsSource) String() string { return "AWS instance identity" }

func (s *awsSource) Token(ctx context.Context) (wire.Secret, error) {
	start := time.Now()
	proof, err := s.fetch(ctx)
	if err != nil {
		return "", fmt.Errorf("cannot get this machine's identity from AWS: %w", err)
	}
	s.Stage(StageFetched, time.Since(start))
	start = time.Now()
	token, err := s.Exchange.AWS(ctx, proof)
	if err != nil {
		return "", err
	}
	s.Stage(StageExchanged, time.Since(start))
	return token, nil
}

// fetch reads the document and its signature as they are: the signature covers the exact bytes.
func (s *awsSource) fetch(ctx context.Context) (wire.AWSInstanceIdentity, error) {
	ctx, cancel := context.WithTimeout(ctx, awsFetchTimeout)
	defer cancel()
	metadata := newMetadataTransport()
	defer metadata.CloseIdleConnections()
	// A client of its own for each attempt: one that met a hanging service does not ask again.
	client := imds.New(imds.Options{
		Endpoint:       s.Endpoint,
		HTTPClient:     metadata.client(),
		Retryer:        aws.NopRetryer{}, // the caller comes again, with its own pace
		EnableFallback: aws.FalseTernary, // never IMDSv1
	})
	get := func(name string) (string, error) {
		out, err := client.GetDynamicData(ctx, &imds.GetDynamicDataInput{Path: "instance-identity/" + name})
		if err != nil {
			return "", s.explain(ctx, metadata, err)
		}
		defer out.Content.Close()
		text, err := io.ReadAll(out.Content)
		if err != nil {
			return "", fmt.Errorf("cannot read the %s: %w", name, err)
		}
		return string(text), nil
	}
	signature, err := get("signature")
	if err != nil {
		return wire.AWSInstanceIdentity{}, err
	}
	document, err := get("document")
	if err != nil {
		return wire.AWSInstanceIdentity{}, err
	}
	return wire.AWSInstanceIdentity{Signature: signature, Document: document, AgentName: s.AgentName}, nil
}

// explain says why the metadata service gave nothing, and what to do about it.
func (s *awsSource) explain(ctx context.Context, metadata *metadataTransport, err error) error {
	var dial *net.OpError
	var late net.Error
	switch {
	case strings.EqualFold(os.Getenv(awsDisabledEnv), "true"):
		return fmt.Errorf("%s=true in the environment forbids it: unset it for the agent", awsDisabledEnv)
	case metadata.status == http.StatusForbidden:
		return fmt.Errorf("its metadata service is switched off for this instance (status 403): "+
			"run aws ec2 modify-instance-metadata-options --instance-id <id> --http-endpoint enabled, or use a token file: %w", err)
	case metadata.status == http.StatusNotFound, metadata.status == http.StatusMethodNotAllowed, metadata.status == http.StatusNotImplemented:
		return fmt.Errorf("what answers at %s is not AWS's metadata service (status %d): "+
			"is this machine on another cloud? Choose its own identity or a token file: %w", s.Endpoint, metadata.status, err)
	case metadata.status != 0:
		return fmt.Errorf("its metadata service gave a strange answer (status %d): %w", metadata.status, err)
	case errors.As(metadata.failure, &dial) && dial.Op == "dial":
		return fmt.Errorf("there is no metadata service at %s: this machine is not on AWS, or a firewall or network policy "+
			"is in the way; use a token file there: %w", s.Endpoint, err)
	case errors.As(metadata.failure, &late) && late.Timeout() && s.answers(ctx, metadata):
		return fmt.Errorf("the metadata service answers at %s, yet its token does not arrive: the response may travel one hop only, "+
			"which ends before a container's own network. Run aws ec2 modify-instance-metadata-options --instance-id <id> "+
			"--http-put-response-hop-limit 2, or use the host's network, or a token file: %w", s.Endpoint, err)
	default:
		return fmt.Errorf("the metadata service at %s does not answer: %w", s.Endpoint, err)
	}
}

// answers tells whether anything speaks HTTP at the endpoint. Without a token AWS says 401 at once.
func (s *awsSource) answers(ctx context.Context, metadata *metadataTransport) bool {
	ctx, cancel := context.WithTimeout(ctx, awsProbeTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.Endpoint+"/latest/meta-data/", nil)
	if err != nil {
		return false
	}
	resp, err := metadata.client().Do(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return true
}
