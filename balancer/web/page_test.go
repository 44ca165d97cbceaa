package web

import (
	"flag"
	"fmt"
	"math"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp/kb"

	"nlb/balancer"
	"nlb/balancer/control"
	"nlb/internal/browser"
)

var update = flag.Bool("update", false, "take the picture of docs/status-page.md anew")

// picture is where that page has it, and maxPicture how many bytes it may have.
var picture = filepath.Join("..", "..", "docs", "img", "status-page.png")

const maxPicture = 200 << 10

// quick is the step of a recorder whose page a test waits for.
const quick = 100 * time.Millisecond

// open shows the page of a source in a browser.
func open(t *testing.T, source Source) (*browser.Tab, *recorder) {
	t.Helper()
	r := newRecorder(source)
	r.step = quick
	return openRecorder(t, r), r
}

func openRecorder(t *testing.T, r *recorder) *browser.Tab {
	t.Helper()
	server := httptest.NewServer(handler(r))
	t.Cleanup(server.Close) // after the browser's end, which ends the stream
	tab := browser.Open(t, server.URL+"/")
	tab.Resize(1280, 900)
	return tab
}

// card is JavaScript for the part of a target.
func card(target string) string {
	return fmt.Sprintf(`document.querySelector('[data-target=%q]')`, target)
}

// says is JavaScript for whether a part shows all of some words.
func says(part string, words ...string) string {
	var all []string
	for _, w := range words {
		all = append(all, fmt.Sprintf("%s?.innerText.includes(%q)", part, w))
	}
	return strings.Join(all, " && ")
}

// scene has targets in every state there is, at some time.
func scene(now time.Time) *control.Status {
	with := func(t control.Target, state balancer.State, reason, description string, since time.Duration) control.Target {
		t.State, t.Reason, t.Description, t.Since = state, reason, description, now.Add(-since)
		return t
	}
	flows := func(address string, perSecond float64) control.Target {
		t := targetAt(address, 0)
		age := now.Sub(epoch).Seconds()
		// Rates that swing, so that the charts are charts.
		total := uint64(perSecond * (age + 8*math.Sin(age/14+perSecond)))
		t.ActiveFlows, t.NewFlowsTotal, t.BytesTotal = count(uint64(40*perSecond)), count(total), count(total*12_000)
		t.Since = now.Add(-52 * time.Hour)
		return t
	}
	draining := with(flows("10.0.1.13", 0), balancer.Draining, balancer.ReasonDeregistrationInProgress, "", 100*time.Second)
	draining.Until, draining.EffectiveWeight, draining.ActiveFlows = now.Add(200*time.Second), 0, count(17)
	failed := with(flows("10.0.1.14", 0), balancer.Unhealthy, balancer.ReasonTimeout, "GET http://10.0.1.14:8080/: deadline exceeded after 6s", 8*time.Minute)
	failed.EffectiveWeight = 0
	held := with(flows("10.0.1.15", 0), balancer.Unhealthy, balancer.ReasonFailedHealthChecks, "", 20*time.Second)
	held.EffectiveWeight, held.Held = 0, &control.Held{Since: held.Since, Until: now.Add(40 * time.Second), Times: 1, Failures: 12}
	ending := with(flows("10.0.1.16", 0), balancer.UnhealthyDraining, balancer.ReasonFailedHealthChecks, "connection refused", 30*time.Second)
	ending.EffectiveWeight, ending.Until = 0, now.Add(270*time.Second)
	waiting := with(flows("10.0.2.11", 9), balancer.Initial, balancer.ReasonInitialHealthChecking, "", 4*time.Second)
	weighted := flows("10.0.2.12", 30)
	weighted.Weight, weighted.EffectiveWeight = 3, 3
	refused := func(address string) control.Target {
		return with(flows(address, 2), balancer.Unhealthy, balancer.ReasonFailedHealthChecks, "connection refused", 3*time.Minute)
	}
	open := groupOf("mail", refused("10.0.3.11"), refused("10.0.3.12"))
	open.FailOpen, open.ClientIP = true, balancer.ProxyProtocolV2
	unused := with(flows("10.0.4.11", 0), balancer.Unused, balancer.ReasonNotInUse, "", 52*time.Hour)

	https := listenerOf("https", 443, "web", "canary")
	https.Forward[0].Weight = 9
	status := statusOf([]control.Listener{https, listenerOf("smtp", 25, "mail")},
		groupOf("web", flows("10.0.1.11", 80), flows("10.0.1.12", 74), draining, failed, held, ending),
		groupOf("canary", waiting, weighted), open, groupOf("old", unused))
	status.Apply.ConvergedAt = now.Add(-3 * time.Second)
	status.Totals = map[string]uint64{"source_not_allowed_drops": 1204, "hairpins": 88, "no_target_drops": 0}
	return status
}

