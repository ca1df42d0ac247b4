// Package wire defines what crosses the network: names, limits, addresses, frames and JSON bodies
// of the agent API v2, and nothing else. The protobuf messages are in wire/agentpb and
// wire/tailnetpb, the transport that carries them in wire/rpc.
//
// Start with [AgentAddr], which tells where on the mesh an agent is, and [ReadPTYInit], the first
// frame of a terminal. Everything here is data: no goroutine, no I/O beyond the reader given.
package wire

//go:generate go run -C ../internal/protogen . ../..
