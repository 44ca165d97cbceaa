package relay

import (
	"math/rand/v2"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"nlb/proxyproto"
)

const (
	// dialTimeout is how long one target may take to answer. That is two SYNs:
	// the kernel repeats the first one after a second (RFC 6298, section 2.1).
	dialTimeout = 2 * time.Second
	// spliceAfter is how many bytes a direction carries in large pieces before
	// it is worth a pipe; largePiece is what is large. A splice costs two more
	// system calls than a copy, which is the cheaper one below a few KiB.
	spliceAfter = 128 << 10
	largePiece  = 4 << 10
	// patience is how long the header waits for the client's first bytes, where
	// clients speak first: together they are one segment, which spares both ends a
	// wake-up, and receivers that read header and request at once see both.
	patience = 10 * time.Millisecond
	// neverLarge keeps a direction from splicing.
	neverLarge = -1 << 31
	// turnBytes is how many bytes a direction may move before others have their
	// turn.
	turnBytes = 512 << 10
)

// A machine moves connections through their states. It calls a kernel, is told
// of events, and knows no time but what it is told: nothing in it waits. It is
// used by one goroutine at a time.
type machine struct {
	kernel kernel
	plan   *plan
	now    int64 // nanoseconds since some moment
	number int   // the loop's, for the tallies
	// left is called when a connection was closed, or refused at once.
	left func()

	conns []*conn // by index
	free  []*conn
	dead  []*conn // closed in this turn: an old event, or the queue, may name them
	queue []*conn
	wheel wheel
	// patient has the connections that began to listen, the first one first.
	patient []listener
	rotate  uint // through the sources
	random  *rand.ChaCha8
	counts  counts

	buffers buffers
	pipes   pipes
	// buf is where everything is read to, and headers are written.
	buf [bufferSize]byte
}

// A listener is a connection that listened from then on.
type listener struct {
	conn       *conn
	generation int32
	since      int64
}

// counts are events of one loop, as Stats has them of all.
type counts struct {
	accepted, refused, failed, exhausted, noTarget, idle, noPort uint64
}

// size is how many connections there are.
func (m *machine) size() int { return len(m.conns) - len(m.free) - len(m.dead) }

// --- turns -----------------------------------------------------------------

// note takes in an event. Nothing is done about it before run.
func (m *machine) note(t token, events uint32) {
	c := m.conns[t.id>>1]
	if c.generation != t.generation || c.state == closed {
		return
	}
	s := &c.client
	if t.id&1 == 1 {
		s = &c.target
	}
	const problem = unix.EPOLLERR | unix.EPOLLHUP
	s.readable = s.readable || events&(unix.EPOLLIN|unix.EPOLLRDHUP|problem) != 0
	s.writable = s.writable || events&(unix.EPOLLOUT|problem) != 0
	s.hungUp = s.hungUp || events&unix.EPOLLRDHUP != 0
	// An established socket also hangs up when both directions ended in peace.
	s.failed = s.failed || events&unix.EPOLLERR != 0 || events&unix.EPOLLHUP != 0 && c.state == dialing
	if events&unix.EPOLLPRI != 0 && !s.urgent {
		// From here on reads stop at the urgent byte, so that a short one does not
		// mean that there is no more; and splice(2) stops there for good.
		s.urgent = true
		m.kernel.inline(s.fd)
	}
	m.enqueue(c)
}

func (m *machine) enqueue(c *conn) {
	if !c.queued {
		c.queued = true
		m.queue = append(m.queue, c)
	}
}

// turn lets every connection do what it can that was noted, or was left undone
// in the turn before, and then what is due at the moment now. It reports whether
// there is more to do at once.
func (m *machine) turn(now int64) (more bool) {
	m.now = now
	count := len(m.queue)
	for i := range count {
		c := m.queue[i]
		c.queued = false
		m.step(c)
	}
	m.queue = m.queue[:copy(m.queue, m.queue[count:])]
	// Last, because an event that was noted is about the target that was dialed
	// at the time, and a timer may dial another.
	m.wheel.advance(now, m.expire)
	m.losePatience()
	m.recycle()
	return len(m.queue) > 0
}

func (m *machine) step(c *conn) {
	switch c.state {
	case dialing:
		m.awaitTarget(c)
	case listening:
		m.listen(c)
	case greeting:
		m.goOnGreeting(c)
	case open:
		m.relay(c)
	}
}

