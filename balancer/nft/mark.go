package nft

// The conntrack mark of a flow of ours. The choice is made on the flow's first
// packet and kept here; other bits belong to other people and survive.
//
//	  31      30    29 …… 14   13 … 0
//	hairpin | snat | target |   free
//
// Ours are the topmost bits because the choice is merged into the mark by a
// shift over two registers: the only way to combine two of them before kernel
// 6.13.
const (
	MarkMask uint32 = markHairpin | markSNAT | TargetMask
	// TargetMask has the bits that name the target.
	TargetMask  uint32 = 0xffff << markShift
	markSNAT    uint32 = 1 << 30
	markHairpin uint32 = 1 << 31

	markShift = 14
	// relayed stands for the relay, which takes the flow and chooses itself.
	relayed = 1<<16 - 1
	// RelayedTarget is TargetMask's part of the relay's flows.
	RelayedTarget uint32 = relayed << markShift
	// awaiting stands for IPVS, which takes the flow and has not chosen yet. Only
	// a flow's first packet finds it, and only between two hooks.
	awaiting = relayed - 1
	// maxTargets is how many targets the mark can tell apart; 0 is nobody's.
	maxTargets = awaiting - 1
)

// A Mark is the part of a conntrack mark that is ours.
type Mark uint32

// Target is the number of the flow's target in its table, 0 if it has none.
func (m Mark) Target() uint16 { return uint16(uint32(m) & TargetMask >> markShift) }

// Relayed reports that the flow ends at the relay, whatever its target is.
func (m Mark) Relayed() bool { return m.Target() == relayed }

// SNAT reports that the flow's source is the balancer.
func (m Mark) SNAT() bool { return uint32(m)&markSNAT != 0 }

// Hairpin reports that client and target share a host.
func (m Mark) Hairpin() bool { return uint32(m)&markHairpin != 0 }

func markOf(target uint16, flags uint32) uint32 { return uint32(target)<<markShift | flags }
