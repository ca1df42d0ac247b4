// Package reporter delivers what happens in a workspace to its control server: log lines, lifecycle
// states, metadata, app health and status, script timings, connections and resource usage.
//
// [Open] a [Reporter], hand things to it at any time ([Reporter.Writer] for logs), and run
// [Reporter.Deliver] whenever a link to the server is up. Handing over never waits for the server.
//
// Log lines go through a spool on disk, so that an outage, a restart or a crash of the process
// costs none. A line's way:
//
//	Writer    cuts lines, cleans bytes
//	spool     numbers the line within its source, appends it to a segment file by write(2)
//	Deliver   sends batches that carry the spool's id and the first line's number
//	server    stores what it does not have yet, so that resending is harmless
//	state     the position up to which the server has answered, written after each answer
//
// The writer's call returns when the kernel has the line: killing the process loses nothing. Files
// are fsynced within [SyncInterval] of being written, so a machine that loses power loses at most
// the lines of that interval. Past its bound the spool drops from the middle, keeps the first and
// the last lines, and puts one line in the gap that tells how many are missing.
//
// Everything else waits in order where each report matters, and only the newest where only the newest
// matters. Lifecycle states, app statuses, script timings and connections are in a file of their kind before
// the call that reports them returns, and leave it when the server has them: killing the process costs none of
// them. What is observed anew anyway (app health, metadata, resource usage) is kept in memory.
package reporter
