//go:build linux

package main

import (
	"crypto/x509"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/berthd/berth/control"
	"github.com/berthd/berth/identity/attest"
	"github.com/berthd/berth/internal/testnet"
	"github.com/berthd/berth/wire"
)

// realMetadata is where machines find their metadata service in every cloud.
const realMetadata = "169.254.169.254:80"

// localCloud is what `berth up` runs in place of a cloud: one machine's metadata service, signing with
// keys made now.
type localCloud struct {
	provider string
	// instance is the id of the machine.
	instance string
	metadata http.Handler
	// variable is what points a client to an address of the metadata service.
	variable func(addr string) string
	// keys, where there are any, are published at an address for the server.
	keys http.Handler
	// trust makes a server believe this cloud; keys is where they are published.
	trust func(config *control.Config, keys *url.URL)
}

// localClouds are those that there is a stand-in for.
var localClouds = []string{wire.ProviderAWS, wire.ProviderAzure, wire.ProviderGoogle}

// newLocalCloud makes the stand-in for one of [localClouds].
func newLocalCloud(provider string) (*localCloud, error) {
	switch provider {
	case wire.ProviderAWS:
		fake, err := testnet.NewFakeAWS()
		if err != nil {
			return nil, err
		}
		return &localCloud{
			provider: provider, instance: fake.InstanceID(), metadata: fake,
			variable: func(addr string) string { return "AWS_EC2_METADATA_SERVICE_ENDPOINT=http://" + addr },
			trust: func(c *control.Config, _ *url.URL) {
				c.AWS.Certificates = map[string][]*x509.Certificate{testnet.FakeAWSRegion: fake.Certificates()}
			},
		}, nil
	case wire.ProviderAzure:
		fake, err := testnet.NewFakeAzure(testnet.AzureLeaf{})
		if err != nil {
			return nil, err
		}
		return &localCloud{
			provider: provider, instance: fake.InstanceID(), metadata: fake,
			variable: func(addr string) string { return "BERTH_AZURE_METADATA_ENDPOINT=http://" + addr },
			trust: func(c *control.Config, _ *url.URL) {
				c.Azure.Certificates = []*x509.Certificate{fake.Signer().Root(), fake.Signer().Issuing()}
			},
		}, nil
	case wire.ProviderGoogle:
		fake, err := testnet.NewFakeGoogle()
		if err != nil {
			return nil, err
		}
		return &localCloud{
			provider: provider, instance: fake.InstanceID(), metadata: fake, keys: fake.Signer(),
			variable: func(addr string) string { return "GCE_METADATA_HOST=" + addr },
			trust:    func(c *control.Config, keys *url.URL) { c.Google = attest.GoogleConfig{KeysURL: keys} },
		}, nil
	}
	return nil, fmt.Errorf("there is no cloud %q: use %s", provider, strings.Join(localClouds, ", "))
}
