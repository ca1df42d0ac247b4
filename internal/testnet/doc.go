// Package testnet stands in for the outside world, so that a test or `berth up` needs none of it.
//
// [NewFakeAWS] makes a machine's metadata service as on EC2; it is an http.Handler for a test and
// [FakeAWS.Serve] runs it on a listener. [AWSSigner], [AzureSigner] and [GoogleSigner] sign what the
// metadata services of the three clouds hand out, in the exact shape of the real documents but with
// keys of their own.
package testnet
