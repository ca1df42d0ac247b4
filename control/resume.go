package control

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/berthd/berth/wire"
	"github.com/berthd/berth/wire/tailnetpb"
)

// A resume token lets a client that lost its link come back as the peer that it was, so that agents
// see no stranger. It is a JWT signed with HMAC-SHA256 under a key that the deployment keeps; it says
// who the peer is and for which agent, and opens nothing by itself.
const (
	// resumeKeyID names the key in the header of a token.
	resumeKeyID = "1"
	// maxResumeToken is far above what this server ever makes.
	maxResumeToken = 1024
)

type resumeHeader struct {
	Algorithm string `json:"alg"`
	KeyID     string `json:"kid,omitempty"`
}

type resumeClaims struct {
	Peer     uuid.UUID `json:"sub"`
	Audience uuid.UUID `json:"aud"`
	Expires  int64     `json:"exp"` // Unix seconds
}

// resumeToken makes a token for a peer that may reach agent.
func (s *Server) resumeToken(peer, agent uuid.UUID) (*tailnetpb.RefreshResumeTokenResponse, error) {
	expires := time.Now().Add(wire.ResumeLifetime)
	header, err := json.Marshal(resumeHeader{Algorithm: "HS256", KeyID: resumeKeyID})
	if err != nil {
		return nil, fmt.Errorf("cannot make a resume token: %w", err)
	}
	claims, err := json.Marshal(resumeClaims{Peer: peer, Audience: agent, Expires: expires.Unix()})
	if err != nil {
		return nil, fmt.Errorf("cannot make a resume token: %w", err)
	}
	signed := jwtEncode(header) + "." + jwtEncode(claims)
	return &tailnetpb.RefreshResumeTokenResponse{
		Token:     signed + "." + jwtEncode(s.sign(signed)),
		RefreshIn: durationpb.New(wire.ResumeRefresh),
		ExpiresAt: timestamppb.New(expires),
	}, nil
}

// resume returns the peer that a token names, or a new one without a token. A token without a key id
// is from a server that signs in another way, and as good as none.
func (s *Server) resume(token string, agent uuid.UUID) (uuid.UUID, error) {
	if token == "" {
		return uuid.NewRandom()
	}
	if len(token) > maxResumeToken {
		return uuid.Nil, errors.New("the token is too long")
	}
	signed, signature, ok := cutLast(token, ".")
	head, body, ok2 := strings.Cut(signed, ".")
	if !ok || !ok2 {
		return uuid.Nil, errors.New("the token is malformed")
	}
	var header resumeHeader
	if err := jwtDecode(head, &header); err != nil {
		return uuid.Nil, err
	}
	if header.KeyID == "" {
		return uuid.NewRandom()
	}
	mac, err := base64.RawURLEncoding.DecodeString(signature)
	if err != nil || header.Algorithm != "HS256" || header.KeyID != resumeKeyID || !hmac.Equal(mac, s.sign(signed)) {
		return uuid.Nil, errors.New("the token is not signed by this server")
	}
	var claims resumeClaims
	if err := jwtDecode(body, &claims); err != nil {
		return uuid.Nil, err
	}
	switch {
	case time.Now().Unix() >= claims.Expires:
		return uuid.Nil, errors.New("the token has expired")
	case claims.Audience != agent:
		return uuid.Nil, errors.New("the token is for another agent")
	}
	return claims.Peer, nil
}

func (s *Server) sign(text string) []byte {
	mac := hmac.New(sha256.New, s.resumeKey)
	mac.Write([]byte(text))
	return mac.Sum(nil)
}

func jwtEncode(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

func jwtDecode(part string, v any) error {
	b, err := base64.RawURLEncoding.DecodeString(part)
	if err != nil {
		return errors.New("the token is malformed")
	}
	if err := json.Unmarshal(b, v); err != nil {
		return errors.New("the token is malformed")
	}
	return nil
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}
