package store

import (
	"errors"
	"testing"
	"time"

	"github.com/google/uuid"
)

func TestMachines(t *testing.T) {
	s := open(t, Options{})
	ctx := t.Context()
	a, b := uuid.New(), uuid.New()
	hold := func(agent uuid.UUID, key string) {
		t.Helper()
		if err := s.UpdateMachine(ctx, "aws", "i-1", func(m *Machine) error {
			m.Agents[agent] = Holder{ProofKey: []byte(key)}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	held := func() map[uuid.UUID]Holder {
		t.Helper()
		var agents map[uuid.UUID]Holder
		err := s.UpdateMachine(ctx, "aws", "i-1", func(m *Machine) error {
			agents = m.Agents
			return errors.New("only looking")
		})
		if err == nil || err.Error() != "only looking" {
			t.Fatal(err)
		}
		return agents
	}
	hold(a, "one")
	hold(b, "two")
	if got := held(); len(got) != 2 || string(got[a].ProofKey) != "one" {
		t.Errorf("held by %v", got)
	}
	// Machines of other providers may have the same id.
	if err := s.ForgetMachine(ctx, a, Instance{Provider: "azure", ID: "i-1"}); err != nil {
		t.Error(err)
	}
	for range 2 { // that there is nothing to forget is no error
		if err := s.ForgetMachine(ctx, a, Instance{Provider: "aws", ID: "i-1"}); err != nil {
			t.Error(err)
		}
	}
	if got := held(); len(got) != 1 || string(got[b].ProofKey) != "two" {
		t.Errorf("held by %v", got)
	}
	if err := s.ForgetMachine(ctx, b, Instance{Provider: "aws", ID: "i-1"}); err != nil {
		t.Error(err)
	}
	if found, err := keys(ctx, s, s.identity, ">"); err != nil || len(found) != 0 {
		t.Errorf("left over: %v, %v", found, err)
	}
}

func TestUseOnce(t *testing.T) {
	s := open(t, Options{})
	first := Use{Agent: uuid.New(), ProofKey: []byte("key"), Payload: "p", At: time.Now().UTC().Truncate(time.Second)}
	if _, err := s.UseOnce(t.Context(), "x", first, time.Second); err != nil {
		t.Fatal(err)
	}
	before, err := s.UseOnce(t.Context(), "x", Use{Agent: uuid.New()}, time.Minute)
	if !errors.Is(err, ErrExists) || before.Agent != first.Agent || !before.At.Equal(first.At) {
		t.Errorf("%+v, %v", before, err)
	}
	if _, err := s.UseOnce(t.Context(), "y", first, time.Minute); err != nil {
		t.Errorf("something else: %v", err)
	}
}

func TestExchangedTokensEnd(t *testing.T) {
	s := open(t, Options{TokenLife: time.Hour})
	ctx := t.Context()
	agent := uuid.New()
	token, err := s.MintToken(ctx, agent, true)
	if err != nil {
		t.Fatal(err)
	}
	hash := TokenHash(token)
	left := func() time.Duration {
		t.Helper()
		known, err := s.Token(ctx, token)
		if err != nil {
			t.Fatal(err)
		}
		return time.Until(known.ExpiresAt)
	}
	age := func(by time.Duration) {
		t.Helper()
		if _, err := update(ctx, s, s.tokens, tokenKey(hash), func(t *Token) error {
			t.ExpiresAt = t.ExpiresAt.Add(-by)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if l := left(); l < 50*time.Minute || l > time.Hour {
		t.Errorf("a fresh token lasts %s", l)
	}
	age(20 * time.Minute)
	if _, err := s.RenewToken(ctx, hash); err != nil {
		t.Fatal(err)
	}
	if l := left(); l < 50*time.Minute || l > time.Hour {
		t.Errorf("a renewed token lasts %s", l)
	}
	age(2 * time.Hour)
	for name, look := range map[string]func() error{
		"look":  func() error { _, err := s.Token(ctx, token); return err },
		"renew": func() error { _, err := s.RenewToken(ctx, hash); return err },
	} {
		if err := look(); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if found, err := keys(ctx, s, s.tokens, ">"); err != nil || len(found) != 0 {
		t.Errorf("left over: %v, %v", found, err)
	}
	// What a person makes lasts.
	made, err := s.MintToken(ctx, agent, false)
	if err != nil {
		t.Fatal(err)
	}
	if known, err := s.RenewToken(ctx, TokenHash(made)); err != nil || !known.ExpiresAt.IsZero() {
		t.Errorf("%+v, %v", known, err)
	}
}
