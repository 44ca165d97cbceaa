package balancer

// A Dataplane is what in the kernel chooses the destination of a new flow.
type Dataplane uint8

const (
	// NFTables chooses and rewrites by rules of nftables alone.
	NFTables Dataplane = iota
	// IPVS chooses and rewrites by the kernel's virtual server; rules of
	// nftables do what it cannot.
	IPVS
)

var dataplaneNames = map[Dataplane]string{NFTables: "nftables", IPVS: "ipvs"}

func (d Dataplane) String() string               { return enumName(dataplaneNames, d) }
func (d Dataplane) MarshalText() ([]byte, error) { return enumText(dataplaneNames, d) }
func (d *Dataplane) UnmarshalText(b []byte) error {
	return enumParse(dataplaneNames, d, b, "nftables or ipvs")
}
