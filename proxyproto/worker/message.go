package worker

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"time"

	"nlb/balancer"
	"nlb/proxyproto/relay"
)

// What may be asked for. A connection may ask again and again, one thing after
// the other.
const (
	opHello     = "hello"     // who is there
	opTable     = "table"     // what it serves
	opListeners = "listeners" // copies of its listening sockets
	opConfigure = "configure" // serve this Table with these Files, and what there is
	opStats     = "stats"
	opFlows     = "flows"
	opWatch     = "watch"    // as hello; the worker hangs up when it leaves
	opTakeover  = "takeover" // Table and listeners, for a successor
	opRetire    = "retire"   // accept no more, end at Until, give your Elders away
	opStop      = "stop"     // end now
)

// A frame is a request, an answer, or a part of one.
type frame struct {
	Op    string `json:"op,omitempty"`
	Error string `json:"error,omitempty"`
	// Leaving says that the request failed because the worker takes none any
	// more: another one is to be asked.
	Leaving bool `json:"leaving,omitempty"`
	More    bool `json:"more,omitempty"`
	// Files says what the files that come with the frame listen on.
	Files      []netip.AddrPort `json:"files,omitempty"`
	Hello      *Hello           `json:"hello,omitempty"`
	Generation uint64           `json:"generation,omitempty"`
	// Table is a balancer.Table. It stays as it was written, because its hash
	// tells tables apart.
	Table json.RawMessage `json:"table,omitempty"`
	Until time.Time       `json:"until,omitzero"`
	Stats *wireStats      `json:"stats,omitempty"`
	Flows []Flow          `json:"flows,omitempty"`
	// Elders are workers that retire, whose links come with the frame after its
	// Files.
	Elders []elderInfo `json:"elders,omitempty"`
}

// An elderInfo is what a successor must know of an elder.
type elderInfo struct {
	PID   int       `json:"pid"`
	Stats wireStats `json:"stats"` // as it said last
}

// Hello is who a worker is.
type Hello struct {
	Version string `json:"version"`
	PID     int    `json:"pid"`
	// Generation counts the tables that a relay was given. Hash is that of the
	// table in force, as JSON; empty before the first.
	Generation uint64 `json:"generation"`
	Hash       string `json:"hash"`
	// Listeners are the addresses it listens on, sorted.
	Listeners []netip.AddrPort `json:"listeners"`
	// Retiring says that it takes no new connections.
	Retiring bool `json:"retiring"`
}

type (
	// Stats are what the relay counted.
	Stats = relay.Stats
	// A Flow is one connection through the relay.
	Flow = relay.Flow
)

// wireStats are Stats with a list, in no order, instead of the map, whose keys
// JSON has no form for. The outer field hides the inner one.
type wireStats struct {
	relay.Stats
	Targets []wireTarget
}

type wireTarget struct {
	balancer.TargetKey
	relay.TargetStats
}

func toWire(s Stats) *wireStats {
	w := &wireStats{Stats: s, Targets: make([]wireTarget, 0, len(s.Targets))}
	w.Stats.Targets = nil
	for k, t := range s.Targets {
		w.Targets = append(w.Targets, wireTarget{k, t})
	}
	return w
}

func (w *wireStats) stats() Stats {
	s := w.Stats
	s.Targets = make(map[balancer.TargetKey]relay.TargetStats, len(w.Targets))
	for _, t := range w.Targets {
		s.Targets[t.TargetKey] = t.TargetStats
	}
	return s
}

// sum adds what two relays counted, for the targets of the first. There may be as
// many connections and files as at the first.
func sum(a, b Stats) Stats {
	a.Connections += b.Connections
	a.OpenFiles += b.OpenFiles
	a.Accepted += b.Accepted
	a.Refused += b.Refused
	a.Failed += b.Failed
	a.NoTarget += b.NoTarget
	a.IdleTimeouts += b.IdleTimeouts
	a.Exhausted += b.Exhausted
	a.NoPort += b.NoPort
	if len(b.Targets) == 0 {
		return a // as nearly always, and asked for often
	}
	a.Targets = maps.Clone(a.Targets)
	for k, more := range b.Targets {
		t, known := a.Targets[k]
		if !known {
			continue // removed: nobody is interested any more
		}
		t.Active += more.Active
		t.New += more.New
		t.Failed += more.Failed
		t.Answered += more.Answered
		t.Bytes += more.Bytes
		a.Targets[k] = t
	}
	return a
}

// past is what remains of what a relay counted when the relay is gone.
func past(s Stats) Stats {
	s.Connections, s.OpenFiles = 0, 0
	s.Targets = maps.Clone(s.Targets)
	for k, t := range s.Targets {
		t.Active = 0
		s.Targets[k] = t
	}
	return s
}

func encodeTable(t *balancer.Table) (json.RawMessage, error) {
	raw, err := json.Marshal(t)
	if err != nil {
		return nil, fmt.Errorf("table: %w", err)
	}
	return raw, nil
}

func decodeTable(raw json.RawMessage) (*balancer.Table, error) {
	t := new(balancer.Table)
	if len(raw) == 0 {
		return t, nil
	}
	if err := json.Unmarshal(raw, t); err != nil {
		return nil, fmt.Errorf("table: %w", err)
	}
	return t, nil
}

func compareKeys(a, b balancer.TargetKey) int {
	return cmp.Or(cmp.Compare(a.Group, b.Group), a.AddrPort.Compare(b.AddrPort))
}
