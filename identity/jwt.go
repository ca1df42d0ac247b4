package identity

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// claims is what is looked at in a signed token (JWT) on its way to the server, which verifies it. It
// serves to explain what is wrong with the token, not to trust it.
type claims struct {
	Audience stringOrList `json:"aud"`
	Expiry   float64      `json:"exp"` // seconds since 1970
	Google   struct {
		ComputeEngine struct {
			InstanceID any `json:"instance_id"`
		} `json:"compute_engine"`
	} `json:"google"`
}

// stringOrList is a claim that may be one string or several.
type stringOrList []string

// UnmarshalJSON implements [json.Unmarshaler].
func (s *stringOrList) UnmarshalJSON(text []byte) error {
	var one string
	if json.Unmarshal(text, &one) == nil {
		*s = stringOrList{one}
		return nil
	}
	return json.Unmarshal(text, (*[]string)(s))
}

// readClaims reads the claims of a signed token.
func readClaims(token string) (claims, error) {
	var c claims
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return c, errors.New("it is no signed token (JWT), which has three parts with dots between")
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(payload, &c)
	}
	if err != nil {
		return c, fmt.Errorf("it is no signed token (JWT): %w", err)
	}
	return c, nil
}
