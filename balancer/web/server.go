// Package web serves the daemon's HTTP: what is read of it, never what changes it.
package web

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"go.uber.org/zap"
	"golang.org/x/net/netutil"
)

const (
	// headerWithin bounds the wait for a request's header, requestWithin that for
	// all of it, and answerWithin the time from there until the answer has been
	// taken: a reader that is slow, or hostile, holds a connection no longer. A
	// handler that streams sets a deadline of its own (http.ResponseController).
	headerWithin  = 5 * time.Second
	requestWithin = 10 * time.Second
	answerWithin  = 30 * time.Second
	// idleFor is longer than Prometheus' default of a minute between two scrapes,
	// so that it need not connect anew for each.
	idleFor = 2 * time.Minute
	// farewell is how long answers under way may take once the daemon stops.
	farewell = 2 * time.Second
	// maxConnections leaves the daemon's descriptors to its work. Further ones wait.
	maxConnections = 128
	maxHeader      = 16 << 10

	// The pause before the next attempt to listen doubles from firstPause to lastPause.
	firstPause = 250 * time.Millisecond
	lastPause  = 10 * time.Second
)

// A Server answers HTTP requests on one address.
//
// It never takes the daemon along: where other servers refuse to start when their
// port is taken, it logs the error and tries again until the port is free. What
// the daemon is for is to forward, and whether anybody watches is no reason to stop.
type Server struct {
	address string
	handler http.Handler
	log     *zap.Logger
	listen  func(context.Context) (net.Listener, error) // replaced in tests
}

// NewServer returns a Server for address, which is host:port as net.Listen takes
// it; with "" there is nothing to serve. It does nothing before Run.
func NewServer(address string, handler http.Handler, log *zap.Logger) *Server {
	return &Server{
		address: address, handler: handler, log: log,
		listen: func(ctx context.Context) (net.Listener, error) {
			var c net.ListenConfig
			return c.Listen(ctx, "tcp", address)
		},
	}
}

// Run serves until ctx ends, closes all that it opened, and returns nil. What
// keeps it from serving is logged, once for each reason in a row, and tried again
// after a growing pause of 10 seconds at most.
func (s *Server) Run(ctx context.Context) error {
	if s.address == "" {
		return nil
	}
	said, pause := "", firstPause
	for {
		l, err := s.listen(ctx)
		if err == nil {
			said, pause = "", firstPause
			s.log.Info("http is served", zap.Stringer("address", l.Addr()))
			err = s.serve(ctx, l)
		}
		if ctx.Err() != nil {
			return nil
		}
		if err.Error() != said {
			said = err.Error()
			s.log.Error("http is not served, forwarding goes on; trying again", zap.String("address", s.address), zap.Error(err))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		pause = min(2*pause, lastPause)
	}
}

// serve answers on l until ctx ends or l fails, and closes it.
func (s *Server) serve(ctx context.Context, l net.Listener) error {
	errorLog, err := zap.NewStdLogAt(s.log, zap.WarnLevel)
	if err != nil {
		return errors.Join(fmt.Errorf("log of the HTTP server: %w", err), l.Close())
	}
	server := &http.Server{
		Handler:           s.handler,
		ReadHeaderTimeout: headerWithin,
		ReadTimeout:       requestWithin,
		WriteTimeout:      answerWithin,
		IdleTimeout:       idleFor,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          errorLog,
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), farewell)
		defer cancel()
		if server.Shutdown(limit) != nil {
			_ = server.Close()
		}
	})
	err = server.Serve(netutil.LimitListener(l, maxConnections))
	if stop() { // ctx is not the cause
		return errors.Join(err, server.Close())
	}
	<-stopped
	return err
}
