package counting

// Parts of an nftables table. The names of links are those of a routed lab.
const (
	dnat = `
	chain prerouting {
		type nat hook prerouting priority dstnat
		ip daddr VIP tcp dport 80 dnat to jhash ip saddr . tcp sport mod 2 map { 0 : T0, 1 : T1 }
		ip daddr VIP udp dport 80 dnat to jhash ip saddr . udp sport mod 2 map { 0 : T0, 1 : T1 }
	}
`
	masquerade = `
	chain postrouting {
		type nat hook postrouting priority srcnat
		ct status dnat masquerade
	}
`
	offload = `
	flowtable fast {
		hook ingress priority filter
		devices = { c1, t1, t2 }
	}
	chain forward {
		type filter hook forward priority filter
		ct state established flow add @fast
	}
`
	// A rule about ct has the kernel track connections.
	track = `
	chain postrouting {
		type nat hook postrouting priority srcnat
		ct state invalid drop
	}
`
	trackAndMasquerade = `
	chain postrouting {
		type nat hook postrouting priority srcnat
		ct state invalid drop
		ct original ip daddr VIP masquerade
	}
`
)

// The smallest rulesets that do a job.
const (
	rulesDNAT        = "table ip minimal {" + dnat + "}\n"
	rulesSNAT        = "table ip minimal {" + dnat + masquerade + "}\n"
	rulesFast        = "table ip minimal {" + dnat + offload + "}\n"
	rulesFastSNAT    = "table ip minimal {" + dnat + masquerade + offload + "}\n"
	rulesTracked     = "table ip minimal {" + track + "}\n"
	rulesTrackedSNAT = "table ip minimal {" + trackAndMasquerade + "}\n"
)

// Services of IPVS with the scheduler that nlb has there.
const (
	commandsIPVS = `ip address add VIP/32 dev lo
ipvsadm -A -t VIP:80 -s mh -b mh-fallback,mh-port
ipvsadm -a -t VIP:80 -r T0:80 -m
ipvsadm -a -t VIP:80 -r T1:80 -m
ipvsadm -A -u VIP:80 -s mh -b mh-fallback,mh-port
ipvsadm -a -u VIP:80 -r T0:80 -m
ipvsadm -a -u VIP:80 -r T1:80 -m
`
	// IPVS tells connection tracking what it rewrites, or else nftables cannot
	// follow a flow of IPVS.
	commandsTracked = commandsIPVS + "sysctl -qw net.ipv4.vs.conntrack=1\n"
)
