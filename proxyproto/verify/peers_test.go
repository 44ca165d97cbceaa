package verify

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// patience is far more than any server here takes. Nothing waits for it that
// goes well.
const patience = 20 * time.Second

var loopbacks = map[string]netip.Addr{
	"IPv4": netip.MustParseAddr("127.0.0.1"),
	"IPv6": netip.IPv6Loopback(),
}

// nginxConfig answers every request. %[1]s is a folder of its own.
const nginxConfig = `
daemon off;
master_process off;
pid %[1]s/pid;
error_log stderr;
events {}
http {
	access_log off;
	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
	ssl_certificate %[1]s/pem;
	ssl_certificate_key %[1]s/pem;
	server {
		listen 127.0.0.1:8080; listen [::1]:8080;
		listen 127.0.0.1:8081 proxy_protocol; listen [::1]:8081 proxy_protocol;
		listen 127.0.0.1:8443 ssl; listen [::1]:8443 ssl;
		listen 127.0.0.1:8444 ssl proxy_protocol; listen [::1]:8444 ssl proxy_protocol;
		location / { return 204; }
	}
}
`

// haproxyConfig answers every request. It gives up on a silent client after
// 300 ms, which a strict one is known by to the check TCP. %[1]s is a folder.
const haproxyConfig = `
global
	log stderr local0
defaults
	mode http
	timeout client 300ms
	timeout http-request 300ms
	timeout server 20s
	timeout connect 5s
frontend plain
	bind 127.0.0.1:9080
	bind [::1]:9080
	http-request return status 200
frontend strict
	bind 127.0.0.1:9081 accept-proxy
	bind [::1]:9081 accept-proxy
	http-request return status 503
frontend tls
	bind 127.0.0.1:9444 accept-proxy ssl crt %[1]s/pem
	bind [::1]:9444 accept-proxy ssl crt %[1]s/pem
	http-request return status 200
frontend plaintls
	bind 127.0.0.1:9443 ssl crt %[1]s/pem
	bind [::1]:9443 ssl crt %[1]s/pem
	http-request return status 200
`

// run starts a server of the host's, with a file made of config, and waits for
// its last port to listen.
func run(t *testing.T, config string, port uint16, argv ...string) {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "config")
	for name, text := range map[string][]byte{file: fmt.Appendf(nil, config, dir), filepath.Join(dir, "pem"): certificate(t)} {
		if err := os.WriteFile(name, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	for i := range argv {
		argv[i] = strings.ReplaceAll(argv[i], "FILE", file)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait() // it was killed
		if t.Failed() {
			t.Logf("%s:\n%s", argv[0], &out)
		}
	})
	for _, addr := range loopbacks {
		listening(t, netip.AddrPortFrom(addr, port))
	}
}

// listening waits until a connection is accepted.
func listening(t *testing.T, at netip.AddrPort) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		conn, err := net.Dial("tcp", at.String())
		if err == nil {
			conn.Close()
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("nobody listens: %v", err)
		}
	}
}

// certificate returns a key and a certificate for it, in one PEM file.
func certificate(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"web.example"}}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}),
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})...)
}
