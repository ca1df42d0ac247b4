package identity

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"

	"github.com/berthd/berth/wire"
)

// Variables of the AWS SDK.
const (
	awsEndpointEnv = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
	awsModeEnv     = "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE"
	awsDisabledEnv = "AWS_EC2_METADATA_DISABLED"
)

// awsIPv6 is where the service is too, on machines that have it switched on.
const awsIPv6 = "http://[fd00:ec2::254]"

// AWS proves which EC2 instance this is with the document that its metadata service signs. It
// speaks IMDSv2 only. The service is at AWS_EC2_METADATA_SERVICE_ENDPOINT, else at AWS's IPv4 or IPv6
// address, whichever answers.
func AWS(config CloudConfig) Source { return newCloudSource(awsCloud{}, config) }

type awsCloud struct{}

func (awsCloud) provider() string { return wire.ProviderAWS }

func (awsCloud) title() string { return "AWS" }

func (awsCloud) endpoints() (list []string, told string) {
	if e := os.Getenv(awsEndpointEnv); e != "" {
		return []string{e}, awsEndpointEnv
	}
	if strings.EqualFold(os.Getenv(awsModeEnv), "IPv6") {
		return []string{awsIPv6}, ""
	}
	return []string{linkLocal, awsIPv6}, ""
}

// fetch reads the document and its signatures as they are: they cover the exact bytes.
func (awsCloud) fetch(ctx context.Context, m *metadata, want request) (proof, error) {
	// A client of its own for each attempt: one that met a hanging service does not ask again.
	client := imds.New(imds.Options{
		Endpoint:       m.endpoint,
		HTTPClient:     m.client(),
		Retryer:        aws.NopRetryer{}, // the caller comes again, with its own pace
		EnableFallback: aws.FalseTernary, // never IMDSv1
	})
	get := func(name string) (string, error) {
		out, err := client.GetDynamicData(ctx, &imds.GetDynamicDataInput{Path: "instance-identity/" + name})
		if err != nil {
			return "", err
		}
		defer out.Content.Close()
		text, err := io.ReadAll(out.Content)
		if err != nil {
			return "", fmt.Errorf("cannot read the %s: %w", name, err)
		}
		return string(text), nil
	}
	body := &wire.AWSInstanceIdentity{AgentName: want.agentName}
	var err error
	if body.Signature, err = get("signature"); err != nil {
		return proof{}, err
	}
	if body.Document, err = get("document"); err != nil {
		return proof{}, err
	}
	if err := checkAWSDocument(body.Document); err != nil {
		return proof{}, &Failure{
			Cause: fmt.Sprintf("what answers at %s gives no identity document as AWS's metadata service does: %v", m.endpoint, err),
			Fix:   "see whether an emulator answers in its place, " + instead, err: err,
		}
	}
	if want.challenge.RSA2048 {
		// Emulators lack it; the other signature does then.
		body.SignatureRSA2048, err = get("rsa2048")
		if err != nil && m.status != http.StatusNotFound {
			return proof{}, err
		}
	}
	return proof{body, body.Signature, &body.IdentityProof}, nil
}

// checkAWSDocument tells an identity document from whatever else may answer. The server verifies it.
func checkAWSDocument(text string) error {
	var document struct {
		InstanceID string `json:"instanceId"`
	}
	if err := json.Unmarshal([]byte(text), &document); err != nil {
		return fmt.Errorf("it is not JSON: %w", err)
	}
	if document.InstanceID == "" {
		return errors.New("it names no instance")
	}
	return nil
}

const awsHopLimitFix = "run aws ec2 modify-instance-metadata-options --instance-id <id> --http-put-response-hop-limit 2, or use the host's network, " + instead

func (c awsCloud) explain(ctx context.Context, m *metadata) *Failure {
	var late net.Error
	switch {
	case strings.EqualFold(os.Getenv(awsDisabledEnv), "true"):
		return &Failure{
			Cause: awsDisabledEnv + "=true in the environment forbids to ask AWS's metadata service",
			Fix:   "unset it for the agent",
		}
	case m.status == http.StatusForbidden && m.header.Get("Via") == "":
		return &Failure{
			Cause: "AWS's metadata service is switched off for this instance, or a proxy in between adds X-Forwarded-For (status 403)",
			Fix:   "run aws ec2 modify-instance-metadata-options --instance-id <id> --http-endpoint enabled, " + instead,
		}
	case errors.As(m.failure, &late) && late.Timeout() && !isDial(m.failure) && c.answers(ctx, m.endpoint):
		return &Failure{
			Cause: fmt.Sprintf("AWS's metadata service answers at %s, yet its token does not arrive: with a hop limit of 1 the response ends before a container's own network", m.endpoint),
			Fix:   awsHopLimitFix,
		}
	}
	return nil
}

// answers tells whether requests without a token are answered. AWS says 401 at once.
func (awsCloud) answers(ctx context.Context, endpoint string) bool {
	ctx, cancel := context.WithTimeout(ctx, metadataProbeTimeout)
	defer cancel()
	m := newMetadata(endpoint)
	defer m.close()
	_, err := m.ask(ctx, http.MethodGet, "/latest/meta-data/")
	return err == nil
}

// probe takes the refusal of a request without a token as proof: it also comes where the hop limit
// keeps tokens back. Services that imitate AWS's older ways have no tokens.
func (awsCloud) probe(ctx context.Context, m *metadata) bool {
	if _, err := m.ask(ctx, http.MethodGet, "/latest/meta-data/"); err != nil {
		return false
	}
	if m.status == http.StatusUnauthorized {
		return true
	}
	if m.status != http.StatusOK {
		return false
	}
	const ttl = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"
	_, err := m.ask(ctx, http.MethodPut, "/latest/api/token", ttl, "60")
	return err == nil && m.status == http.StatusOK && m.header.Get(ttl) != ""
}
