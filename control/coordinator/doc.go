// Package coordinator introduces the nodes of the private network to each other: who may talk to
// whom, with which keys and at which addresses.
//
// [New] makes a [Coordinator]; [Coordinator.Run] keeps it in step with the other replicas of the
// control server. Each coordination stream is then given to [Coordinator.Serve] with the [Peer] it
// was authenticated as; [Coordinator.Connect] is the same for a node inside this process.
//
// # Peers and tunnels
//
// A peer publishes its node; a tunnel from a source to a destination lets the two learn each
// other's node. Tunnels belong to their source and outlive their destination, so that an agent
// that reconnects meets the clients that wait for it. Nothing that a peer says about itself is
// trusted: its id comes from authentication, and the addresses it may announce follow from that id
// or must be nobody else's (see [Auth]).
//
// # Replicas
//
// Every replica holds the whole state and serves its own streams. A peer is owned by the replica
// that has its stream; the owner says on a NATS subject what happens to it, in order and numbered,
// and everyone, the owner included, applies the same events with the same code. A gap in the
// numbers or a new replica is answered by a restatement of all that one replica owns, after which
// the others drop what was not restated. A replica that falls silent loses its peers. Whoever can
// publish on the subject is trusted as much as the control server itself.
package coordinator
