package healthcheck

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// An authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, name string) authority {
	t.Helper()
	a := authority{key: newKey(t)}
	a.cert = sign(t, a, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}, a.key)
	return a
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// sign has a sign template; an authority without a certificate signs itself.
func sign(t *testing.T, a authority, template *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	template.SerialNumber = big.NewInt(1)
	parent := a.cert
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// pem is what a ca_file would hold.
func (a authority) pem() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}))
}

// issue returns a server certificate for names and an address, good until then.
func (a authority) issue(t *testing.T, until time.Time, address string, names ...string) tls.Certificate {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: until, DNSNames: names,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if address != "" {
		template.IPAddresses = []net.IP{net.ParseIP(address)}
	}
	return tls.Certificate{Certificate: [][]byte{sign(t, a, template, key).Raw}, PrivateKey: key}
}

// serveTLS answers 200 with a certificate, and tells which name it was asked for.
func serveTLS(t *testing.T, cert tls.Certificate) (target netip.AddrPort, asked <-chan string) {
	t.Helper()
	names := make(chan string, 1)
	config := &tls.Config{GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		names <- hello.ServerName
		return &cert, nil
	}}
	target = serve(t, "127.0.0.1:0", func(raw *net.TCPConn) {
		conn := tls.Server(raw, config)
		if conn.Handshake() != nil {
			return
		}
		readRequest(conn)
		io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n")
		conn.Close()
	})
	return target, names
}

func TestVerifyTLS(t *testing.T) {
	ours, theirs := newAuthority(t, "ours"), newAuthority(t, "theirs")
	later, past := time.Now().Add(time.Hour), time.Now().Add(-time.Hour)
	good := ours.issue(t, later, "127.0.0.1", "web.example")
	tests := map[string]struct {
		cert  tls.Certificate
		check Check
		kind  Kind
		asked string // in SNI
		words string
	}{
		"not asked for":          {theirs.issue(t, past, ""), Check{}, OK, "", "answered 200"},
		"not asked for, SNI":     {theirs.issue(t, past, ""), Check{ServerName: "web.example"}, OK, "web.example", "answered 200"},
		"roots are not asked":    {theirs.issue(t, past, ""), Check{Roots: NewRoots(ours.pem())}, OK, "", "answered 200"},
		"the name":               {good, Check{VerifyTLS: true, ServerName: "web.example", Roots: NewRoots(ours.pem())}, OK, "web.example", "answered 200"},
		"the address":            {good, Check{VerifyTLS: true, Roots: NewRoots(ours.pem())}, OK, "", "answered 200"},
		"one root of two":        {good, Check{VerifyTLS: true, Roots: NewRoots(theirs.pem() + ours.pem())}, OK, "", "answered 200"},
		"another name":           {good, Check{VerifyTLS: true, ServerName: "shop.example", Roots: NewRoots(ours.pem())}, TLS, "shop.example", "certificate is valid for web.example, not shop.example"},
		"another address":        {ours.issue(t, later, "10.0.1.12", "web.example"), Check{VerifyTLS: true, Roots: NewRoots(ours.pem())}, TLS, "", "certificate is valid for 10.0.1.12, not 127.0.0.1"},
		"no address":             {ours.issue(t, later, "", "web.example"), Check{VerifyTLS: true, Roots: NewRoots(ours.pem())}, TLS, "", "cannot validate certificate for 127.0.0.1 because it doesn't contain any IP SANs"},
		"another root":           {good, Check{VerifyTLS: true, ServerName: "web.example", Roots: NewRoots(theirs.pem())}, TLS, "web.example", "certificate signed by unknown authority"},
		"the host's roots":       {good, Check{VerifyTLS: true, ServerName: "web.example"}, TLS, "web.example", "certificate signed by unknown authority"},
		"no root at all":         {good, Check{VerifyTLS: true, ServerName: "web.example", Roots: NewRoots("")}, TLS, "web.example", "certificate signed by unknown authority"},
		"expired":                {ours.issue(t, past, "", "web.example"), Check{VerifyTLS: true, ServerName: "web.example", Roots: NewRoots(ours.pem())}, TLS, "web.example", "certificate has expired or is not yet valid: current time "},
		"a name for a terminal":  {ours.issue(t, later, "", "\x1b[2J\r\nweb.example"), Check{VerifyTLS: true, ServerName: "web.example", Roots: NewRoots(ours.pem())}, TLS, "web.example", "valid for ?[2J??web.example, not web.example"},
		"a name without an end":  {ours.issue(t, later, "", strings.Repeat("x.", 5000)), Check{VerifyTLS: true, ServerName: "web.example", Roots: NewRoots(ours.pem())}, TLS, "web.example", "x.x.x.... after "},
		"names without an end":   {ours.issue(t, later, "", strings.Split(strings.Repeat("x.example ", 90), " ")[:90]...), Check{VerifyTLS: true, ServerName: "web.example", Roots: NewRoots(ours.pem())}, TLS, "web.example", "certificate is valid for x.example, x.example"},
		"a client is not a host": {clientOnly(t, ours, later), Check{VerifyTLS: true, ServerName: "web.example", Roots: NewRoots(ours.pem())}, TLS, "web.example", "incompatible key usage"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			c := tt.check
			var asked <-chan string
			c.Target, asked = serveTLS(t, tt.cert)
			c.Protocol, c.Timeout = HTTPS, patience
			r := new(Prober).Probe(t.Context(), c)
			if got := <-asked; got != tt.asked {
				t.Errorf("SNI %q, want %q", got, tt.asked)
			}
			said := r.String()
			if r.Kind != tt.kind || !strings.Contains(said, tt.words) {
				t.Errorf("%v: %q; want %v and %q", r.Kind, said, tt.kind, tt.words)
			}
			if tt.kind == TLS && (r.Reason() != ReasonFailedHealthChecks || !strings.HasPrefix(said, "TLS with "+c.Target.String()+" failed: ")) {
				t.Errorf("reason %q, said %q", r.Reason(), said)
			}
			if len(said) > 500 || strings.ContainsAny(said, "\r\n\x1b") {
				t.Errorf("no line to print: %q", said)
			}
		})
	}
}

// clientOnly is a certificate for the right name and the wrong use.
func clientOnly(t *testing.T, a authority, until time.Time) tls.Certificate {
	t.Helper()
	key := newKey(t)
	cert := sign(t, a, &x509.Certificate{
		NotBefore: time.Now().Add(-time.Hour), NotAfter: until, DNSNames: []string{"web.example"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, key)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
}

// TestHostWithoutRoots: that this host cannot read its roots says nothing about
// a target.
func TestHostWithoutRoots(t *testing.T) {
	var r Result
	r.failTLS(&tls.CertificateVerificationError{Err: x509.SystemRootsError{Err: errors.New("permission denied")}})
	if want := "system roots"; r.Kind != Unmade || !strings.Contains(r.Detail, want) || !strings.Contains(r.Detail, "permission denied") {
		t.Errorf("%v: %q", r.Kind, r.Detail)
	}
}
