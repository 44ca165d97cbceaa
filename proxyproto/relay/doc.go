// Package relay is the data path of the mode proxy_protocol_v2: it ends a
// client's TCP connection at the VIP, opens another to the target that the
// kernel modes would have chosen, sends one PROXY v2 header first, and moves
// bytes both ways.
//
// # Parts
//
//	balancer.Table ──compile──► plan (immutable: services, pools, slots)
//	                              │ Configure
//	            ┌─────────────────┼──────────────────┐
//	          loop              loop               loop     one per core, one thread each
//	            │ events, accepted fds
//	          machine ──wheel, buffers, pipes        decides; knows no kernel
//	            │ kernel (an interface)
//	          sockets                                raw system calls
//
// Both ends of a connection belong to one loop, so that a machine needs no
// locks of its own; the loop's mutex is free whenever its thread waits for
// events, and whoever else wants to look takes it then.
//
// # A connection
//
//	        accepted
//	           │  choose, dial
//	           ▼     refused, unreachable, no answer: next target, 3 at most
//	     ┌─ dialing ─┐ ◄─┘
//	     │     │ connected
//	     │     ▼
//	     ├─ listening     10 ms at most, for the client's first bytes, unless the
//	     │     │          target's clients are known to hear from it first
//	     │     ▼ the header, in one segment with them
//	     ├─ greeting      only while the header does not fit the socket
//	     │     │
//	     │     ▼
//	     ├── open         two directions, each on its own:
//	     │     │
//	     │     │            flowing ◄──► blocked     the receiver is slow: reading stops
//	     │     │               │ FIN       │ FIN
//	     │     │               ▼           ▼
//	     │     │              ended ◄──────┘         what is held goes out first
//	     │     │               │ shutdown(2)
//	     │     │               ▼
//	     │     │              shut
//	     │     │ both shut
//	     ▼     ▼
//	   closed ◄┘
//	reset: a RST from either end, a failed write, the idle timeout, the last
//	target that failed, a target that is being terminated: both ends get a RST
//
// # Bytes
//
// A direction first copies through one buffer that the whole loop shares: a
// short connection needs no memory of its own. What the receiver did not take
// is moved to a buffer from a pool and nothing more is read until it is gone, so
// a direction holds bufferSize bytes at most, or what a pipe does. A direction that has carried
// spliceAfter bytes in large pieces goes on with splice(2) through a pipe from a
// pool, which it gives back whenever the pipe is empty: an idle connection holds
// its two sockets and nothing else.
//
// # Events
//
// Sockets are watched edge-triggered for everything, once: an event sets flags,
// and the flags stay set until a call says that there is no more. All events of
// a batch are noted before any connection runs, so that a request that came
// with the target's SYN, ACK travels in one segment with the header.
package relay
