// Package worker runs a relay in a process of its own, nlb relay, and looks
// after it.
//
//	controller (root)                            worker (nobody)
//	 Manager ── Opener ──► dataplane ── Closer     Run
//	    │  binds, keeps copies                       │ relay.Relay accepts
//	    │                                            │
//	    └──── control socket: requests, files ──────►│ keeps copies
//	                                                 │
//	                                                 └─ elders: workers that retire
//
// # Nothing is lost
//
//   - Listening sockets are bound by the controller, which may, and passed over
//     (SCM_RIGHTS). Each side has copies. When the worker dies, its connections
//     are lost; new ones wait in the sockets' queues until the next worker has
//     the sockets. When the controller dies, the worker goes on; the next
//     controller asks it what it serves and gets copies back.
//   - A worker that is started while another one serves takes over: it gets the
//     table and the sockets, serves, puts its control socket in the other's
//     place, and only then tells it to retire. There is a worker at the path at
//     every moment, and one that accepts. One whose successor dies in between
//     serves on and is found by a second name of its socket, the path and its
//     process's number: the next one takes over from it.
//   - A worker that retires finishes its connections until a deadline. It stays
//     under the care of its successor, and of that one's: its connections follow
//     the table, count, and are listed.
//
// # Order
//
// A dataplane that sends clients to the relay needs a socket that is there. So
// there are two Parts, with the dataplane between them: the Opener adds, the
// Closer removes. What the dataplane may still send in between is served as it
// was before.
//
// The dataplane waits for neither for long: a verdict on a target must not depend
// on a process that hangs. Where the controller has all sockets, it goes on without
// an answer.
//
// # Control socket
//
// Requests and answers are frames: 4 bytes of length, then JSON; files come
// with the first byte. Only root and the user that started the worker may
// connect: the socket's mode says so, and the worker asks the kernel who is
// there. The path is never removed by a worker, because it may be the
// successor's; a socket that nobody listens on refuses connections.
//
// # Privileges
//
// The worker becomes another user, nobody, as soon as it listens: no groups, no
// capabilities, and no way to get any (PR_SET_NO_NEW_PRIVS). All it needs comes
// from the controller.
//
// A controller that isn't root can't give a worker less than it has itself, so it
// starts none: a service has to, as the same user (WorkerOptions.Stay). On SIGHUP
// such a worker starts its successor, which tells systemd that it is the service's
// main process now.
package worker
