package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nlb/internal/browser"
	"nlb/internal/nstest"
	"nlb/internal/wait"
)

// pageConfig has an address for the page, and targets that fail within seconds.
const pageConfig = `
source_addresses: [10.0.0.2]
metrics: {address: "127.0.0.1:9469"}
vips: [{address: 198.51.100.10}]
listeners:
  - {name: http, vip: 198.51.100.10, protocol: TCP, port: 80, forward: [{target_group: web}]}
target_groups:
  - name: web
    protocol: TCP
    port: 8080
    client_ip: hairpin_snat
    health_check: {interval: 1s, timeout: 1s, healthy_threshold: 2, unhealthy_threshold: 2}
    targets: [{address: 10.0.1.11}, {address: 10.0.1.12}]
`

// serving runs a daemon until the test ends.
func serving(t *testing.T, config string) (socket string) {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "nlb.yaml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(dir, "nlb.sock")
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	daemon := exec.Command("nlb", "serve", "-c", file, "--socket", socket, "--state-dir", filepath.Join(dir, "state"))
	daemon.Stdout, daemon.Stderr = log, log
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := daemon.Process.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		if err := daemon.Wait(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			said, _ := os.ReadFile(log.Name())
			t.Logf("the daemon said:\n%s", said)
		}
		emptyNamespace(t)
	})
	return socket
}

// command is what a command of nlb prints.
func command(t *testing.T, args ...string) []byte {
	t.Helper()
	out, err := exec.Command("nlb", args...).Output()
	if err != nil {
		var said []byte
		if exit, ok := err.(*exec.ExitError); ok {
			said = exit.Stderr
		}
		t.Fatalf("nlb %v: %v\n%s", args, err, said)
	}
	return out
}

// greet is all that a target does for its health check.
func greet(net.Conn) {}

// getWithin asks until there is an answer: the daemon has just been started.
func getWithin(t *testing.T, limit time.Duration, url string) []byte {
	t.Helper()
	var body []byte
	wait.For(t, limit, url, func() error {
		response, err := http.Get(url)
		if err != nil {
			return err
		}
		defer func() { _ = response.Body.Close() }()
		if body, err = io.ReadAll(response.Body); err == nil && response.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s", response.Status, body)
		}
		return err
	})
	return body
}

// shape is a JSON document with the kinds of its values in their places.
func shape(t *testing.T, text []byte) any {
	t.Helper()
	var document any
	if err := json.Unmarshal(text, &document); err != nil {
		t.Fatal(err)
	}
	var of func(v any) any
	of = func(v any) any {
		switch v := v.(type) {
		case map[string]any:
			for k := range v {
				v[k] = of(v[k])
			}
			return v
		case []any:
			for i := range v {
				v[i] = of(v[i])
			}
			return v
		default:
			return fmt.Sprintf("%T", v)
		}
	}
	return of(document)
}

// TestStatusPage has a daemon, its page in a browser, and targets that come to harm.
func TestStatusPage(t *testing.T) {
	for _, address := range []string{"10.0.0.2", "10.0.1.11", "10.0.1.12"} {
		if out, err := exec.Command("ip", "address", "add", address+"/32", "dev", "lo").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	nstest.Serve(t, "10.0.1.11:8080", greet)
	second := nstest.Serve(t, "10.0.1.12:8080", greet)
	socket := serving(t, pageConfig)

	const page = "http://127.0.0.1:9469/"
	overHTTP := shape(t, getWithin(t, 20*time.Second, page+"api/v1/status"))
	if diff := cmp.Diff(shape(t, command(t, "status", "--socket", socket, "-o", "json")), overHTTP); diff != "" {
		t.Errorf("nlb status -o json and api/v1/status differ:\n%s", diff)
	}

	tab := browser.Open(t, page)
	const card = `document.querySelector('[data-target="%s"]')?.innerText`
	shows := func(target, words string) { tab.Await(fmt.Sprintf(card+`.includes(%q)`, target, words)) }
	state := func(target, state string) {
		tab.Await(fmt.Sprintf(`document.querySelector('[data-target="%s"] .state')?.innerText === %q`, target, state))
	}
	state("10.0.1.11:8080", "healthy")
	state("10.0.1.12:8080", "healthy")

	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	state("10.0.1.12:8080", "unhealthy")
	shows("10.0.1.12:8080", "connection refused")

	command(t, "drain", "web", "10.0.1.11", "--socket", socket)
	state("10.0.1.11:8080", "draining")
	shows("10.0.1.11:8080", "left")
	shows("10.0.1.11:8080", "no new flows")

	command(t, "undrain", "web", "10.0.1.11", "--socket", socket)
	state("10.0.1.11:8080", "healthy")
}
