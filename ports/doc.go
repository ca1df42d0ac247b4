// Package ports lists the ports listening on this machine and in its containers.
//
// A [Lister] lists them, and tells of changes to those who watch.
//
// Sockets come from the kernel's socket diagnosis over netlink, which costs what there are listeners and not what there are connections; where it is
// not allowed, from /proc/net. Who owns a socket is found by walking the descriptors of every process that may be read, once: the next scan only
// looks for sockets it has not seen. A port is never left out because its owner cannot be read.
package ports
