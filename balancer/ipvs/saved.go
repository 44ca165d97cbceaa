package ipvs

import (
	"fmt"
	"slices"

	"nlb/balancer"
)

// savedFile is in the state folder.
const savedFile = "ipvs.json"

// savedIn is where stateDir keeps what the settings were.
func savedIn(stateDir string) balancer.Records[record] {
	return balancer.Records[record]{Dir: stateDir, Name: savedFile, Check: record.check}
}

// check lets nothing through but settings of IPVS.
func (r record) check() error {
	if r.Name != timeoutTCP && r.Name != timeoutUDP && !slices.Contains(sysctls, r.Name) {
		return fmt.Errorf("%q is no setting of IPVS", r.Name)
	}
	if len(r.Ours) == 0 {
		return fmt.Errorf("%q has no value of ours", r.Name)
	}
	return nil
}
