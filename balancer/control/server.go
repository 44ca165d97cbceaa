package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"nlb/balancer/events"
	"nlb/balancer/explain"
	"nlb/balancer/ready"
)

// A Daemon is what the socket is the door of. Its methods are called by many
// goroutines at once.
type Daemon interface {
	Status(ctx context.Context) (*Status, error)
	// Explain answers a question by the configuration in force.
	Explain(ctx context.Context, q explain.Question) (*explain.Answer, error)
	// Flows shows all live flows, in no order, until show fails. The Flow is only
	// there for that long.
	Flows(ctx context.Context, show func(*Flow) error) error
	// Events has what happened; see onEvents.
	Events() *events.Ring
	// Health answers /livez and /readyz.
	Health() http.Handler
	// Reload returns when the new configuration is in force, or the reason why
	// the former one still is.
	Reload(ctx context.Context) error
	// Drain deregisters a target, Undrain registers it again. Both return when
	// the kernel follows.
	Drain(ctx context.Context, t TargetName) error
	Undrain(ctx context.Context, t TargetName) error
}

// A TargetName is how an operator names a target.
type TargetName struct {
	Group   string     `json:"target_group"`
	Address netip.Addr `json:"address"`
	// Port may be 0 when the group has one target at the address.
	Port uint16 `json:"port"`
}

// How long answers that are being given may take once the daemon stops.
const farewell = 2 * time.Second

// Serve answers on s until ctx ends, then closes it and returns nil.
func Serve(ctx context.Context, s *Socket, d Daemon, log *zap.Logger) error {
	server := &http.Server{
		Handler:           handler(d),
		ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          zap.NewStdLog(log),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext:       withPeer,
	}
	stopped := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), farewell)
		defer cancel()
		err := server.Shutdown(limit)
		if errors.Is(err, context.DeadlineExceeded) {
			err = server.Close()
		}
		stopped <- err
	})
	err := server.Serve(s) // closes s, and with it the file and the lock
	if stop() {            // ctx is not the cause
		return fmt.Errorf("control socket: %w", err)
	}
	return <-stopped
}

func handler(d Daemon) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+statusPath, func(w http.ResponseWriter, r *http.Request) {
		status, err := d.Status(r.Context())
		if err != nil {
			answer(w, http.StatusInternalServerError, failure{err.Error()})
			return
		}
		answer(w, http.StatusOK, status)
	})
	mux.HandleFunc("GET "+explainPath, onQuestion(d))
	mux.HandleFunc("GET "+flowsPath, onFlows(d))
	mux.HandleFunc("GET "+eventsPath, onEvents(d.Events()))
	mux.Handle("GET "+ready.LivePath, d.Health())
	mux.Handle("GET "+ready.ReadyPath, d.Health())
	mux.Handle("POST "+reloadPath, changing(func(w http.ResponseWriter, r *http.Request) {
		report(w, d.Reload(r.Context()))
	}))
	mux.Handle("POST "+drainPath, changing(onTarget(d.Drain)))
	mux.Handle("POST "+undrainPath, changing(onTarget(d.Undrain)))
	return mux
}

// onTarget does something with the target that the request names.
func onTarget(do func(context.Context, TargetName) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var t TargetName
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest)).Decode(&t); err != nil {
			answer(w, http.StatusBadRequest, failure{"which target is meant cannot be told: " + err.Error()})
			return
		}
		report(w, do(r.Context(), t))
	}
}

// maxRequest is many times what a target's name takes.
const maxRequest = 4 << 10

// report says what came of a change.
func report(w http.ResponseWriter, err error) {
	if err != nil {
		answer(w, http.StatusUnprocessableEntity, failure{err.Error()})
		return
	}
	answer(w, http.StatusOK, struct{}{})
}

// changing lets root and the daemon's own user pass.
func changing(next http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		uid, err := peer(r.Context())
		switch {
		case err != nil:
			answer(w, http.StatusForbidden, failure{"who asks cannot be told: " + err.Error()})
		case uid != 0 && uid != uint32(os.Geteuid()):
			answer(w, http.StatusForbidden, failure{fmt.Sprintf("user %d may look but not change; ask as root or as user %d", uid, os.Geteuid())})
		default:
			next(w, r)
		}
	})
}

type failure struct {
	Error string `json:"error"`
}

func answer(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body) // the client is gone: nobody to tell
}

// A peerKey finds, in a request's context, who is at the other end.
type peerKey struct{}

type peerResult struct {
	uid uint32
	err error
}

func withPeer(ctx context.Context, c net.Conn) context.Context {
	uid, err := peerUID(c)
	return context.WithValue(ctx, peerKey{}, peerResult{uid, err})
}

func peer(ctx context.Context) (uint32, error) {
	p, ok := ctx.Value(peerKey{}).(peerResult)
	if !ok {
		return 0, errors.New("the request came over no socket")
	}
	return p.uid, p.err
}

// peerUID is the user who connected, as the kernel recorded it at connect(2).
func peerUID(c net.Conn) (uint32, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("%T is not a Unix socket", c)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, err
	}
	var (
		cred   *unix.Ucred
		failed error
	)
	err = raw.Control(func(fd uintptr) {
		cred, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, failed); err != nil {
		return 0, fmt.Errorf("SO_PEERCRED: %w", err)
	}
	return cred.Uid, nil
}
