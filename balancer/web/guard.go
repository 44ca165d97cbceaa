package web

import (
	"net"
	"net/http"
	"net/netip"
	"strings"
)

// policy lets the page load what this handler serves, and nothing else run. With
// trusted types there is no way from a string to HTML at all: a browser that knows
// them throws where a script tries (W3C Trusted Types; Content Security Policy 3).
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

// guarded keeps other sites' pages away from next. Whoever may connect may read:
// there are no passwords here. But a browser that may connect must not do it for
// a page that came from elsewhere.
func guarded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", policy)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		switch {
		case overLoopback(r) && !namesLoopback(r.Host):
			refuse(w, http.StatusMisdirectedRequest,
				"over the loopback this is served as localhost or by address only, so that no other site's name can lead a browser here; a proxy should set the Host header to one of them")
		case fromElsewhere(r):
			refuse(w, http.StatusForbidden, "this is for pages of its own origin only")
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// overLoopback reports whether a request came to a loopback address, whatever
// else the server listens on. If that cannot be told, it did.
func overLoopback(r *http.Request) bool {
	local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	return !ok || local.IP.IsLoopback()
}

// namesLoopback reports whether a Host header cannot be due to DNS rebinding: a
// site whose name suddenly leads to 127.0.0.1 gets a browser to send its own name,
// and has its scripts read the answer. An address is nobody's name, and localhost
// leads nowhere else (RFC 6761, section 6.3).
//
// It is not asked of connections from other hosts: which names a balancer has on
// its network is not known here, and who can reach it there can read it without
// any trick.
func namesLoopback(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	if _, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil {
		return true
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	return host == "localhost" || strings.HasSuffix(host, ".localhost")
}

// fromElsewhere reports whether a browser says that another origin's page is
// behind a request (W3C Fetch Metadata). Such a page cannot read the answer, but
// it could use up the streams. Following a link to here is fine.
func fromElsewhere(r *http.Request) bool {
	switch r.Header.Get("Sec-Fetch-Site") {
	case "", "same-origin", "none":
		return false
	}
	return r.Header.Get("Sec-Fetch-Mode") != "navigate"
}
