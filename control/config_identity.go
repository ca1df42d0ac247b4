package control

import (
	"crypto/x509"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/identity/attest"
	"github.com/berthd/berth/wire"
)

// What the file says of machines that prove what they are, as it is written.
type (
	fileIdentity struct {
		RequireChallenge bool       `yaml:"require_challenge"`
		Reuse            bool       `yaml:"reuse"`
		AWS              fileAWS    `yaml:"aws"`
		Azure            fileAzure  `yaml:"azure"`
		Google           fileGoogle `yaml:"google"`
	}
	fileAWS struct {
		Accounts []string `yaml:"accounts"`
		Regions  []string `yaml:"regions"`
		// Certificates are PEM files, by region.
		Certificates map[string][]string `yaml:"certificates"`
	}
	fileAzure struct {
		Subscriptions []string `yaml:"subscriptions"`
		Regions       []string `yaml:"regions"`
		Domains       []string `yaml:"domains"`
		Certificates  []string `yaml:"certificates"`
	}
	fileGoogle struct {
		Projects []string `yaml:"projects"`
		Regions  []string `yaml:"regions"`
		Audience string   `yaml:"audience"`
		Issuer   string   `yaml:"issuer"`
		KeysURL  string   `yaml:"keys_url"`

		keys *url.URL // KeysURL, checked
	}
)

// checkIdentity returns what the file says of identities, checked.
func (m *mistakes) checkIdentity(f fileIdentity) fileIdentity {
	for i, domain := range f.Azure.Domains {
		if !slices.Contains(attest.AzureDomains(), strings.ToLower(domain)) {
			m.at("domain %q is none of Azure's metadata services: use %s", []any{domain, strings.Join(attest.AzureDomains(), ", ")}, "identity", "azure", "domains", i)
		}
	}
	if f.Google.KeysURL != "" {
		u, err := url.Parse(f.Google.KeysURL)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
			m.at("keys_url %q is no web address", []any{f.Google.KeysURL}, "identity", "google", "keys_url")
		}
		f.Google.keys = u
	}
	return f
}

// certificates reads the files and adds them to those that are trusted already.
func (f fileAWS) certificates(trusted map[string][]*x509.Certificate) (map[string][]*x509.Certificate, error) {
	all := map[string][]*x509.Certificate{}
	maps.Copy(all, trusted)
	for region, files := range f.Certificates {
		certs, err := readCertificates(files)
		if err != nil {
			return nil, err
		}
		all[region] = slices.Concat(all[region], certs)
	}
	return all, nil
}

func readCertificates(files []string) ([]*x509.Certificate, error) {
	var all []*x509.Certificate
	for _, path := range files {
		text, err := readFile(path, maxConfig)
		if err != nil {
			return nil, fmt.Errorf("cannot read certificates: %w", err)
		}
		certs, err := attest.ParseCertificates(text)
		if err != nil {
			return nil, fmt.Errorf("cannot use certificates of %s: %w", path, err)
		}
		all = append(all, certs...)
	}
	return all, nil
}

// instance is the machine that an agent comes from. Azure's names are the same in all letters.
func (f *fileInstance) instance() *store.Instance {
	in := &store.Instance{Provider: f.Provider, ID: f.ID, Account: f.Account, Region: f.Region}
	if in.Provider == wire.ProviderAzure {
		in.ID, in.Account, in.Region = strings.ToLower(in.ID), strings.ToLower(in.Account), strings.ToLower(in.Region)
	}
	return in
}

func lower(list []string) []string {
	lowered := make([]string, 0, len(list))
	for _, s := range list {
		lowered = append(lowered, strings.ToLower(s))
	}
	return lowered
}
