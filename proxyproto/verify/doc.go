// Package verify asks a target whether it understands PROXY protocol v2.
//
// A target that gets headers it does not understand serves nobody, and one that
// accepts them from everybody believes whatever address a client claims. Neither
// is seen by a health check without a header. Two connections tell the cases
// apart: one that begins with a LOCAL header, which any receiver must accept
// (proxy-protocol.txt, 2.2), and one without. What follows on both is as little
// as the protocol of the port allows.
//
//	target                             check  with a header      without        verdict
//	nginx "listen … proxy_protocol"    HTTP   a status           closed         required
//	HAProxy "bind … accept-proxy"      HTTP   a status           closed         required
//	go-proxyproto, REQUIRE             HTTP   a status           closed         required
//	go-proxyproto, USE                 HTTP   a status           a status       accepted
//	plain nginx                        HTTP   400                a status       refused
//	a strict receiver, then TLS        HTTPS  ServerHello        closed         required
//	a plain TLS server                 HTTPS  closed, or no TLS  ServerHello    refused
//	sshd                               TCP    banner, closed     banner         refused
//	an echo server                     TCP    the header itself  nothing        refused
//	a client-first server              TCP    nothing            nothing        undecided
//	MySQL                              TCP    greeting           greeting       undecided
//	Redis                              TCP    an error           nothing        undecided
//
// The check TCP sends nothing of its own, for there is nothing that is harmless
// to every server. A strict receiver then waits for its header as long as it
// likes (HAProxy "timeout client", nginx client_header_timeout, go-proxyproto
// 10 s), just like a plain server that waits for its client: only one that gives
// up within the deadline is seen to require the header.
package verify