// recycle makes closed connections usable again.
func (m *machine) recycle() {
	kept := m.dead[:0]
	for _, c := range m.dead {
		if c.queued {
			kept = append(kept, c)
			continue
		}
		m.free = append(m.free, c)
	}
	m.dead = kept
}

// expire is when a connection's timer fired. Both of its timeouts are far longer
// than a tick, so it is not rearmed while it is busy, but looked at when it may
// be due.
func (m *machine) expire(c *conn) {
	due := c.active + int64(c.service.idle)
	if c.state == dialing {
		due = c.deadline
	}
	switch {
	case m.now < due:
		m.wheel.set(c, due)
	case c.state == dialing:
		m.failedDial(c, unix.ETIMEDOUT)
	default:
		m.counts.idle++
		m.reset(c)
	}
}

// --- beginning -----------------------------------------------------------------

// start takes over the socket of a client that was accepted.
func (m *machine) start(fd int32, peer netip.AddrPort, s *service) {
	m.counts.accepted++
	if !s.allows(peer.Addr()) {
		m.counts.refused++
		m.turnAway(fd)
		return
	}
	in, to := s.choose(peer)
	if in == nil || in.family(s.vip.Addr()).usable == 0 {
		m.counts.noTarget++
		m.turnAway(fd)
		return
	}
	c := m.open()
	c.peer, c.service, c.pool, c.aim = peer, s, in, to
	c.client.fd, c.since = fd, m.now
	if err := m.kernel.watch(fd, c.token(0)); err != 0 {
		m.counts.exhausted++
		m.reset(c)
		return
	}
	m.dialNext(c)
}

func (m *machine) turnAway(fd int32) {
	m.kernel.reset(fd)
	m.left()
}

func (m *machine) open() *conn {
	var c *conn
	if n := len(m.free); n > 0 {
		c, m.free = m.free[n-1], m.free[:n-1]
		*c = conn{index: c.index, generation: c.generation}
	} else {
		c = &conn{index: int32(len(m.conns))}
		m.conns = append(m.conns, c)
	}
	c.state = dialing
	c.client.fd, c.target.fd = -1, -1
	return c
}

// token names an end: 0 is the client's, 1 the target's.
func (c *conn) token(end int32) token { return token{id: c.index<<1 | end, generation: c.generation} }

// --- dialing -----------------------------------------------------------------

// dialNext begins to connect to the next target. Without one the client is
// reset.
func (m *machine) dialNext(c *conn) {
	for c.tries < maxTries {
		d := c.pool.family(c.service.vip.Addr()).next(c.aim, c.tried[:c.tries])
		if d == nil {
			break
		}
		c.tried[c.tries] = d.target
		c.tries++
		c.tally = &d.target.tallies[m.number]
		c.tally.active++
		c.tally.dialed++
		err := m.dial(c, d)
		if err == 0 {
			c.active, c.deadline = m.now, m.now+int64(dialTimeout)
			m.wheel.set(c, c.deadline)
			return
		}
		m.countFailure(c, err)
		if outOfResources(err) {
			m.counts.exhausted++
			m.reset(c)
			return
		}
		m.leaveTarget(c)
	}
	m.counts.failed++
	m.reset(c)
}

// dial tries the sources in turn until one has a free port.
func (m *machine) dial(c *conn, d *destination) (err unix.Errno) {
	to := d.target.key.AddrPort
	sources := m.plan.sources[familyOf(to.Addr())]
	for range max(1, len(sources)) {
		source := d.source
		if len(sources) > 0 {
			source = sources[m.rotate%uint(len(sources))]
			m.rotate++
		}
		c.target = socket{}
		c.target.fd, err = m.kernel.dial(to, source, c.token(1))
		if err == 0 {
			return 0
		}
		c.target.fd = -1
		if err != unix.EADDRNOTAVAIL {
			break
		}
	}
	return err
}

func outOfResources(err unix.Errno) bool {
	switch err {
	case unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.ENOSPC:
		return true
	}
	return false
}

// countFailure says whose failure it was that a dial came to nothing: the
// target's, unless the lack is on this host.
func (m *machine) countFailure(c *conn, err unix.Errno) {
	switch {
	case err == unix.EADDRNOTAVAIL:
		m.counts.noPort++
	case !outOfResources(err):
		c.tally.failed++
	}
}

