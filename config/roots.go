package config

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"

	"nlb/balancer"
)

// maxRoots bounds a file of certificates, in bytes. What a distribution trusts
// takes about 220 KiB; the limit stops a log or a disk image.
const maxRoots = 4 << 20

// readRoots reads the certificates that health checks verify with. A file that
// several groups name is read once, and they share its text.
func (f *rawFile) readRoots(r *report) {
	type content struct {
		text string
		bad  *fault
	}
	files := make(map[string]content)
	for i := range f.TargetGroups {
		h := &f.TargetGroups[i].HealthCheck
		if !h.verifiesWithFile() {
			continue
		}
		got, seen := files[h.CAFile.V]
		if !seen {
			got.text, got.bad = loadRoots(h.CAFile.V)
			files[h.CAFile.V] = got
		}
		if got.bad != nil {
			r.add(h.CAFile.place, got.bad.what, got.bad.want)
		}
		h.trustedRoots = got.text
	}
}

func (h *rawHealthCheck) verifiesWithFile() bool {
	return h.Protocol.OK && h.Protocol.V == balancer.CheckHTTPS && h.VerifyTLS.OK && h.VerifyTLS.V && h.CAFile.OK && h.CAFile.V != ""
}

// loadRoots returns the certificates of a PEM file, and what is wrong with it.
// Messages show the path and never what is in the file.
func loadRoots(path string) (string, *fault) {
	const want = "a PEM file of certificates"
	data, err := readRegular(path, maxRoots+1)
	var of *fs.PathError
	switch {
	case errors.As(err, &of):
		return "", &fault{strconv.Quote(path) + " cannot be read: " + of.Err.Error(), want}
	case err != nil:
		return "", &fault{strconv.Quote(path) + " cannot be read: " + err.Error(), want}
	case len(data) > maxRoots:
		return "", &fault{strconv.Quote(path) + " is too large", fmt.Sprintf("at most %d MiB", maxRoots>>20)}
	}
	text, bad := certificates(data)
	if bad != "" {
		return "", &fault{strconv.Quote(path) + " " + bad, want}
	}
	return text, nil
}

// readRegular reads at most limit bytes of a file. Devices and pipes are
// refused, and opening one does not wait for its other end.
func readRegular(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("it is no regular file")
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

// certificates returns the certificates of PEM text and nothing else of it, so
// that neither a comment nor a private key gets further, or says in words why
// it cannot. All of them must be readable: a bundle that is cut short would
// quietly trust less than its owner believes.
func certificates(data []byte) (text, bad string) {
	const kind = "CERTIFICATE"
	begun := strings.Count(string(data), "-----BEGIN "+kind+"-----")
	var out strings.Builder
	read := 0
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != kind {
			continue
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return "", fmt.Sprintf("has a certificate, its number %d, that cannot be read: %v", read+1, err)
		}
		read++
		out.Write(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: block.Bytes}))
	}
	switch {
	case len(data) == 0:
		return "", "is empty"
	case begun == 0:
		return "", "has no certificate"
	case read < begun:
		return "", fmt.Sprintf("is damaged: %d of its %d certificates can be read", read, begun)
	}
	return out.String(), ""
}
