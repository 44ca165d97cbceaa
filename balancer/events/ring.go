package events

import (
	"encoding/json"
	"sync"
	"time"
)

// DefaultSize is how many events a daemon remembers: with the bounds of core.go,
// some megabytes, and all that happened when each of a thousand targets failed and
// came back twice.
const DefaultSize = 4096

// An Event is something that happened.
type Event struct {
	// Sequence grows by one with each event. A daemon's first one is the
	// microseconds since 1970 when it began, so that it grows over restarts, too.
	Sequence uint64    `json:"sequence"`
	Time     time.Time `json:"time"`
	// Level is the log entry's: info, warn or error.
	Level string `json:"level"`
	// Name is that of its Kind.
	Name string `json:"event"`
	// Message is for people and may change.
	Message string `json:"message"`
	// Fields is a JSON object that has fields of its Kind.
	Fields json.RawMessage `json:"fields"`
}

// A Ring remembers the latest events. Its methods are safe from any goroutine, and
// who writes never waits for who reads.
type Ring struct {
	mu    sync.Mutex
	slots []Event       // of sequence n at n % len
	first uint64        // the sequence of the first event ever
	next  uint64        // the sequence of the next event
	news  chan struct{} // closed with the next event; nil: nobody waits
}

// NewRing returns a Ring of up to size events of a daemon that began at a time.
func NewRing(size int, began time.Time) *Ring {
	first := uint64(max(1, began.UnixMicro()))
	return &Ring{slots: make([]Event, size), first: first, next: first}
}

func (r *Ring) add(e Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e.Sequence = r.next
	r.slots[e.Sequence%uint64(len(r.slots))] = e
	r.next++
	if r.news != nil {
		close(r.news)
		r.news = nil
	}
}

// Read copies events that follow the one of sequence after into the slice, oldest
// first, and returns how many there were. Lost is how many events between after and
// the first of them are not remembered any more. When there is none, news is closed
// with the next one; else it is nil.
//
// Where this Ring never had after, it is of another daemon, or nobody's, and
// everything is news.
func (r *Ring) Read(after uint64, into []Event) (n int, lost uint64, news <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	from := after + 1
	if after < r.first || after >= r.next {
		from = r.first
	}
	oldest := max(r.first, r.next-min(r.next, uint64(len(r.slots))))
	if from < oldest {
		lost, from = oldest-from, oldest
	}
	for ; n < len(into) && from < r.next; n++ {
		into[n] = r.slots[from%uint64(len(r.slots))]
		from++
	}
	if n > 0 {
		return n, lost, nil
	}
	if r.news == nil {
		r.news = make(chan struct{})
	}
	return 0, lost, r.news
}