// leaveTarget ends a dial that failed, not the connection.
func (m *machine) leaveTarget(c *conn) {
	c.tally.active--
	c.tally = nil
	if c.target.fd >= 0 {
		m.kernel.close(c.target.fd)
	}
	c.target = socket{fd: -1}
}

func (m *machine) failedDial(c *conn, err unix.Errno) {
	m.countFailure(c, err)
	m.leaveTarget(c)
	m.dialNext(c)
}

// awaitTarget looks whether the target answered.
func (m *machine) awaitTarget(c *conn) {
	switch {
	case c.client.failed:
		m.reset(c) // gone, while nothing was read from it
	case c.withdrawn:
		c.withdrawn = false
		m.leaveTarget(c)
		c.tries--
		m.dialNext(c)
	case c.target.failed:
		err := m.kernel.outcome(c.target.fd)
		if err == 0 {
			err = unix.ECONNRESET
		}
		m.failedDial(c, err)
	case c.target.writable:
		c.tally.answered++
		c.active = m.now
		c.state = listening
		m.listen(c)
	}
}

// --- listening -----------------------------------------------------------------

// listen waits for the client's first bytes, but not for long, nor at all where
// servers speak first. A client that failed is readable: it may have said
// something before.
func (m *machine) listen(c *conn) {
	switch {
	case c.target.failed:
		m.reset(c)
	case c.client.readable || c.target.readable || m.manners(c).serverFirst > 0:
		m.greet(c)
	case !c.patient:
		c.patient = true
		m.patient = append(m.patient, listener{c, c.generation, m.now})
	}
}

func (m *machine) manners(c *conn) *manners { return &c.pool.manners[m.number] }

// losePatience greets the targets of clients that have been silent for too long.
func (m *machine) losePatience() {
	done := 0
	for _, l := range m.patient {
		if m.now < l.since+int64(patience) {
			break
		}
		done++
		if l.conn.generation == l.generation && l.conn.state == listening {
			m.greet(l.conn)
		}
	}
	m.patient = m.patient[:copy(m.patient, m.patient[done:])]
}

// wait is how long nothing is due, 0 when there is nothing to wait for.
func (m *machine) wait() time.Duration {
	switch {
	case len(m.patient) > 0:
		return max(time.Millisecond, time.Duration(m.patient[0].since-m.now)+patience)
	case m.wheel.armed > 0:
		return tick
	}
	return 0
}

// --- greeting ------------------------------------------------------------------

// greet sends the header, in one segment with what the client said so far.
func (m *machine) greet(c *conn) {
	c.unheard = true
	out := proxyproto.AppendHeader(m.buf[:0], c.peer, c.service.vip, m.headerOptions(c.pool))
	c.state = greeting
	if c.client.readable {
		n, ok := m.receive(c, &c.up, &c.client, m.buf[len(out):])
		if !ok {
			return
		}
		c.first = int32(n)
		out = out[:len(out)+n]
	}
	if !m.send(c, &c.up, &c.target, out) {
		return
	}
	m.kernel.acknowledge(c.target.fd)
	m.endGreeting(c)
}

func (m *machine) goOnGreeting(c *conn) {
	if c.target.writable && !m.flush(c, &c.up, &c.target) {
		return
	}
	m.endGreeting(c)
}

// endGreeting goes on to relay once the header is out, whatever became of the
// client's bytes behind it: the target may want to speak before it reads them.
func (m *machine) endGreeting(c *conn) {
	if h := c.up.held; h != nil && h.end-h.start > int(c.first) {
		m.checkFailed(c)
		return
	}
	c.state = open
	m.relay(c)
}

func (m *machine) headerOptions(p *pool) (o proxyproto.Options) {
	o.CRC32C = p.header.CRC32C
	if p.header.UniqueID {
		o.HasUniqueID = true
		_, _ = m.random.Read(o.UniqueID[:])       // never fails
		o.UniqueID[6] = o.UniqueID[6]&0x0f | 0x40 // version 4 and variant, RFC 9562, section 5.4
		o.UniqueID[8] = o.UniqueID[8]&0x3f | 0x80
	}
	return o
}

// --- relaying --------------------------------------------------------------------

