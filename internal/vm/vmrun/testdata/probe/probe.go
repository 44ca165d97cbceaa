// Package probe ends in all the ways in which a test binary may end.
package probe

// Half has one statement that its tests reach, and one that they don't.
func Half(all bool) int {
	if all {
		return 2
	}
	return 1
}
