package relay

import "time"

const (
	// tick is how exact timeouts are.
	tick = 250 * time.Millisecond
	// wheelSlots reach 64 s ahead. What is due later goes around again.
	wheelSlots = 256
)

// A timer is a connection's place in the wheel.
type timer struct {
	next, prev *conn
	slot       int16
	armed      bool
}

// A wheel wakes connections at about the time they asked for. A connection is
// not moved while bytes flow: when its turn comes it looks how long it has been
// silent, and asks again.
type wheel struct {
	turned int64 // ticks
	slots  [wheelSlots]*conn
	armed  int
}

// set wakes c at the first tick that is not before the moment at.
func (w *wheel) set(c *conn, at int64) {
	w.unset(c)
	due := (at + int64(tick) - 1) / int64(tick)
	due = min(max(due, w.turned+1), w.turned+wheelSlots-1)
	c.slot, c.armed = int16(due%wheelSlots), true
	first := w.slots[c.slot]
	c.prev, c.next = nil, first
	if first != nil {
		first.prev = c
	}
	w.slots[c.slot] = c
	w.armed++
}

func (w *wheel) unset(c *conn) {
	if !c.armed {
		return
	}
	if c.prev == nil {
		w.slots[c.slot] = c.next
	} else {
		c.prev.next = c.next
	}
	if c.next != nil {
		c.next.prev = c.prev
	}
	c.timer = timer{}
	w.armed--
}

// advance turns the wheel to the moment now and wakes who is due. A woken
// connection is not in the wheel any more.
func (w *wheel) advance(now int64, wake func(*conn)) {
	to := now / int64(tick)
	if to-w.turned > wheelSlots {
		w.turned = to - wheelSlots // once around wakes everyone
	}
	for w.turned < to {
		w.turned++
		slot := w.turned % wheelSlots
		for c := w.slots[slot]; c != nil; c = w.slots[slot] {
			w.unset(c)
			wake(c)
		}
	}
}
