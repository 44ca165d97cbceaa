package main

import (
	"nlb/bench/change"
	"nlb/bench/counting"
	"nlb/bench/growth"
	"nlb/bench/part"
	"nlb/bench/traffic"
)

// parts are all that can be measured, in the order in which they are.
var parts = []part.Part{traffic.Part, growth.Part, change.Part, counting.Part}
