package lab

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"nlb/internal/wait"
)

func TestStream(t *testing.T) {
	const flows = 4
	_, client, target := pair(t)
	target.serve(t, Serve{Ports: []uint16{8080}})
	for _, reopen := range []bool{false, true} {
		run, err := client.Agent().Stream(soon(t), Stream{
			Call: Call{Network: "tcp", Dst: port(target, 8080), N: flows}, Interval: time.Millisecond, Reopen: reopen,
		})
		if err != nil {
			t.Fatal(err)
		}
		whole := met(t, run, "all answered", func(s Streamed) bool { return s.Open == flows && s.Lines > 20*flows })
		if whole.Failed > 0 || whole.Opened != flows {
			t.Errorf("reopen %v: %v", reopen, whole)
		}
		target.Agent().Kill()
		broken := met(t, run, "broken", func(s Streamed) bool { return s.Open == 0 && s.Failed >= flows })
		// Those that are opened anew meet nobody.
		was := slices.DeleteFunc(broken.Failures, func(f Failure) bool { return reopen && f.Who == "" })
		if len(was) != flows || slices.ContainsFunc(was, func(f Failure) bool {
			return f.Who != "t1" || f.Err != Reset && f.Err != Closed || f.Ended.Before(f.Began)
		}) {
			t.Errorf("reopen %v: failures %+v", reopen, was)
		}
		target.serve(t, Serve{Ports: []uint16{8080}})
		if reopen {
			met(t, run, "opened anew", func(s Streamed) bool { return s.Open == flows })
		}
		end, err := run.Stop(soon(t))
		if err != nil || reopen != (end.Open == flows) || !reopen && end.Opened != flows {
			t.Errorf("reopen %v: stopped with %v: %v", reopen, end, err)
		}
		if _, err := run.Load(soon(t)); err == nil {
			t.Error("it still counts")
		}
	}
	if _, err := client.Agent().Stream(soon(t), Stream{Call: Call{Network: "udp"}}); err == nil {
		t.Error("a stream was accepted for udp")
	}
}

// met waits until what goes on has counted something.
func met[T any](t *testing.T, run *Going[T], what string, cond func(T) bool) T {
	t.Helper()
	ctx := soon(t)
	var counts T
	wait.Until(t, limit, what, func() bool {
		var err error
		if counts, err = run.Load(ctx); err != nil {
			t.Fatalf("never %s: %v", what, err)
		}
		return cond(counts)
	}, func() string { return fmt.Sprintf("%+v", counts) })
	return counts
}

// TestBurst has targets that answer wrongly.
func TestBurst(t *testing.T) {
	for _, tt := range []struct {
		name    string
		answers []Answer
		want    string // how the error begins; empty for none
	}{
		{"in order", []Answer{{Who: "t1", Got: numbered(0)}, {Who: "t1", Got: numbered(1)}}, ""},
		{"one is lost", []Answer{{Who: "t1", Got: numbered(1)}}, OutOfOrder},
		{"one comes twice", []Answer{{Who: "t1", Got: numbered(0)}, {Who: "t1", Got: numbered(0)}}, OutOfOrder},
		{"one is cut off", []Answer{{Who: "t1", Got: numbered(0)[1:]}}, OutOfOrder},
		{"another target", []Answer{{Who: "t1", Got: numbered(0)}, {Who: "t2", Got: numbered(1)}}, Moved},
		{"another target than before", []Answer{{Who: "t2", Got: numbered(0)}}, Moved},
	} {
		near, far := net.Pipe()
		go func() {
			defer far.Close()
			lines := bufio.NewReader(far)
			for range 2 {
				if _, err := lines.ReadString('\n'); err != nil {
					return
				}
			}
			for _, a := range tt.answers {
				if json.NewEncoder(far).Encode(a) != nil {
					return
				}
			}
		}()
		f := &flow{Conn: near, lines: bufio.NewReaderSize(near, 1024)}
		_, err := f.burst(2, "t1", time.Minute)
		f.close()
		if tt.want == "" != (err == nil) || err != nil && !strings.HasPrefix(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}
