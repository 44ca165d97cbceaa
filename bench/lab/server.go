package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// What a re-executed binary is to be, by its argv[0]: unlike a flag it cannot
// collide with the program's own, unlike a variable it is not inherited.
const (
	enterArg0 = "nlb-lab-enter" // become another program, in a namespace
	agentArg0 = "nlb-lab-agent" // serve requests
)

// MaybeRunAgent does the work of a process that the package started, and then
// does not return. Programs call it before anything else: at the top of main, or
// of TestMain.
func MaybeRunAgent() {
	switch os.Args[0] {
	case enterArg0:
		fmt.Fprintln(os.Stderr, "lab:", enter(os.Args[1:]))
		os.Exit(127) // what a shell says of a command it cannot run
	case agentArg0:
		if err := serveRequests(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "lab: agent:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// Requests that a server knows by itself.
const (
	opCancel = "cancel" // the request with the same id, and what it opened
	opClose  = "close"  // what the request with that id opened
)

// An operation does a request. What it opens, it keeps with s.keep(id, …).
type operation func(ctx context.Context, s *server, id uint64, args json.RawMessage) (any, error)

var operations = map[string]operation{
	opClose:   op((*server).close),
	"serve":   op((*server).serve),
	"call":    op((*server).call),
	"hold":    op((*server).hold),
	"check":   op((*server).check),
	"churn":   op((*server).churn),
	"load":    op((*server).load),
	"stream":  op((*server).stream),
	"scan":    op((*server).scan),
	"capture": op((*server).capture),
	"packets": op((*server).packets),
	"relay":   op((*server).relay),
}

// op adapts a method with typed arguments.
func op[A, R any](f func(*server, context.Context, uint64, A) (R, error)) operation {
	return func(ctx context.Context, s *server, id uint64, raw json.RawMessage) (any, error) {
		var args A
		if err := json.Unmarshal(raw, &args); err != nil {
			return nil, err
		}
		return f(s, ctx, id, args)
	}
}

// A server is the process side of an Agent.
type server struct {
	mu     sync.Mutex
	out    *json.Encoder                 // guarded by mu
	cancel map[uint64]context.CancelFunc // guarded by mu; of the running requests
	open   map[uint64]io.Closer          // guarded by mu; by the id of the request that opened it
}

// serveRequests does the requests that arrive on in, all at the same time, until
// it ends.
func serveRequests(in io.Reader, out io.Writer) error {
	raiseFileLimit()
	s := &server{out: json.NewEncoder(out), cancel: map[uint64]context.CancelFunc{}, open: map[uint64]io.Closer{}}
	for dec := json.NewDecoder(in); ; {
		var r request
		switch err := dec.Decode(&r); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		s.begin(r)
	}
}

func (s *server) begin(r request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.Op != opCancel {
		ctx, cancel := context.WithCancel(context.Background())
		s.cancel[r.ID] = cancel
		go s.do(ctx, r)
		return
	}
	if cancel := s.cancel[r.ID]; cancel != nil {
		cancel()
		return
	}
	// Too late; but nobody has heard of what it opened.
	go s.drop(r.ID)
}

func (s *server) do(ctx context.Context, r request) {
	ans := answer{ID: r.ID}
	f := operations[r.Op]
	if f == nil {
		ans.Err = fmt.Sprintf("%q is not an operation", r.Op)
	} else if result, err := f(ctx, s, r.ID, r.Args); err != nil {
		ans.Err = err.Error()
	} else if ans.Result, err = json.Marshal(result); err != nil {
		ans.Err = err.Error()
	}
	s.mu.Lock()
	cancelled := ctx.Err() != nil
	s.cancel[r.ID]()
	delete(s.cancel, r.ID)
	err := s.out.Encode(ans)
	s.mu.Unlock()
	if err != nil {
		os.Exit(1) // nobody listens any more
	}
	if cancelled {
		_ = s.drop(r.ID)
	}
}

// none is the result of a request that only succeeds or fails.
type none struct{}

func (s *server) keep(id uint64, c io.Closer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open[id] = c
}

// kept finds what request id opened.
func kept[T io.Closer](s *server, id uint64) (T, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t, ok := s.open[id].(T)
	if !ok {
		return t, fmt.Errorf("%d is not open", id)
	}
	return t, nil
}

// drop closes what request id opened, if that is still open.
func (s *server) drop(id uint64) error {
	s.mu.Lock()
	c := s.open[id]
	delete(s.open, id)
	s.mu.Unlock()
	if c == nil {
		return nil
	}
	return c.Close()
}

func (s *server) close(_ context.Context, _ uint64, h handle) (none, error) {
	return none{}, s.drop(h.ID)
}

// raiseFileLimit asks for as many open files as the kernel lets anyone have: a
// scan has thousands of sockets at a time. Without the right to it, the present
// limit bounds the scan's window.
func raiseFileLimit() {
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) != nil {
		return
	}
	want := uint64(1 << 17)
	if lim.Max > want {
		want = lim.Max
	}
	_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: want, Max: want})
}
