// Package testnet stands in for the outside world, so that a test or `berth up` needs none of it.
//
// [FakeAWS], [FakeAzure] and [FakeGoogle] are the metadata services of a machine in each of the three
// clouds, and [FakeAIA] serves certificates of issuers; all are http.Handlers for a test, and [Serve]
// runs one on a listener. [AWSSigner], [AzureSigner] and [GoogleSigner] sign what the metadata
// services hand out, in the exact shape of the real documents but with keys of their own.
package testnet
