package control

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"slices"
	"time"

	"github.com/berthd/berth/control/store"
	"github.com/berthd/berth/identity/attest"
	"github.com/berthd/berth/wire"
)

// identityRules say which machines are believed, and which of those are let in.
type identityRules struct {
	aws    *attest.AWS
	azure  *attest.Azure
	google *attest.Google

	// audience is whom a Google token is made for when there is no challenge.
	audience         string
	requireChallenge bool
	// reuse lets another installation on the same machine take over an agent.
	reuse bool
	// accounts and regions bound the machines of a provider; empty means any.
	accounts, regions map[string][]string
}

// stockAudience is what stock agents make Google tokens for.
const stockAudience = "coder"

// newIdentityRules joins what the program was told with what the file says.
func newIdentityRules(config Config, file fileIdentity) (*identityRules, error) {
	rules := &identityRules{
		audience:         cmp.Or(file.Google.Audience, stockAudience),
		requireChallenge: file.RequireChallenge, reuse: file.Reuse,
		accounts: map[string][]string{wire.ProviderAWS: file.AWS.Accounts, wire.ProviderAzure: lower(file.Azure.Subscriptions), wire.ProviderGoogle: file.Google.Projects},
		regions:  map[string][]string{wire.ProviderAWS: file.AWS.Regions, wire.ProviderAzure: lower(file.Azure.Regions), wire.ProviderGoogle: file.Google.Regions},
	}
	aws, azure, google := config.AWS, config.Azure, config.Google
	var err error
	if aws.Certificates, err = file.AWS.certificates(aws.Certificates); err != nil {
		return nil, err
	}
	own, err := readCertificates(file.Azure.Certificates)
	if err != nil {
		return nil, err
	}
	azure.Certificates = slices.Concat(azure.Certificates, own)
	if len(file.Azure.Domains) > 0 {
		azure.Domains = lower(file.Azure.Domains)
	}
	google.Issuer = cmp.Or(file.Google.Issuer, google.Issuer)
	if file.Google.keys != nil {
		google.KeysURL = file.Google.keys
	}
	if rules.aws, err = attest.NewAWS(aws); err != nil {
		return nil, err
	}
	if rules.azure, err = attest.NewAzure(azure); err != nil {
		return nil, err
	}
	rules.google = attest.NewGoogle(google)
	return rules, nil
}

// allows tells whether a machine may be let in at all.
func (r *identityRules) allows(i attest.Instance) bool {
	within := func(list []string, value string) bool { return len(list) == 0 || slices.Contains(list, value) }
	return within(r.accounts[i.Provider], i.Account) && within(r.regions[i.Provider], i.Region)
}

// pinWarning is how long before a pinned certificate ends the log says so.
const pinWarning = 180 * 24 * time.Hour

// pins are the certificates that are trusted without asking anybody, by cloud.
func (r *identityRules) pins() map[string][]attest.Pin {
	return map[string][]attest.Pin{wire.ProviderAWS: r.aws.Pins(), wire.ProviderAzure: r.azure.Pins()}
}

