package balancer

// ProbeMark is the firewall mark (SO_MARK, socket(7)) on every packet of a
// health check. Rules of ours leave marked packets alone, so that a probe
// reaches its target and never a VIP's listener, and a policy rule of the
// operator can steer probes. The bytes spell "nlb" and the number 1: a value
// that other software is unlikely to have chosen.
const ProbeMark uint32 = 0x6e6c6201

// PromptMark is the firewall mark on the segments that make both ends of a flow
// speak, so that they can be told it has ended. Connection tracking must not see
// those segments: they belong to no flow that it could know.
const PromptMark uint32 = 0x6e6c6202
