package wire

import (
	"crypto/sha256"
	"encoding/hex"
	"time"
)

// Clouds that vouch for machines, as they stand in bodies, paths and configuration (docs/protocol.md#names).
const (
	ProviderAWS    = "aws"
	ProviderAzure  = "azure"
	ProviderGoogle = "google"
)

// PathIdentityChallenge is where a machine asks for a challenge before it proves itself. A stock
// server answers 404; the machine then goes on without one.
//
// See docs/protocol.md#additions.
const PathIdentityChallenge = PathBerth + "identity-challenge"

// IdentityChallengeRequest is the body of POST [PathIdentityChallenge]. It needs no token.
type IdentityChallengeRequest struct {
	// Provider is aws, azure or google.
	Provider string `json:"provider"`
}

// IdentityChallenge answers it. A challenge may be used once, and not after ExpiresAt.
type IdentityChallenge struct {
	// Challenge is 32 characters of a-z and 0-9. It is the nonce of an Azure document. An AWS document
	// cannot carry it; there it is in the signature of the proof key only.
	Challenge string `json:"challenge"`
	// Audience is what a Google token must be made for; empty for other clouds.
	Audience string `json:"audience,omitempty"`
	// RSA2048 tells that signature_rsa2048 of an AWS proof is taken, and preferred.
	RSA2048   bool      `json:"rsa2048"`
	ExpiresAt time.Time `json:"expires_at"`
}

// IdentityProof is berth's addition to the body of an exchange: the challenge that was answered, and
// the key that the machine made at its first start, which it proves to hold. Stock agents send none
// of it, and stock servers skip it.
type IdentityProof struct {
	Challenge string `json:"challenge,omitempty"`
	// ProofKey is an Ed25519 public key, and Proof its signature over [IdentityProofMessage], both in
	// standard base64.
	ProofKey string `json:"proof_key,omitempty"`
	Proof    string `json:"proof,omitempty"`
}

// IdentityProofMessage is what a proof key signs. The payload is the member of the body that the cloud
// signed, exactly as it is posted: signature for AWS and Azure, json_web_token for Google. The
// challenge is empty when there is none.
func IdentityProofMessage(provider, challenge, payload string) []byte {
	sum := sha256.Sum256([]byte(payload))
	return []byte("berth-identity-proof-v1\n" + provider + "\n" + challenge + "\n" + hex.EncodeToString(sum[:]) + "\n")
}

// AWSInstanceIdentity is the body of POST workspaceagents/aws-instance-identity.
type AWSInstanceIdentity struct {
	// Signature is base64 as the metadata service gave it, Document the exact bytes it signs.
	Signature string `json:"signature"`
	Document  string `json:"document"`
	// AgentName selects among several agents of one instance; empty when there is one.
	AgentName string `json:"agent_name,omitempty"`
	// SignatureRSA2048 is the metadata service's rsa2048, base64 PKCS#7 around the same document: the
	// stronger signature, for servers that say they take it.
	SignatureRSA2048 string `json:"signature_rsa2048,omitempty"`
	IdentityProof
}

// AzureInstanceIdentity is the body of POST workspaceagents/azure-instance-identity: the attested
// document as the metadata service gave it.
type AzureInstanceIdentity struct {
	// Signature is base64 PKCS#7 around the document, Encoding "pkcs7".
	Signature string `json:"signature"`
	Encoding  string `json:"encoding"`
	AgentName string `json:"agent_name,omitempty"`
	IdentityProof
}

// GoogleInstanceIdentity is the body of POST workspaceagents/google-instance-identity.
type GoogleInstanceIdentity struct {
	// JSONWebToken is the identity token of the machine's service account, in the full format.
	JSONWebToken string `json:"json_web_token"`
	AgentName    string `json:"agent_name,omitempty"`
	IdentityProof
}
