// Package control is the daemon's door: HTTP with JSON bodies over a Unix
// socket.
//
//	GET  /v1/status   what the daemon does; whoever may connect may ask
//	GET  /v1/explain  what would become of a flow; whoever may connect may ask
//	GET  /v1/flows    live flows, one JSON object a line; likewise
//	GET  /v1/events   what happened, one JSON object a line; likewise
//	GET  /livez       whether the daemon is alive, and
//	GET  /readyz      whether it does its work; see balancer/ready; likewise
//	POST /v1/reload   read the file again; root and the daemon's own user only
//
// Who may connect is the socket's mode, 0660. Who may change something is
// decided by the peer's credentials (SO_PEERCRED, unix(7)), so that a group can
// be let in to look without being able to touch.
//
// An error's body is {"error": "…"}.
package control

// DefaultSocket is where the daemon listens.
const DefaultSocket = "/run/nlb/nlb.sock"

const (
	statusPath  = "/v1/status"
	explainPath = "/v1/explain"
	flowsPath   = "/v1/flows"
	eventsPath  = "/v1/events"
	reloadPath  = "/v1/reload"
	drainPath   = "/v1/drain"
	undrainPath = "/v1/undrain"
)
