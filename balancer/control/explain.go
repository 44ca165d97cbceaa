package control

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"

	"nlb/balancer"
	"nlb/balancer/explain"
)

// Explain asks what would become of a flow, by the configuration in force.
func (c *Client) Explain(ctx context.Context, q explain.Question) (*explain.Answer, error) {
	var answer explain.Answer
	query := url.Values{
		"protocol": {strconv.Itoa(int(q.Protocol))}, "client": {q.Client.String()}, "destination": {q.Destination.String()},
	}
	if err := c.ask(ctx, http.MethodGet, explainPath+"?"+query.Encode(), nil, &answer); err != nil {
		return nil, err
	}
	return &answer, nil
}

// onQuestion answers a question of the query.
func onQuestion(d Daemon) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		q, err := parseQuestion(r.URL.Query())
		if err != nil {
			answer(w, http.StatusBadRequest, failure{err.Error()})
			return
		}
		a, err := d.Explain(r.Context(), q)
		if err != nil {
			answer(w, http.StatusInternalServerError, failure{err.Error()})
			return
		}
		answer(w, http.StatusOK, a)
	}
}

func parseQuestion(query url.Values) (q explain.Question, err error) {
	proto, err := strconv.ParseUint(query.Get("protocol"), 10, 8)
	if err != nil || uint8(proto) != balancer.ProtoTCP && uint8(proto) != balancer.ProtoUDP {
		return q, fmt.Errorf("protocol %q is neither %d (TCP) nor %d (UDP)", query.Get("protocol"), balancer.ProtoTCP, balancer.ProtoUDP)
	}
	q.Protocol = uint8(proto)
	if q.Client, err = netip.ParseAddrPort(query.Get("client")); err != nil {
		return q, fmt.Errorf("client: %w", err)
	}
	if q.Destination, err = netip.ParseAddrPort(query.Get("destination")); err != nil {
		return q, fmt.Errorf("destination: %w", err)
	}
	return q, q.Check()
}
