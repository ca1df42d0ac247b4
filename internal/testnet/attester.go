package testnet

import "github.com/berthd/berth/identity/attest"

// Attester returns what a control server that shall believe this fake checks documents with. It
// believes AWS itself too.
func (f *FakeAWS) Attester() (*attest.AWS, error) { return attest.NewAWS(f.Certificates()...) }