func TestPageShowsEveryState(t *testing.T) {
	r := newRecorder(&script{make: scene})
	// As if somebody had watched for five minutes.
	for at := time.Now().Add(-window); time.Since(at) > usualStep; at = at.Add(usualStep) {
		r.newest = r.record(scene(at), at)
	}
	tab := openRecorder(t, r)
	tab.Await(says(`document.getElementById('live')`, "live"))

	for target, words := range map[string][]string{
		"10.0.1.11:8080": {"healthy", "for 2d04h", "active", "new/s", "MB/s"},
		"10.0.1.13:8080": {"draining", "Target.DeregistrationInProgress", "left", "no new flows", "17 active"},
		"10.0.1.14:8080": {"unhealthy", "Target.Timeout: GET http://10.0.1.14:8080/: deadline exceeded after 6s", "for 8m00s"},
		"10.0.1.15:8080": {"held by passive health: 12 failed connections"},
		"10.0.1.16:8080": {"unhealthy.draining", "connection refused"},
		"10.0.2.11:8080": {"initial", "Elb.InitialHealthChecking"},
		"10.0.2.12:8080": {"weight 3"},
		"10.0.4.11:8080": {"unused", "Target.NotInUse"},
	} {
		tab.Await(says(card(target), words...))
	}
	tab.Await(card("10.0.1.13:8080") + `.querySelector('progress').value > 0.5`)
	tab.Await(says(`document.getElementById('alerts')`, "FAIL OPEN: too few targets of mail are healthy", "2 unhealthy"))
	tab.Await(says(`document.querySelector('[data-group=mail] .group')`, "FAIL OPEN"))
	tab.Await(says(`document.querySelector('[data-group=old] .listeners')`, "no listener"))
	tab.Await(says(`document.getElementById('totals')`, "source_not_allowed_drops", "1,204"))
	tab.Await(`document.title === '1 FAIL OPEN · 5 unhealthy · nlb'`)
	// Past and all: 5 minutes in steps of 2 seconds.
	tab.Await(card("10.0.1.11:8080") + `.querySelector('.spark path:last-child').getAttribute('d').split('L').length > 140`)

	// An edge for each target, for both ways of https and the one of smtp.
	if n := browser.Eval[int](tab, `document.querySelectorAll('#edges path').length`); n != 11+3 {
		t.Errorf("%d edges are drawn, want 14", n)
	}
	for kind, want := range map[string]int{"s-healthy": 3, "s-draining": 1, "s-initial": 1, "s-unhealthy.idle": 2} {
		if n := browser.Eval[int](tab, `document.querySelectorAll('#edges .`+kind+`').length`); n != want {
			t.Errorf("%d edges are %s, want %d", n, kind, want)
		}
	}

	png := tab.Screenshot()
	if len(png) > maxPicture {
		t.Errorf("the picture has %d bytes, more than %d", len(png), maxPicture)
	}
	if *update {
		if err := os.MkdirAll(filepath.Dir(picture), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(picture, png, 0o644); err != nil {
			t.Fatal(err)
		}
	}

	t.Run("contrast", func(t *testing.T) { checkContrast(t, tab) })
	t.Run("names", func(t *testing.T) { checkNames(t, tab) })
	t.Run("phone", func(t *testing.T) {
		tab.Resize(360, 740)
		if w := browser.Eval[int](tab, `document.documentElement.scrollWidth`); w > 360 {
			t.Errorf("the page is %d wide on a phone of 360", w)
		}
		if n := browser.Eval[int](tab, `[...document.querySelectorAll('#edges path')].filter((p) => p.getBBox().x < 0).length`); n > 0 {
			t.Errorf("%d edges leave the page", n)
		}
		checkContrast(t, tab)
	})
}

// lowContrast is JavaScript: texts whose contrast with what is behind them is less
// than the 4.5:1 of WCAG 2.2, 1.4.3, by the formula of its "relative luminance".
const lowContrast = `(() => {
	const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
	const rgba = (color) => {
		canvas.clearRect(0, 0, 1, 1);
		canvas.fillStyle = color;
		canvas.fillRect(0, 0, 1, 1);
		return [...canvas.getImageData(0, 0, 1, 1).data];
	};
	const luminance = ([r, g, b]) => {
		const [R, G, B] = [r, g, b].map((x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
		return 0.2126 * R + 0.7152 * G + 0.0722 * B;
	};
	const behind = (node) => {
		for (; node; node = node.parentElement) {
			const color = rgba(getComputedStyle(node).backgroundColor);
			if (color[3] === 255) return color;
		}
		return [255, 255, 255];
	};
	const found = [];
	let looked = 0;
	const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
	while (texts.nextNode()) {
		const node = texts.currentNode.parentElement;
		if (!texts.currentNode.data.trim() || !node.checkVisibility() || ['NOSCRIPT', 'OPTION'].includes(node.tagName)) continue;
		looked++;
		const [a, b] = [luminance(rgba(getComputedStyle(node).color)), luminance(behind(node))].sort((x, y) => y - x);
		const ratio = (a + 0.05) / (b + 0.05);
		if (ratio < 4.5) found.push(ratio.toFixed(2) + ' ' + texts.currentNode.data);
	}
	return looked < 30 ? ['only ' + looked + ' texts were looked at'] : found;
})()`

func checkContrast(t *testing.T, tab *browser.Tab) {
	t.Helper()
	backgrounds := make(map[string]bool)
	for _, scheme := range []string{"dark", "light"} {
		tab.Prefer("prefers-color-scheme", scheme)
		if found := browser.Eval[[]string](tab, lowContrast); len(found) > 0 {
			t.Errorf("%s: texts with a contrast below 4.5:1:\n%s", scheme, strings.Join(found, "\n"))
		}
		backgrounds[browser.Eval[string](tab, `getComputedStyle(document.body).backgroundColor`)] = true
	}
	if len(backgrounds) != 2 {
		t.Errorf("the schemes do not differ: %v", backgrounds)
	}
}

// checkNames looks at the page as a screen reader is told of it.
func checkNames(t *testing.T, tab *browser.Tab) {
	nodes := tab.Nodes()
	for _, n := range nodes {
		switch n.Role {
		case "button", "searchbox", "link", "progressbar", "region", "group", "image", "img":
			if n.Name == "" {
				t.Errorf("a %s has no name", n.Role)
			}
		}
	}
	for _, want := range []browser.Node{
		{Role: "main", Name: "Topology: listeners, target groups, targets"},
		{Role: "search", Name: "Filter the topology"},
		{Role: "searchbox", Name: "Filter by name, address or reason"},
		{Role: "heading", Name: "nlb"},
		{Role: "heading", Name: "web"},
		{Role: "region", Name: "target group web"},
		{Role: "group", Name: "listener https"},
		{Role: "list", Name: "targets of web"},
		{Role: "button", Name: "Collapse web"},
		{Role: "button", Name: "3 healthy"},
		{Role: "alert"},
		{Role: "status"},
	} {
		if !slices.Contains(nodes, want) {
			t.Errorf("a screen reader finds no %s %q", want.Role, want.Name)
		}
	}
}

func TestPageFollowsWithoutReload(t *testing.T) {
	source := &script{make: scene}
	tab, _ := open(t, source)
	tab.Await(says(card("10.0.1.11:8080"), "healthy"))
	browser.Eval[bool](tab, `window.since = 'the beginning', true`)
	// edit has a target of the scene be another from now on.
	edit := func(f func(status *control.Status, now time.Time)) {
		source.change(func(s *script) {
			was := s.make
			s.make = func(now time.Time) *control.Status {
				status := was(now)
				f(status, now)
				return status
			}
		})
	}

	failedAt := time.Now()
	edit(func(s *control.Status, _ time.Time) {
		target := &s.TargetGroups[0].Targets[0]
		target.State, target.Reason, target.Description, target.Since = balancer.Unhealthy, balancer.ReasonFailedHealthChecks, "connection refused", failedAt
		target.EffectiveWeight = 0
	})
	tab.Await(says(card("10.0.1.11:8080"), "unhealthy", "connection refused", "no new flows"))
	tab.Await(says(`document.getElementById('changes')`, "web 10.0.1.11:8080 unhealthy (Target.FailedHealthChecks)"))
	tab.Await(`document.getElementById('announcement').textContent === 'web 10.0.1.11:8080 unhealthy (Target.FailedHealthChecks)'`)
	tab.Await(`document.querySelectorAll('#edges .s-healthy').length === 2`)

	edit(func(s *control.Status, now time.Time) {
		target := &s.TargetGroups[1].Targets[1]
		target.State, target.Reason, target.Until, target.EffectiveWeight = balancer.Draining, balancer.ReasonDeregistrationInProgress, failedAt.Add(time.Hour), 0
	})
	tab.Await(says(card("10.0.2.12:8080"), "draining", "59m", "left"))
	edit(func(s *control.Status, _ time.Time) { s.TargetGroups[2].FailOpen = false })
	tab.Await(`!document.getElementById('alerts').innerText.includes('FAIL OPEN')`)
	edit(func(s *control.Status, _ time.Time) {
		s.Listeners = append(s.Listeners, listenerOf("dns", 53, "dns"))
		s.TargetGroups = append(s.TargetGroups, groupOf("dns", targetAt("10.0.5.11", 1)))
	})
	tab.Await(says(card("10.0.5.11:8080"), "healthy"))
	tab.Await(says(`document.querySelector('[data-group=dns] .listeners')`, "198.51.100.10:53"))
	edit(func(s *control.Status, _ time.Time) { s.TargetGroups = s.TargetGroups[1:] })
	tab.Await(card("10.0.1.11:8080") + ` === null`)
	edit(func(s *control.Status, _ time.Time) {
		s.Reload = control.Reload{Error: "nlb.yaml:12:11: listeners[0].port: 70000 is not a port (1-65535)"}
	})
	tab.Await(says(`document.getElementById('alerts')`, "The last reload failed, the former configuration stays in force: nlb.yaml:12:11: listeners[0].port"))
	edit(func(s *control.Status, _ time.Time) {
		s.Conntrack = &control.Conntrack{Count: 231_000, Max: 262_144, Alarm: true}
	})
	tab.Await(says(`document.getElementById('alerts')`, "The table of flows is almost full, and then new flows are dropped: 231k of 262k"))
	edit(func(s *control.Status, _ time.Time) {
		s.Apply.Held, s.Apply.Error = false, "apply: no such file or directory"
	})
	tab.Await(says(`document.getElementById('alerts')`, "The kernel does not hold this configuration: apply: no such file or directory"))

	source.change(func(s *script) { s.err = errNothing })
	tab.Await(says(`document.getElementById('alerts')`, "The daemon has nothing to tell: the daemon has not finished its first pass"))
	tab.Await(says(`document.getElementById('live')`, "not live"))
	source.change(func(s *script) { s.err = nil })
	tab.Await(`document.getElementById('live').innerText === 'live'`)
	if since := browser.Eval[string](tab, `window.since`); since != "the beginning" {
		t.Errorf("the page was loaded again")
	}
}

// hostile is a text that is harmless as text alone.
const hostile = `"><img src=x onerror="alert(1)"><script>alert(2)</script>'&lt;b&gt;javascript:alert(3)`

func TestHostileTextStaysText(t *testing.T) {
	source := &script{make: func(now time.Time) *control.Status {
		status := scene(now)
		status.Dataplane += hostile
		status.Apply.Held, status.Apply.Error, status.Apply.CountersError = false, hostile, hostile
		status.Totals[hostile] = 1
		status.Listeners[1].Name, status.Listeners[1].Forward[0].TargetGroup = hostile, hostile
		status.TargetGroups[2].Name = hostile
		target := &status.TargetGroups[0].Targets[3]
		target.Reason, target.Description = hostile, hostile
		if now.Nanosecond()/1e8%2 == 0 { // so that it is told as a change too
			target.Reason = ""
		}
		return status
	}}
	tab, _ := open(t, source)
	for _, part := range []string{
		`document.getElementById('summary')`, `document.getElementById('alerts')`, `document.getElementById('totals')`,
		`document.getElementById('changes')`, card("10.0.1.14:8080"),
		`document.querySelectorAll('.group')[2]`, `document.querySelectorAll('.listener')[1]`,
	} {
		tab.Await(says(part, hostile))
	}
	if n := browser.Eval[int](tab, `document.querySelectorAll('img, body script, b, [onerror]').length`); n > 0 {
		t.Errorf("%d elements were made of text", n)
	}
	// Even a mistake could not: the browser refuses to make HTML of a string.
	refused := browser.Eval[bool](tab, `(() => { try { document.body.innerHTML = '<b>text</b>'; return false; } catch (e) { return e instanceof TypeError; } })()`)
	if said := tab.Problems(); !refused || len(said) != 1 || !strings.Contains(said[0], "TrustedHTML") {
		t.Errorf("the policy lets a script make HTML of a string: %q", said)
	}
}

func TestPageOfManyGroups(t *testing.T) {
	source := &script{make: func(now time.Time) *control.Status {
		status := crowd(100, 100, uint64(now.Sub(epoch).Seconds()))
		for i := range 5 {
			target := &status.TargetGroups[42].Targets[10*i]
			target.State, target.Reason, target.EffectiveWeight = balancer.Unhealthy, balancer.ReasonTimeout, 0
		}
		return status
	}}
	r := newRecorder(source) // with the usual step: other tests look whether events come
	tab := openRecorder(t, r)
	tab.Await(says(`document.getElementById('summary')`, "100 listeners, 100 target groups, 10000 targets"))
	shown := func() int { return browser.Eval[int](tab, `document.querySelectorAll('.target').length`) }
	rows := func() int { return browser.Eval[int](tab, `document.querySelectorAll('.row:not([hidden])').length`) }
	if shown() != troubledTargets || rows() != 100 {
		t.Errorf("%d targets of %d groups are shown at first, want the first %d that failed, of 100", shown(), rows(), troubledTargets)
	}

	// By keyboard alone: the group's button is reached, and works.
	browser.Eval[bool](tab, `document.querySelector('[data-group=group-042] .group button').focus(), true`)
	tab.Press(kb.Enter)
	tab.Await(`document.querySelector('[data-group=group-042] .group button').getAttribute('aria-expanded') === 'true'`)
	if n := shown(); n != 100 {
		t.Errorf("%d targets are shown of an expanded group, want 100", n)
	}
	tab.Press(" ")
	tab.Await(`document.querySelector('[data-group=group-042] .group button').getAttribute('aria-expanded') === 'false'`)

	// Tab leads from the filter to the states.
	browser.Eval[bool](tab, `document.getElementById('query').focus(), true`)
	tab.Press(kb.Tab + kb.Tab)
	if state := browser.Eval[string](tab, `document.activeElement.dataset.state`); state != "unhealthy" {
		t.Errorf("two tabs behind the filter is %q, want the button of unhealthy targets", state)
	}
	tab.Press(kb.Enter)
	tab.Await(`document.querySelectorAll('.target').length === 5 && document.querySelectorAll('.row:not([hidden])').length === 1`)
	tab.Press(kb.Enter)
	tab.Await(`document.querySelectorAll('.row:not([hidden])').length === 100`)

	for query, want := range map[string][2]int{ // rows, targets
		"10.7.0.33:": {1, 1},
		"group-01":   {10, 1000},
		":1042":      {1, 100}, // the listener's port
		"timeout":    {1, 5},
		"nowhere":    {0, 0},
	} {
		browser.Eval[bool](tab, fmt.Sprintf(`(() => {
			const input = document.getElementById('query');
			input.value = %q;
			return input.dispatchEvent(new Event('input'));
		})()`, query))
		got := [2]int{rows(), browser.Eval[int](tab, `document.querySelectorAll('.row:not([hidden]) .target').length`)}
		if got != want {
			t.Errorf("%q shows %d groups with %d targets, want %d with %d", query, got[0], got[1], want[0], want[1])
		}
	}
	tab.Await(says(`document.getElementById('empty')`, "Nothing matches the filter."))
}

// troubledTargets are shown of a group that is collapsed.
const troubledTargets = 3
