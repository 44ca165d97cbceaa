package web

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/balancer/control"
)

// get asks a handler as a browser on this host does.
func get(h http.Handler, method, target string, change ...func(*http.Request)) *http.Response {
	r := httptest.NewRequest(method, target, nil)
	r.Host = "127.0.0.1:9469"
	for _, f := range change {
		f(r)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Result()
}

func body(t *testing.T, r *http.Response) string {
	t.Helper()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestAnswers(t *testing.T) {
	source := growing(1, "10.0.1.11")
	for _, tt := range []struct {
		method, target string
		code           int
		kind           string
	}{
		{"GET", "/", 200, "text/html; charset=utf-8"},
		{"HEAD", "/", 200, "text/html; charset=utf-8"},
		{"GET", "/page.css", 200, "text/css; charset=utf-8"},
		{"GET", "/page.js", 200, "text/javascript; charset=utf-8"},
		{"GET", "/icon.svg", 200, "image/svg+xml"},
		{"GET", "/api/v1/status", 200, "application/json"},
		{"HEAD", "/api/v1/status", 200, "application/json"},
		{"GET", "/api/v1/history", 200, "application/json"},
		{"GET", "/api/v1/history?target_group=web&target_group=none", 200, "application/json"},
		{"HEAD", "/api/v1/stream", 200, "text/event-stream"},
		{"GET", "/elsewhere", 404, "text/plain; charset=utf-8"},
		{"GET", "/assets/index.html", 404, "text/plain; charset=utf-8"},
		{"POST", "/", 405, "text/plain; charset=utf-8"},
		{"POST", "/api/v1/status", 405, "text/plain; charset=utf-8"},
		{"PUT", "/api/v1/history", 405, "text/plain; charset=utf-8"},
		{"DELETE", "/api/v1/stream", 405, "text/plain; charset=utf-8"},
		{"OPTIONS", "/api/v1/status", 405, "text/plain; charset=utf-8"},
	} {
		t.Run(tt.method+" "+tt.target, func(t *testing.T) {
			r := get(Handler(source), tt.method, tt.target)
			if r.StatusCode != tt.code || r.Header.Get("Content-Type") != tt.kind {
				t.Errorf("%d %s, want %d %s", r.StatusCode, r.Header.Get("Content-Type"), tt.code, tt.kind)
			}
			if tt.code == 405 && r.Header.Get("Allow") != "GET, HEAD" {
				t.Errorf("Allow: %s", r.Header.Get("Allow"))
			}
			for name, want := range map[string]string{
				"Content-Security-Policy":      policy,
				"X-Content-Type-Options":       "nosniff",
				"Referrer-Policy":              "no-referrer",
				"Cross-Origin-Resource-Policy": "same-origin",
				"Cross-Origin-Opener-Policy":   "same-origin",
				"Access-Control-Allow-Origin":  "",
			} {
				if got := r.Header.Get(name); got != want {
					t.Errorf("%s: %q, want %q", name, got, want)
				}
			}
		})
	}
}

func TestStatusIsWhatTheSourceSays(t *testing.T) {
	want := crowd(2, 3, 100)
	source := &script{make: func(time.Time) *control.Status { return want }}
	var got *control.Status
	d := json.NewDecoder(get(Handler(source), "GET", "/api/v1/status").Body)
	d.DisallowUnknownFields()
	if err := d.Decode(&got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(jsonOf(t, want), jsonOf(t, got)); diff != "" {
		t.Error(diff)
	}
}

func TestFailuresAreSaid(t *testing.T) {
	failing := Handler(&script{err: errNothing})
	many := Handler(&script{make: func(time.Time) *control.Status { return crowd(2, maxSeries, 1) }})
	for _, tt := range []struct {
		name    string
		handler http.Handler
		target  string
		code    int
		want    string
	}{
		{"status", failing, "/api/v1/status", 503, errNothing.Error()},
		{"history", failing, "/api/v1/history", 503, errNothing.Error()},
		{"too many targets", many, "/api/v1/history?target_group=group-000&target_group=group-001", 400, "ask for fewer"},
		{"as many as there may be", many, "/api/v1/history?target_group=group-000", 200, "10.0.3.250"},
	} {
		r := get(tt.handler, "GET", tt.target)
		if text := body(t, r); r.StatusCode != tt.code || !strings.Contains(text, tt.want) {
			t.Errorf("%s: %d %.200s, want %d and %q", tt.name, r.StatusCode, text, tt.code, tt.want)
		}
	}
}

func TestGuard(t *testing.T) {
	local := func(address string) func(*http.Request) {
		return func(r *http.Request) {
			a := &net.TCPAddr{IP: net.ParseIP(address), Port: 9469}
			*r = *r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, a))
		}
	}
	host := func(name string) func(*http.Request) { return func(r *http.Request) { r.Host = name } }
	header := func(pairs ...string) func(*http.Request) {
		return func(r *http.Request) {
			for i := 0; i < len(pairs); i += 2 {
				r.Header.Set(pairs[i], pairs[i+1])
			}
		}
	}
	for _, tt := range []struct {
		name   string
		change []func(*http.Request)
		code   int
	}{
		{"an address", []func(*http.Request){host("127.0.0.1:9469")}, 200},
		{"an address without a port", []func(*http.Request){host("127.0.0.1")}, 200},
		{"an IPv6 address", []func(*http.Request){host("[::1]:9469")}, 200},
		{"an IPv6 address without a port", []func(*http.Request){host("[::1]")}, 200},
		{"the other end of a tunnel", []func(*http.Request){host("localhost:10000")}, 200},
		{"in capitals, and complete", []func(*http.Request){host("LOCALHOST.:9469")}, 200},
		{"below localhost", []func(*http.Request){host("nlb.localhost")}, 200},
		{"rebound", []func(*http.Request){host("evil.example:9469")}, 421},
		{"rebound over IPv6", []func(*http.Request){local("::1"), host("evil.example:9469")}, 421},
		{"not localhost", []func(*http.Request){host("localhost.evil.example")}, 421},
		{"nor this", []func(*http.Request){host("notlocalhost")}, 421},
		{"looks like an address", []func(*http.Request){host("127.0.0.1.evil.example")}, 421},
		{"no name", []func(*http.Request){host("")}, 421},
		{"a name, over the network", []func(*http.Request){local("10.0.0.2"), host("lb1.example:9469")}, 200},
		{"a name, over IPv6", []func(*http.Request){local("2001:db8::2"), host("lb1.example:9469")}, 200},
		{"own page", []func(*http.Request){header("Sec-Fetch-Site", "same-origin", "Sec-Fetch-Mode", "cors")}, 200},
		{"typed in", []func(*http.Request){header("Sec-Fetch-Site", "none", "Sec-Fetch-Mode", "navigate")}, 200},
		{"a link elsewhere", []func(*http.Request){header("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate")}, 200},
		{"another site's script", []func(*http.Request){header("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors")}, 403},
		{"another port's script", []func(*http.Request){header("Sec-Fetch-Site", "same-site", "Sec-Fetch-Mode", "cors")}, 403},
	} {
		for _, target := range []string{"/", "/api/v1/status", "/api/v1/history"} {
			if r := get(Handler(growing(1)), "GET", target, tt.change...); r.StatusCode != tt.code {
				t.Errorf("%s: %s is answered with %d, want %d", tt.name, target, r.StatusCode, tt.code)
			}
		}
	}
}

func TestAssetsAreAskedForAgain(t *testing.T) {
	h := Handler(growing(1))
	for _, target := range []string{"/", "/page.css", "/page.js", "/icon.svg"} {
		tag := get(h, "GET", target).Header.Get("ETag")
		r := get(h, "GET", target, func(r *http.Request) { r.Header.Set("If-None-Match", tag) })
		if tag == "" || r.StatusCode != http.StatusNotModified || r.Header.Get("Cache-Control") != "no-cache" {
			t.Errorf("%s: ETag %s, asked again: %d, Cache-Control %s", target, tag, r.StatusCode, r.Header.Get("Cache-Control"))
		}
	}
}

// TestAssetsNeedNobodyElse: what the policy would stop should not be there at all.
func TestAssetsNeedNobodyElse(t *testing.T) {
	elsewhere := regexp.MustCompile(`(?i)(https?:)?//[a-z0-9.-]+\.[a-z]{2,}[^\s"']*`)
	html := regexp.MustCompile(`innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|\sstyle="|\son[a-z]+="`)
	for _, a := range assets() {
		for _, found := range elsewhere.FindAllString(string(a.content), -1) {
			if found != "http://www.w3.org/2000/svg" { // a name, not a place
				t.Errorf("%s mentions %s", a.pattern, found)
			}
		}
		if found := html.FindString(string(a.content)); found != "" {
			t.Errorf("%s has %q", a.pattern, found)
		}
	}
}
