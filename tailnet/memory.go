package tailnet

// MemoryLimit is the soft limit of memory, in bytes, that a process with a node
// in it does well to set (runtime/debug.SetMemoryLimit), unless GOMEMLIMIT says
// otherwise. The library takes 64 KiB for each packet in flight and leaves it to
// the collector to get them back: without a limit a transfer at full speed takes
// over 500 MB of memory; with this one it stays under 120 MB, and what it costs in
// speed is less than two runs differ. bench/daemon and bench/mesh measure it.
const MemoryLimit = 128 << 20
