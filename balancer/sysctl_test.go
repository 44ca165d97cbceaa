package balancer

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSysctlDir(t *testing.T) {
	const key = "net/ipv4/vs/conntrack"
	d := SysctlDir(t.TempDir())
	if err := os.MkdirAll(filepath.Dir(d.path(key)), 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := d.Read(key)
	if !errors.Is(err, fs.ErrNotExist) || err.Error() != "read net.ipv4.vs.conntrack: no such file or directory" {
		t.Errorf("read what there is not: %v", err)
	}
	if err := d.Write(key, "1"); !errors.Is(err, fs.ErrNotExist) || err.Error() != "no such file or directory" {
		t.Errorf("write what there is not: %v", err)
	}
	if _, err := os.Stat(d.path(key)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a write made the setting: %v", err)
	}
	if err := os.WriteFile(d.path(key), []byte("0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Write(key, "1"); err != nil {
		t.Error(err)
	}
	if got, err := d.Read(key); got != "1" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
}

func TestSysctlNames(t *testing.T) {
	for key, name := range map[string]string{
		"net/ipv4/ip_forward":                   "net.ipv4.ip_forward",
		"net/ipv4/conf/eth0.100/send_redirects": "net.ipv4.conf.eth0/100.send_redirects",
	} {
		if diff := cmp.Diff([]string{name, key}, []string{SysctlName(key), SysctlKey(name)}); diff != "" {
			t.Error(diff)
		}
	}
}