// watchPins warns of pinned certificates that will end, once a day.
func (s *Server) watchPins(ctx context.Context) error {
	ticker := time.NewTicker(24 * time.Hour)
	defer ticker.Stop()
	for {
		for provider, pins := range s.identity.Load().pins() {
			for _, p := range pins {
				if left := time.Until(p.Ends); left < pinWarning {
					s.log.Warn("a certificate that proves machines ends soon: update berth, or add the new one to the configuration (docs/identity.md)",
						"provider", provider, "certificate", p.Name, "ends", p.Ends, "days", days(left))
				}
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

func days(d time.Duration) int { return int(d / (24 * time.Hour)) }

// A challenge is 32 characters: when it ends, something random, and a MAC over both and the provider.
// Nothing is kept until it is used, so asking for many fills no memory.
const (
	challengeLife   = time.Minute
	challengeStamp  = 4
	challengeRandom = 6
	challengeMAC    = 10
)

var challengeText = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// newChallenge makes a challenge for a provider, and says when it ends.
func (s *Server) newChallenge(provider string, now time.Time) (string, time.Time) {
	ends := now.Add(challengeLife).Truncate(time.Second)
	raw := binary.BigEndian.AppendUint32(nil, uint32(ends.Unix()))
	random := make([]byte, challengeRandom)
	rand.Read(random)
	raw = append(raw, random...)
	return challengeText.EncodeToString(append(raw, s.challengeMAC(provider, raw)...)), ends.UTC()
}

// checkChallenge tells whether a challenge was made here for a provider and is not over. Whether it
// was used is another matter.
func (s *Server) checkChallenge(provider, challenge string, now time.Time) bool {
	raw, err := challengeText.DecodeString(challenge)
	if err != nil || len(raw) != challengeStamp+challengeRandom+challengeMAC {
		return false
	}
	signed := raw[:challengeStamp+challengeRandom]
	return hmac.Equal(raw[len(signed):], s.challengeMAC(provider, signed)) && now.Unix() < int64(binary.BigEndian.Uint32(signed))
}

func (s *Server) challengeMAC(provider string, signed []byte) []byte {
	mac := hmac.New(sha256.New, s.resumeKey)
	mac.Write([]byte("identity-challenge\n" + provider + "\n"))
	mac.Write(signed)
	return mac.Sum(nil)[:challengeMAC]
}

// challengeAudience is whom a Google token that answers a challenge is made for.
func (s *Server) challengeAudience(challenge string) string {
	return s.config.AccessURL.String() + "?challenge=" + challenge
}

// proofKey checks that the sender holds the key it shows; nil is that it shows none.
func proofKey(provider, payload string, proof wire.IdentityProof) (ed25519.PublicKey, error) {
	if proof.ProofKey == "" && proof.Proof == "" {
		return nil, nil
	}
	key, err := base64.StdEncoding.Strict().DecodeString(proof.ProofKey)
	if err != nil || len(key) != ed25519.PublicKeySize {
		return nil, errors.New("proof_key is no Ed25519 key in base64")
	}
	signature, err := base64.StdEncoding.Strict().DecodeString(proof.Proof)
	if err != nil || !ed25519.Verify(key, wire.IdentityProofMessage(provider, proof.Challenge, payload), signature) {
		return nil, errors.New("the proof does not fit proof_key and payload")
	}
	return key, nil
}

// Why a machine that proved what it is is not let in all the same.
var (
	errOtherKey = errors.New("another installation of the agent on this machine came first")
	errOlder    = errors.New("an older document than the machine's last one")
	errReplay   = errors.New("used before")
)

// retryWindow is how long after an exchange the same one may come again, from the same installation:
// its answer may have been lost.
const retryWindow = time.Minute

// remember records an exchange, or says why it may not be: the machine was started anew since the
// document was signed, another installation holds the agent, or the proof was used before.
func (s *Server) remember(ctx context.Context, rules *identityRules, instance attest.Instance, agent store.Agent, use store.Use, challenge, ip string) error {
	// First, so that who comes with what was used before changes nothing.
	once := map[string]time.Duration{}
	if !instance.Expires.IsZero() {
		// Until no clock finds it good any more.
		once["payload "+instance.Provider+" "+instance.Payload] = time.Until(instance.Expires) + 2*time.Minute
	}
	if challenge != "" {
		once["challenge "+challenge] = 2 * challengeLife
	}
	for what, keep := range once {
		before, err := s.store.UseOnce(ctx, what, use, keep)
		if errors.Is(err, store.ErrExists) && !retry(before, use) {
			return errReplay
		}
		if err != nil && !errors.Is(err, store.ErrExists) {
			return err
		}
	}
	return s.store.UpdateMachine(ctx, instance.Provider, instance.ID, func(m *store.Machine) error {
		// Only AWS: its document is signed once per start and never ends. Those of others end, are used
		// once, and may overtake each other on their way.
		if instance.Provider == wire.ProviderAWS && instance.Issued.Before(m.Issued) {
			return errOlder
		}
		if instance.Issued.After(m.Issued) {
			m.Issued = instance.Issued
		}
		holder := m.Agents[agent.ID]
		if len(holder.ProofKey) > 0 && !bytes.Equal(holder.ProofKey, use.ProofKey) && !rules.reuse {
			return errOtherKey
		}
		m.Agents[agent.ID] = store.Holder{ProofKey: use.ProofKey, LastSeen: use.At, Payload: use.Payload, IP: ip}
		return nil
	})
}

// retry tells whether a use is the same as the one before, by one who can prove that it is his.
func retry(before, again store.Use) bool {
	return before.Agent == again.Agent && before.Payload == again.Payload &&
		len(again.ProofKey) > 0 && bytes.Equal(before.ProofKey, again.ProofKey) && again.At.Sub(before.At) < retryWindow
}

// openProviders are the providers of declared agents that take machines of any account.
func (r *identityRules) openProviders(declared []declaration) []string {
	var open []string
	for _, d := range declared {
		if in := d.file.Instance; in != nil && in.Account == "" && len(r.accounts[in.Provider]) == 0 && !slices.Contains(open, in.Provider) {
			open = append(open, in.Provider)
		}
	}
	slices.Sort(open)
	return open
}

// fingerprint names a proof key in logs.
func fingerprint(key []byte) string {
	if len(key) == 0 {
		return ""
	}
	sum := sha256.Sum256(key)
	return "SHA256:" + base64.RawStdEncoding.EncodeToString(sum[:])
}
