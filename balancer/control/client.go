package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"syscall"
)

// ErrNotRunning is wrapped when no daemon answers on the socket.
var ErrNotRunning = errors.New("no daemon answers")

// What a status of ten thousand targets needs, ten times over.
const maxAnswer = 64 << 20

// A Client speaks to a daemon.
type Client struct {
	socket string
	http   *http.Client
}

// NewClient returns a Client of the daemon on the socket at path. It connects
// when it is asked something, and keeps no connection.
func NewClient(path string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}
	return &Client{socket: path, http: &http.Client{
		Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true},
	}}
}

// Status asks what the daemon does.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	var status Status
	if err := c.ask(ctx, http.MethodGet, statusPath, nil, &status); err != nil {
		return nil, err
	}
	return &status, nil
}

// Reload makes the daemon read its file again and waits for what comes of it.
func (c *Client) Reload(ctx context.Context) error {
	return c.ask(ctx, http.MethodPost, reloadPath, nil, &struct{}{})
}

// Drain deregisters a target.
func (c *Client) Drain(ctx context.Context, t TargetName) error {
	return c.ask(ctx, http.MethodPost, drainPath, t, &struct{}{})
}

// Undrain registers a target again.
func (c *Client) Undrain(ctx context.Context, t TargetName) error {
	return c.ask(ctx, http.MethodPost, undrainPath, t, &struct{}{})
}

// ask sends question, unless it is nil, and reads the answer.
func (c *Client) ask(ctx context.Context, method, path string, question, into any) error {
	resp, err := c.send(ctx, method, path, question)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err == nil {
		err = json.Unmarshal(body, into)
	}
	if err != nil {
		return fmt.Errorf("answer of the daemon on %s: %w", c.socket, err)
	}
	return nil
}

// send sends question, unless it is nil. The answer's body is the caller's to close;
// one that says what is wrong is that error.
func (c *Client) send(ctx context.Context, method, path string, question any) (*http.Response, error) {
	if err := checkPath(c.socket); err != nil {
		return nil, err
	}
	var content bytes.Buffer
	if question != nil {
		if err := json.NewEncoder(&content).Encode(question); err != nil {
			return nil, err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://nlb"+path, &content)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("%w on %s: start it with nlb serve, or name its socket with --socket", ErrNotRunning, c.socket)
	case err != nil:
		return nil, fmt.Errorf("ask the daemon on %s: %w", c.socket, errors.Unwrap(err)) // without the made-up URL
	case resp.StatusCode == http.StatusOK:
		return resp, nil
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("answer of the daemon on %s: %w", c.socket, err)
	}
	var f failure
	if json.Unmarshal(body, &f) != nil || f.Error == "" {
		f.Error = resp.Status
	}
	return nil, errors.New(f.Error)
}
