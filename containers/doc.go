// Package containers lists the containers running beside the agent, over every engine socket it can reach.
//
// [New] makes a [Lister] and [Lister.List] asks every engine at once, each within its own deadline. The engines are looked for anew at each list, so
// one that is installed or started later is found.
//
// An engine is asked with GET requests for its version and its list of containers, and nothing else: whoever may talk to an engine's socket owns the
// machine, so nothing that comes from a person or a peer is ever passed on to one.
package containers
