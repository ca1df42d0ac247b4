// Package containers lists the containers running beside the agent, over every engine socket it can reach.
//
// [New] makes a [Lister], which is run by [Lister.Run]. While anybody asks, it follows every engine by the engine's own events, and [Lister.List],
// [Lister.Find] and [Lister.Known] answer from memory. Engines that come, go, hang or start again are noticed.
//
// [Start] runs a command in a container as `docker exec` does, and [Process] carries its streams, its size and its signals.
//
// Whoever may talk to an engine's socket owns the machine. So an engine is asked for what is on two short lists of requests and for nothing else: GETs for
// the lister, and besides what an exec takes. No request passes on what a person or a peer has written, but for an exec's command, user and environment,
// and no path has a name in it that a person chose.
package containers
