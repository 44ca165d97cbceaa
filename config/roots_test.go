package config

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// newRoot returns a certificate that signed itself, as PEM.
func newRoot(t *testing.T, name string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// withRoots is a file whose group g<i> trusts the i-th of some files.
func withRoots(paths ...string) string {
	var b strings.Builder
	b.WriteString("target_groups:\n")
	for i, p := range paths {
		fmt.Fprintf(&b, "- {name: g%d, protocol: TCP, port: 443, client_ip: snat, health_check: {protocol: HTTPS, verify_tls: true, ca_file: %q}}\n", i, p)
	}
	return b.String()
}

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestTrustedRoots(t *testing.T) {
	dir := t.TempDir()
	one, two := newRoot(t, "one"), newRoot(t, "two")
	key := "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
	plain := write(t, filepath.Join(dir, "plain.pem"), one+two)
	adorned := write(t, filepath.Join(dir, "adorned.pem"), "# the first\n"+one+key+"# the second\r\n"+two)
	file := write(t, filepath.Join(dir, "nlb.yaml"), withRoots(plain, adorned, ""))
	c, err := Load(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, g := range c.Spec.TargetGroups {
		got = append(got, g.HealthCheck.TrustedRoots)
	}
	if diff := cmp.Diff([]string{one + two, one + two, ""}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if c, err := Parse("nlb.yaml", []byte(withRoots("/nowhere"))); err != nil || c.Spec.TargetGroups[0].HealthCheck.TrustedRoots != "" {
		t.Errorf("Parse looked at a file: %v", err)
	}
}

func TestTrustedRootsThatCannotBeRead(t *testing.T) {
	dir := t.TempDir()
	one := newRoot(t, "one")
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	const broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
	tests := []struct{ path, want string }{
		{filepath.Join(dir, "absent.pem"), "cannot be read: no such file or directory (a PEM file of certificates)"},
		{dir, "cannot be read: it is no regular file (a PEM file of certificates)"},
		{pipe, "cannot be read: it is no regular file (a PEM file of certificates)"},
		{"/dev/zero", "cannot be read: it is no regular file (a PEM file of certificates)"},
		{write(t, filepath.Join(dir, "empty.pem"), ""), "is empty (a PEM file of certificates)"},
		{write(t, filepath.Join(dir, "key.pem"), "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), "has no certificate (a PEM file of certificates)"},
		{write(t, filepath.Join(dir, "broken.pem"), one+broken), "has a certificate, its number 2, that cannot be read: x509: malformed certificate (a PEM file of certificates)"},
		{write(t, filepath.Join(dir, "short.pem"), one+one[:len(one)-40]), "is damaged: 1 of its 2 certificates can be read (a PEM file of certificates)"},
		{write(t, filepath.Join(dir, "large.pem"), one+strings.Repeat("#\n", maxRoots/2)), "is too large (at most 4 MiB)"},
	}
	var paths []string
	var want bytes.Buffer
	file := filepath.Join(dir, "nlb.yaml")
	for i, tt := range tests {
		paths = append(paths, tt.path)
		fmt.Fprintf(&want, "%s:%d:116: target_groups[%d].health_check.ca_file: %q %s\n", file, i+2, i, tt.path, tt.want)
	}
	write(t, file, withRoots(paths...))
	_, err := Load(file, nil)
	if err == nil {
		t.Fatal("no error")
	}
	if diff := cmp.Diff(want.String(), err.Error()+"\n"); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func FuzzCertificates(f *testing.F) {
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
	f.Add([]byte("# nothing"))
	f.Fuzz(func(t *testing.T, data []byte) {
		text, bad := certificates(data)
		if (text == "") == (bad == "") {
			t.Fatalf("text %q, fault %q", text, bad)
		}
		if bad != "" {
			return
		}
		if again, bad := certificates([]byte(text)); again != text || bad != "" {
			t.Errorf("read again: %q, %s", again, bad)
		}
		if !x509.NewCertPool().AppendCertsFromPEM([]byte(text)) {
			t.Error("no certificate for a pool")
		}
	})
}
