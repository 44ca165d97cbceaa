package measure

import "testing"

func TestSoftirqsApart(t *testing.T) {
	const with = "CONFIG_TICK_CPU_ACCOUNTING=y\nCONFIG_IRQ_TIME_ACCOUNTING=y\n"
	const without = "# CONFIG_IRQ_TIME_ACCOUNTING is not set\n"
	for _, tt := range []struct {
		config, parameters string
		want               bool
	}{
		{with, "quiet\n", true},
		{with, "quiet tsc=noirqtime\n", false},
		{without, "quiet\n", false},
		{"", "", false},
	} {
		if got := softirqsApart(tt.config, tt.parameters); got != tt.want {
			t.Errorf("%q with %q: %v", tt.config, tt.parameters, got)
		}
	}
	if _, err := SoftirqsApart(); err != nil {
		t.Error(err)
	}
}