// relay does all that both directions can do.
func (m *machine) relay(c *conn) {
	more := m.pump(c, &c.up, &c.client, &c.target)
	if c.state == open {
		more = m.pump(c, &c.down, &c.target, &c.client) || more
	}
	switch {
	case c.state != open:
	case more:
		m.enqueue(c)
	default:
		m.checkFailed(c)
	}
}

// checkFailed resets a connection of which an end failed. What that end sent
// before was passed on, as far as the other end took it.
func (m *machine) checkFailed(c *conn) {
	if c.state != closed && (c.client.failed || c.target.failed) {
		m.reset(c)
	}
}

// pump moves bytes in one direction until it is blocked, dry, ended or has had
// its turn, and reports whether it is the latter. The connection may be closed
// when it returns.
func (m *machine) pump(c *conn, d *direction, from, to *socket) (more bool) {
	for begun := d.moved; d.moved-begun < turnBytes; {
		if d.holds() && (!to.writable || !m.flush(c, d, to) || d.holds()) {
			return false
		}
		switch d.course {
		case ended:
			m.end(c, d, to)
			return false
		case shut:
			return false
		case blocked:
			d.course = flowing
		}
		if !from.readable || !to.writable || !m.move(c, d, from, to) {
			return false
		}
	}
	return true
}

// move takes one piece from one end to the other. It returns false when the
// connection was closed.
func (m *machine) move(c *conn, d *direction, from, to *socket) bool {
	if d.large >= spliceAfter && !from.urgent {
		if d.pipe == nil {
			d.pipe = m.pipes.take(m.kernel)
		}
		if d.pipe != nil {
			return m.splice(c, d, from, to)
		}
		d.large = 0 // ask for a pipe again some time later
	}
	m.releasePipe(d) // which is empty: it may be here that urgent bytes came
	n, ok := m.receive(c, d, from, m.buf[:])
	if !ok || n == 0 {
		return ok
	}
	d.size(n)
	return m.send(c, d, to, m.buf[:n])
}

// size takes in how large a piece was. Small ones are answers and questions,
// which copying serves better.
func (d *direction) size(n int) {
	switch {
	case d.large < 0:
	case n < largePiece:
		d.large = 0
	case d.large < spliceAfter:
		d.large += int32(n)
	}
}

// receive reads from one end. It returns false when that end failed and the
// connection was closed.
func (m *machine) receive(c *conn, d *direction, from *socket, p []byte) (int, bool) {
	n, err := m.kernel.read(from.fd, p)
	switch {
	case err == unix.EAGAIN:
		from.readable = false
		return 0, true
	case err != 0:
		m.reset(c)
		return 0, false
	case n == 0:
		d.course = ended
		return 0, true
	case n < len(p) && !from.urgent && !from.failed:
		// That was all, epoll(7) says, and if a FIN was there before, it was all
		// there will ever be. This spares a call that would say so.
		from.readable = false
		if from.hungUp {
			d.course = ended
		}
	}
	m.moved(c, d, n)
	return n, true
}

func (m *machine) moved(c *conn, d *direction, n int) {
	d.moved += uint64(n)
	c.tally.bytes += uint64(n)
	c.active = m.now
	if c.unheard {
		c.unheard = false
		m.manners(c).heard(d == &c.down)
	}
}

// send writes bytes of which nothing is held yet, and holds what the socket does
// not take. It returns false when the connection was closed.
func (m *machine) send(c *conn, d *direction, to *socket, p []byte) bool {
	n, err := m.kernel.write(to.fd, p)
	if err != 0 && err != unix.EAGAIN {
		m.reset(c)
		return false
	}
	if n < len(p) {
		d.held = m.buffers.hold(p[n:])
		d.block(to)
	}
	return true
}

func (d *direction) block(to *socket) {
	to.writable = false
	if d.course == flowing {
		d.course = blocked
	}
}

// splice moves one piece through the direction's pipe, which is empty. It
// returns false when the connection was closed.
func (m *machine) splice(c *conn, d *direction, from, to *socket) bool {
	n, err := m.kernel.splice(from.fd, d.pipe.w, d.pipe.size)
	switch {
	case err == unix.EAGAIN:
		from.readable = false
		m.releasePipe(d)
	case err == unix.EINVAL:
		d.large = neverLarge
		m.releasePipe(d)
	case err != 0:
		m.reset(c)
		return false
	case n == 0:
		// The end of the stream, or an urgent byte just before it, which stops
		// splice as well: a read tells.
		d.large = 0
		m.releasePipe(d)
	default:
		d.pipe.held = n
		d.size(n)
		m.moved(c, d, n)
		return m.flushPipe(c, d, to)
	}
	return true
}

