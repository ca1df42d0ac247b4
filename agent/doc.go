// Package agent assembles a workspace agent and runs it until told to stop.
//
// Fill in a [Config] and call [Run]; [OpenState] gives it the directory that it keeps things in. What runs is a nest of
// stages: the link to the control server, inside it the mesh node, inside that the services that
// people reach, and innermost the workspace's own scripts. Stages start from the outside in, each
// when the one before is ready, and stop in reverse, each within a budget of its own.
//
// A lost link touches nothing but itself: terminals, SSH sessions and mesh peers live on while the
// link is dialled again, for ever.
package agent
