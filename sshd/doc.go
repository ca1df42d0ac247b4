// Package sshd serves SSH and SFTP on a listener, using ptyhost for terminals.
//
// [HostKey] loads or makes the key of this workspace, [New] checks a [Config], and [Server.Serve] blocks on a listener. One Server may serve
// several listeners at once.
//
// Nobody is asked for a credential: reaching the listener is the authorisation, so it must be one that only the right people reach (a tailnet
// port, never a public address). Sessions run as the user of this process.
//
// A session with a terminal lives in the terminal host and is ended with its channel. A command without one gets pipes and a session (setsid)
// of its own, and is not killed when its channel goes: that is what lets `nohup … &` and editors' servers live on. When a command ends, both of
// its streams are sent whole, then its exit status, then EOF, then the channel is closed.
package sshd
