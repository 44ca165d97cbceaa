package vm

import (
	"bufio"
	"fmt"
	"io"
	"path"
	"strings"
)

// wanted are the modules that every guest loads before the first test: nothing
// in it could load one on demand, and a library may look for a feature only
// once per process.
var wanted = []string{
	"virtio_mmio", "virtio_console", // the port that results leave by

	"ip_vs", "ip_vs_rr", "ip_vs_wrr", "ip_vs_lc", "ip_vs_wlc", "ip_vs_sh", "ip_vs_mh",

	"nf_conntrack", "nf_conntrack_netlink", "nfnetlink_cttimeout", "nfnetlink_log", "nfnetlink_queue",
	"nf_nat", "nf_tables", "nft_chain_nat", "nft_ct", "nft_nat", "nft_masq", "nft_redir", "nft_hash", "nft_numgen",
	"nft_limit", "nft_log", "nft_reject_inet", "nft_fib_inet", "nft_quota", "nft_connlimit", "nft_synproxy",
	"nft_socket", "nft_tproxy", "nft_compat", "xt_conntrack", "xt_nat", "xt_mark", "xt_connmark",
	"nf_flow_table", "nf_flow_table_inet", "nft_flow_offload",

	"dummy", "veth", "bridge", "br_netfilter", "macvlan", "8021q",
	"sch_netem", "sch_ingress", "act_mirred", "cls_u32", "tun", "af_packet", "inet_diag", "tcp_diag", "udp_diag",
}

// former are modules as well, where they haven't become part of another.
var former = []string{"nft_objref"}

// A Modules is what depmod(8) knows of a kernel's modules.
type Modules struct {
	files   map[string]string   // module → file, relative to the kernel's folder of modules
	needs   map[string][]string // module → modules that come first, as modules.dep has them
	builtin map[string]bool
}

// ParseModules reads modules.dep and modules.builtin (modules.dep(5)).
func ParseModules(dep, builtin io.Reader) (*Modules, error) {
	m := &Modules{files: make(map[string]string), needs: make(map[string][]string), builtin: make(map[string]bool)}
	lines := bufio.NewScanner(dep)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		file, needs, ok := strings.Cut(lines.Text(), ":")
		if !ok {
			return nil, fmt.Errorf("modules.dep: %q has no colon", lines.Text())
		}
		name := moduleName(file)
		m.files[name] = file
		for _, f := range strings.Fields(needs) {
			m.needs[name] = append(m.needs[name], moduleName(f))
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("modules.dep: %w", err)
	}
	lines = bufio.NewScanner(builtin)
	for lines.Scan() {
		m.builtin[moduleName(lines.Text())] = true
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("modules.builtin: %w", err)
	}
	return m, nil
}

// moduleName is a module's name as /proc/modules has it: the file without its
// suffixes, underscores for hyphens.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// Have reports whether the kernel has a file for a module.
func (m *Modules) Have(name string) bool { return m.files[moduleName(name)] != "" }

// Order lists the files to load for the named modules, each once and after all
// that it needs. What is built into the kernel needs no file.
func (m *Modules) Order(names []string) ([]string, error) {
	var files []string
	const begun, done = 1, 2
	state := make(map[string]int)
	var visit func(name, because string) error
	visit = func(name, because string) error {
		file, ok := m.files[name]
		switch {
		case state[name] == done || !ok && m.builtin[name]:
			return nil
		case !ok:
			return fmt.Errorf("this kernel has no module %s%s", name, because)
		case state[name] == begun:
			return fmt.Errorf("module %s needs itself", name)
		}
		state[name] = begun
		for _, need := range m.needs[name] {
			if err := visit(need, ", which "+name+" needs"); err != nil {
				return err
			}
		}
		state[name] = done
		files = append(files, file)
		return nil
	}
	for _, name := range names {
		if err := visit(moduleName(name), ""); err != nil {
			return nil, err
		}
	}
	return files, nil
}
