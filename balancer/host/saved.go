package host

import (
	"fmt"
	"io/fs"
	"strconv"
	"strings"

	"nlb/balancer"
)

// savedIn is where stateDir keeps what the sysctls were, oldest first.
func savedIn(stateDir string) balancer.Records[record] {
	return balancer.Records[record]{Dir: stateDir, Name: "sysctls.json", Check: record.check}
}

// check lets nothing through that could be written anywhere but below
// /proc/sys/net.
func (r record) check() error {
	for _, s := range append(r.undo(), setting{r.Key, r.Ours}) {
		if !fs.ValidPath(s.Key) || !strings.HasPrefix(s.Key, "net/") {
			return fmt.Errorf("%q is no network setting", s.Key)
		}
		if _, err := strconv.Atoi(s.Value); err != nil {
			return fmt.Errorf("%s: %q is no value", s.Key, s.Value)
		}
	}
	return nil
}
