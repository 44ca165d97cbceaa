package counting

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"nlb/bench/measure"
)

// tcpLoad makes connections, one after the other: connect, a request, an answer,
// and FINs, the client's first. Each has a port of its own.
//
// What a connection leaves is freed when all processors have passed through a
// quiet state (RCU): some ticks later, and then in bulk. That work is the two
// ends' and the same in every way, but it is a tenth of the whole and comes in
// lumps, by which two counts differed by 5 %. So it isn't counted: a batch begins
// after a pause, and is over before the next tick or the one after it.
type tcpLoad struct {
	site    *site
	next    int // port
	message []byte
}

func newTCPLoad(s *site) (load, error) {
	return &tcpLoad{site: s, next: firstFlow, message: make([]byte, measure.FramePayload)}, nil
}

func (*tcpLoad) close() {}

// quiet is how long it takes until nothing is left to be freed, by the guest's
// clock: some ticks of 4 ms.
const quiet = 50 * time.Millisecond

func (*tcpLoad) pause() { time.Sleep(quiet) }

func (l *tcpLoad) prepare() error {
	if l.next++; l.next > lastFlow {
		return errors.New("no ports left for connections")
	}
	return nil
}

// run is called in the client's namespace.
func (l *tcpLoad) run() (connections int, err error) {
	if err := l.connection(); err != nil {
		return 0, fmt.Errorf("TCP connection from port %d: %w", l.next, err)
	}
	return 1, nil
}

func (l *tcpLoad) connection() error {
	client, err := measure.Bind(unix.SOCK_STREAM, l.site.Clients[0].Addr4, l.next)
	if err != nil {
		return err
	}
	target := -1
	defer func() {
		_ = unix.Close(client)
		if target >= 0 {
			_ = unix.Close(target)
		}
	}()
	to := l.site.address(l.next)
	if err := unix.Connect(client, &to); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return os.NewSyscallError("connect", err)
	}
	// A connection can be accepted when both sides have it.
	i, err := measure.FirstReadable(measure.Readable(l.site.sockets.TCP...))
	if err != nil {
		return fmt.Errorf("accept: %w", err)
	}
	if target, _, err = unix.Accept4(l.site.sockets.TCP[i], unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC); err != nil {
		return os.NewSyscallError("accept4", err)
	}
	if err := measure.Pass(client, target, l.message); err != nil {
		return fmt.Errorf("request: %w", err)
	}
	if err := measure.Pass(target, client, l.message); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	return nil
}