func (m *machine) releasePipe(d *direction) {
	if d.pipe != nil {
		m.pipes.release(m.kernel, d.pipe)
		d.pipe = nil
	}
}

func (m *machine) releaseBuffer(d *direction) {
	if d.held != nil {
		m.buffers.release(d.held)
		d.held = nil
	}
}

// flush writes what the direction holds, as far as the socket takes it. It
// returns false when the connection was closed.
func (m *machine) flush(c *conn, d *direction, to *socket) bool {
	if d.held != nil {
		return m.flushBuffer(c, d, to)
	}
	return m.flushPipe(c, d, to)
}

func (m *machine) flushBuffer(c *conn, d *direction, to *socket) bool {
	b := d.held
	n, err := m.kernel.write(to.fd, b.bytes[b.start:b.end])
	if err != 0 && err != unix.EAGAIN {
		m.reset(c)
		return false
	}
	if n > 0 {
		b.start += n
		c.active = m.now
	}
	if b.start < b.end {
		d.block(to)
		return true
	}
	m.releaseBuffer(d)
	return true
}

func (m *machine) flushPipe(c *conn, d *direction, to *socket) bool {
	for d.pipe != nil && d.pipe.held > 0 {
		n, err := m.kernel.splice(d.pipe.r, to.fd, d.pipe.held)
		switch {
		case err == unix.EAGAIN:
			d.block(to)
			return true
		case err != 0:
			m.reset(c)
			return false
		}
		d.pipe.held -= n
		c.active = m.now
	}
	if d.large < spliceAfter {
		m.releasePipe(d)
	}
	return true
}

// --- ending ------------------------------------------------------------------------

// end passes a FIN on, behind the last byte. The second one closes.
func (m *machine) end(c *conn, d *direction, to *socket) {
	d.course = shut
	m.releasePipe(d)
	if c.up.course == shut && c.down.course == shut {
		m.kernel.close(c.client.fd)
		m.kernel.close(c.target.fd)
		m.release(c)
		return
	}
	if err := m.kernel.finish(to.fd); err != 0 {
		m.reset(c)
	}
}

// reset ends a connection as a failure, for both of its ends.
func (m *machine) reset(c *conn) {
	m.kernel.reset(c.client.fd)
	if c.target.fd >= 0 {
		m.kernel.reset(c.target.fd)
	}
	m.release(c)
}

func (m *machine) release(c *conn) {
	m.wheel.unset(c)
	for _, d := range [...]*direction{&c.up, &c.down} {
		m.releaseBuffer(d)
		m.releasePipe(d)
	}
	if c.tally != nil {
		c.tally.active--
	}
	c.state = closed
	c.generation++
	m.dead = append(m.dead, c)
	m.left()
}

// --- changes -----------------------------------------------------------------------

// adopt goes on with another plan. Connections of the old one are to be brought
// over with adoptConns.
func (m *machine) adopt(p *plan) { m.plan = p }

// adoptConns brings the connections of a range of indexes over to the plan, and
// resets those whose target it ends. It returns false behind the last index.
func (m *machine) adoptConns(from, to int) bool {
	for _, c := range m.conns[min(from, len(m.conns)):min(to, len(m.conns))] {
		if c.state == closed {
			continue
		}
		in := m.plan.pools[c.pool.name]
		switch {
		case c.state == dialing && in != nil && !m.plan.takes(c.to()):
			// Nothing was promised yet: on to the next one, in its turn.
			c.withdrawn = true
			m.enqueue(c)
		case m.plan.ends(c.to()):
			m.reset(c)
			continue
		}
		if in != nil {
			c.pool = in
		}
		if s := m.plan.services[c.service.vip]; s != nil {
			c.service = s
		}
	}
	return to < len(m.conns)
}

// resetConns ends the connections of a range of indexes. It returns false behind
// the last index.
func (m *machine) resetConns(from, to int) bool {
	for _, c := range m.conns[min(from, len(m.conns)):min(to, len(m.conns))] {
		if c.state != closed {
			m.reset(c)
		}
	}
	return to < len(m.conns)
}
