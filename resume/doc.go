// Package resume carries a byte stream over connections that come and go.
//
// [Listen] makes a listener whose connections outlive those below it, and [Client.Open] the other end. Both ends
// number the bytes of each direction and keep those that the other has not taken yet, so that a connection that broke
// is replaced by another and the stream goes on where it was, within the time that the listening side grants. Who uses
// the stream sees a [Conn], a [net.Conn] with half-close, that is slow for a while.
//
// # The protocol
//
// All numbers are big-endian. On each connection the client sends first, and once:
//
//	magic     8 bytes, "berth-r1"
//	session  16 bytes, zero to open a new one
//	received  8 bytes, how much of the other side's stream has arrived
//
// The listening side answers, once:
//
//	magic     8 bytes
//	verdict   1 byte: 0 go on, 1 there is no such session, 2 there is no room for another
//	session  16 bytes, 128 bits that nobody can guess
//	received  8 bytes
//	window    4 bytes, how many bytes of each direction may be on the way: sent and not taken
//	patience  4 bytes, for how many seconds a session without a connection is kept
//
// Then both send frames, which begin with one byte:
//
//	'd' data  4 bytes of length, at most [maxData], and that many bytes
//	'e' end   the end of this direction; it counts as one byte of the stream
//	'a' ack   8 bytes, how much of the other direction has been taken by whom it is for
//	'q' ask   as ack, and wants an ack in answer
//
// What is sent on a new connection begins at the other side's received. A side that breaks these rules loses its connection;
// one that claims to have received what was never sent, or sends more than the window, cannot be gone on with.
// A session is over when both directions have ended and both ends have been taken. The client asks every few seconds;
// the listening side gives a connection up that has been silent for [maxSilence].
package resume
