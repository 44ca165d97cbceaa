package nstest

import (
	"bufio"
	"fmt"
	"net"
	"testing"
)

func TestServe(t *testing.T) {
	const at = "127.0.0.1:8080"
	t.Run("serving", func(t *testing.T) {
		Serve(t, at, func(c net.Conn) {
			line, _ := bufio.NewReader(c).ReadString('\n')
			_, _ = fmt.Fprintf(c, "heard %s", line)
		})
		for range 2 {
			c, err := net.Dial("tcp", at)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := fmt.Fprintln(c, "hello"); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewScanner(c)
			if !lines.Scan() || lines.Text() != "heard hello" || lines.Scan() {
				t.Errorf("heard %q, %v; want one answer and the end", lines.Text(), lines.Err())
			}
		}
	})
	if c, err := net.Dial("tcp", at); err == nil {
		c.Close()
		t.Error("it serves after its test")
	}
}
