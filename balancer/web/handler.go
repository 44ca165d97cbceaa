package web

import (
	"context"
	"encoding/json"
	"net/http"
	"slices"

	"nlb/balancer/control"
)

// A Source says where listeners, groups and targets stand. Status is called by
// one goroutine at a time, and what it returns is not modified afterwards, by
// either side. It may be as dear as reading the table of flows is: it is called
// while somebody looks, and then every two seconds, or every half a second if
// somebody asks for the status again and again.
type Source interface {
	Status(ctx context.Context) (*control.Status, error)
}

// Handler serves the status page of src and what the page is made from, for
// reading only:
//
//	GET /                 the page
//	GET /api/v1/status    what nlb status -o json prints, at most half a second old
//	GET /api/v1/history   rates of the last five minutes; see history
//	GET /api/v1/stream    the status and all that changes in it, as server-sent
//	                      events; see stream
//
// Errors are JSON as well, {"error": "..."}: 503 while src has nothing to say. A
// request that another site's page made a browser send is refused; see guarded.
//
// Nothing runs while nobody asks: samples are taken by the goroutines of those who
// look, one for all of them, and are forgotten after five minutes.
func Handler(src Source) http.Handler {
	return handler(newRecorder(src))
}

func handler(r *recorder) http.Handler {
	mux := http.NewServeMux()
	for _, a := range assets() {
		mux.Handle("GET "+a.pattern, a)
	}
	mux.HandleFunc("GET /api/v1/status", r.serveStatus)
	mux.HandleFunc("GET /api/v1/history", r.serveHistory)
	mux.Handle("GET /api/v1/stream", newStreams(r))
	return guarded(mux)
}

func (r *recorder) serveStatus(w http.ResponseWriter, req *http.Request) {
	status, err := r.status(req.Context())
	if err != nil {
		refuse(w, http.StatusServiceUnavailable, err.Error())
		return
	}
	answer(w, http.StatusOK, status)
}

func (r *recorder) serveHistory(w http.ResponseWriter, req *http.Request) {
	groups := req.URL.Query()["target_group"]
	seen, err := r.seen(req.Context())
	if err != nil {
		refuse(w, http.StatusServiceUnavailable, err.Error())
		return
	}
	targets := 0
	for _, g := range seen.status.TargetGroups {
		if slices.Contains(groups, g.Name) {
			targets += len(g.Targets)
		}
	}
	if targets > maxSeries {
		refuse(w, http.StatusBadRequest, "these groups have too many targets for one answer: ask for fewer of them at once, or for none, which gives the groups' sums")
		return
	}
	answer(w, http.StatusOK, newHistory(seen, groups))
}

type failure struct {
	Error string `json:"error"`
}

func refuse(w http.ResponseWriter, code int, why string) { answer(w, code, failure{why}) }

func answer(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body) // the reader is gone: nobody to tell
}
