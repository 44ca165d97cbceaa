package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"time"
)

// Flow is a live flow. Fields are added and never renamed or removed.
type Flow struct {
	Protocol string         `json:"protocol"` // TCP or UDP
	Client   netip.AddrPort `json:"client"`
	VIP      netip.AddrPort `json:"vip"`
	// Listener is empty if there is none any more.
	Listener string `json:"listener"`
	// TargetGroup is empty if the target is not known any more.
	TargetGroup string         `json:"target_group"`
	Target      netip.AddrPort `json:"target"`
	ClientIP    string         `json:"client_ip"`
	Hairpin     bool           `json:"hairpin"`
	// TargetSees is whom the target takes for the client.
	TargetSees netip.AddrPort `json:"target_sees"`
	// State is conntrack's of a TCP flow, in lower case; replied or unreplied of a
	// UDP flow; dialing or relayed of one that the relay has.
	State string `json:"state"`
	// Dataplane is who handles its packets: nftables, ipvs or relay.
	Dataplane string `json:"dataplane"`
	// IdleLeftSeconds is how long the kernel remembers the flow if it stays idle,
	// AgeSeconds how long the relay has had it. The other one is absent.
	IdleLeftSeconds *float64 `json:"idle_left_seconds,omitempty"`
	AgeSeconds      *float64 `json:"age_seconds,omitempty"`
	// Bytes and Packets are those of both directions; absent where nobody counts.
	Bytes   *uint64 `json:"bytes,omitempty"`
	Packets *uint64 `json:"packets,omitempty"`
}

// FlowFilter chooses flows. Its zero value chooses all.
type FlowFilter struct {
	Group, Listener string
	// Target has port 0 for all ports of the address.
	Target netip.AddrPort
	Client netip.Prefix
}

// Matches reports whether the filter chooses the flow.
func (f FlowFilter) Matches(flow *Flow) bool {
	return (f.Group == "" || f.Group == flow.TargetGroup) &&
		(f.Listener == "" || f.Listener == flow.Listener) &&
		(!f.Client.IsValid() || f.Client.Contains(flow.Client.Addr())) &&
		(!f.Target.IsValid() || f.Target.Addr() == flow.Target.Addr() && (f.Target.Port() == 0 || f.Target.Port() == flow.Target.Port()))
}

func (f FlowFilter) query() url.Values {
	query := url.Values{}
	if f.Group != "" {
		query.Set("group", f.Group)
	}
	if f.Listener != "" {
		query.Set("listener", f.Listener)
	}
	if f.Target.IsValid() {
		query.Set("target", f.Target.String())
	}
	if f.Client.IsValid() {
		query.Set("client", f.Client.String())
	}
	return query
}

func parseFlowFilter(query url.Values) (f FlowFilter, err error) {
	f.Group, f.Listener = query.Get("group"), query.Get("listener")
	if text := query.Get("target"); text != "" {
		if f.Target, err = netip.ParseAddrPort(text); err != nil {
			return f, fmt.Errorf("target: %w", err)
		}
	}
	if text := query.Get("client"); text != "" {
		if f.Client, err = netip.ParsePrefix(text); err != nil {
			return f, fmt.Errorf("client: %w", err)
		}
	}
	return f, nil
}

// A flowLine is one line of the answer: a flow, the error that ended the list, or its
// proper end. Without that the list is cut short.
type flowLine struct {
	*Flow `json:",omitempty"`
	Error string `json:"error,omitempty"`
	End   bool   `json:"end,omitempty"`
}

// slowest is how long a reader may take for one buffer of the list. The kernel waits
// with the rest for as long, and so does nobody else.
const slowest = 30 * time.Second

// onFlows streams flows, one JSON object a line, so that neither end holds a million
// of them.
func onFlows(d Daemon) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		filter, err := parseFlowFilter(r.URL.Query())
		if err != nil {
			answer(w, http.StatusBadRequest, failure{err.Error()})
			return
		}
		w.Header().Set("Content-Type", "application/x-ndjson")
		out := bufio.NewWriterSize(deadlined{w, http.NewResponseController(w)}, 32<<10)
		lines := json.NewEncoder(out)
		err = d.Flows(r.Context(), func(f *Flow) error {
			if !filter.Matches(f) {
				return nil
			}
			return lines.Encode(flowLine{Flow: f})
		})
		last := flowLine{End: true}
		if err != nil {
			last = flowLine{Error: err.Error()}
		}
		_ = lines.Encode(last) // the client is gone: nobody to tell
		_ = out.Flush()
	}
}

// A deadlined gives each write its time.
type deadlined struct {
	http.ResponseWriter
	control *http.ResponseController
}

func (d deadlined) Write(b []byte) (int, error) {
	if err := d.control.SetWriteDeadline(time.Now().Add(slowest)); err != nil {
		return 0, err
	}
	return d.ResponseWriter.Write(b)
}

// Flows shows each flow that the filter chooses, in no order. It ends with the first
// error of show. The Flow is show's own.
func (c *Client) Flows(ctx context.Context, filter FlowFilter, show func(*Flow) error) error {
	resp, err := c.send(ctx, http.MethodGet, flowsPath+"?"+filter.query().Encode(), nil)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	lines := json.NewDecoder(resp.Body)
	for {
		var line struct {
			Flow
			Error string `json:"error"`
			End   bool   `json:"end"`
		}
		if err := lines.Decode(&line); err != nil {
			return fmt.Errorf("the daemon's list of flows is cut short: %w", err)
		}
		switch {
		case line.Error != "":
			return errors.New(line.Error)
		case line.End:
			return nil
		}
		if err := show(&line.Flow); err != nil {
			return err
		}
	}
}

// Age is how old the flow is, or how long it lives on, for people; "-" if that is not
// known.
func (f *Flow) Age() string {
	switch {
	case f.AgeSeconds != nil:
		return strconv.Itoa(int(*f.AgeSeconds)) + "s old"
	case f.IdleLeftSeconds != nil:
		return strconv.Itoa(int(*f.IdleLeftSeconds)) + "s left"
	}
	return "-"
}
