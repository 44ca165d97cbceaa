package peers

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Nginx is nginx with its stream module. Its open version has no health checks:
// a server is dead for a time after a client's connection to it failed.
type Nginx struct {
	Listeners []Listener
	// SendProxy announces clients to servers with a PROXY header of version 1,
	// the only one that the module knows.
	SendProxy bool
	// Connect is how long a server may take to accept; 0 is a minute, the default
	// of proxy_connect_timeout.
	Connect time.Duration
	// Module is the path of the stream module, as from StreamModule. PIDFile is
	// where the master writes its id.
	Module, PIDFile string
}

// Config is the configuration file. A connection that a server refuses, or does
// not accept in time, goes to the next one (proxy_next_upstream), and the server
// gets no other for 10 seconds (max_fails=1 and fail_timeout=10s, the defaults).
// There are two descriptors for each connection, whatever the limit is otherwise.
func (n Nginx) Config() string {
	var b strings.Builder
	fmt.Fprintf(&b, "load_module %s;\ndaemon off;\nuser root;\nworker_processes 1;\nworker_rlimit_nofile 16384;\nerror_log stderr;\npid %s;\nevents { worker_connections 8192; }\nstream {\n    access_log off;\n", n.Module, n.PIDFile)
	if n.Connect > 0 {
		fmt.Fprintf(&b, "    proxy_connect_timeout %dms;\n", n.Connect.Milliseconds())
	}
	if n.SendProxy {
		b.WriteString("    proxy_protocol on;\n")
	}
	for i, l := range n.Listeners {
		fmt.Fprintf(&b, "    upstream bench-%d {\n", i)
		for _, s := range l.Servers {
			fmt.Fprintf(&b, "        server %s max_fails=1 fail_timeout=10s;\n", s)
		}
		fmt.Fprintf(&b, "    }\n    server { listen %s backlog=4096; proxy_pass bench-%d; }\n", l.At, i)
	}
	b.WriteString("}\n")
	return b.String()
}

// Command is a command line that runs the program with a configuration file; its
// other files are relative to the file's folder. SIGHUP to the process reloads
// the file.
func (Nginx) Command(program, file string) []string {
	return []string{program, "-p", filepath.Dir(file), "-e", "stderr", "-c", file}
}

// streamModules are where distributions put nginx's module.
var streamModules = []string{"/usr/lib/nginx/modules/ngx_stream_module.so", "/usr/lib64/nginx/modules/ngx_stream_module.so"}

// StreamModule is the path of nginx's stream module. It is an error if there is
// none, which says where it was looked for and what to install.
func StreamModule() (string, error) {
	for _, path := range streamModules {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("needs nginx's stream module: apt-get install libnginx-mod-stream: there is none of %s", strings.Join(streamModules, ", "))
}
