// Package browser looks at pages as people do: in Chromium. Tests of a page drive
// it over its debugging pipe, in the network namespace of the test (nstest).
package browser

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/accessibility"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
)

// patience bounds each wait. Chromium is 300 MB to read from the disk where it has
// not run for a while, which was seen to take 35 seconds.
const patience = 2 * time.Minute

// A Tab shows one page. Its methods fail the test on the spot.
type Tab struct {
	t      testing.TB
	ctx    context.Context
	origin string

	mu       sync.Mutex
	problems []string
}

// Open starts a browser, which ends with the test, and loads a page. The test
// fails in the end if the page wrote an error or a warning to the console, had an
// uncaught exception, or asked for anything beyond its own origin.
func Open(t testing.TB, address string) *Tab {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	// Chromium's sandbox does not run as root.
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.NoSandbox, chromedp.DisableGPU)
	allocated, release := chromedp.NewExecAllocator(context.Background(), options...)
	t.Cleanup(release)
	ctx, end := chromedp.NewContext(allocated)
	t.Cleanup(end)
	tab := &Tab{t: t, ctx: ctx, origin: u.Scheme + "://" + u.Host}
	t.Cleanup(func() {
		if err := chromedp.Cancel(ctx); err != nil {
			t.Errorf("end Chromium: %v", err)
		}
		for _, p := range tab.Problems() {
			t.Error(p)
		}
	})
	// The first use starts the browser, which lives as long as this context.
	if err := chromedp.Listen(ctx, tab.note); err != nil {
		t.Fatalf("start Chromium: %v", err)
	}
	tab.do(chromedp.Navigate(address))
	return tab
}

// note runs in the loop that reads the browser's messages.
func (b *Tab) note(event any) {
	problem := ""
	switch e := event.(type) {
	case *runtime.EventConsoleAPICalled:
		if e.Type == "error" || e.Type == "warning" || e.Type == "assert" {
			problem = fmt.Sprintf("the console has a message of type %s: %v", e.Type, texts(e.Args))
		}
	case *runtime.EventExceptionThrown:
		problem = fmt.Sprintf("uncaught exception: %v", e.ExceptionDetails)
	case *log.EventEntryAdded:
		if e.Entry.Level == "error" || e.Entry.Level == "warning" {
			problem = fmt.Sprintf("the browser says: %s (%s)", e.Entry.Text, e.Entry.URL)
		}
	case *network.EventRequestWillBeSent:
		if !strings.HasPrefix(e.Request.URL, b.origin+"/") {
			problem = "the page asked for " + e.Request.URL
		}
	}
	if problem != "" {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.problems = append(b.problems, problem)
	}
}

// Problems are what the test would fail for in the end, and are forgotten: who
// provokes one expects it.
func (b *Tab) Problems() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	found := b.problems
	b.problems = nil
	return found
}

func texts(args []*runtime.RemoteObject) []string {
	var words []string
	for _, a := range args {
		words = append(words, a.Description+string(a.Value))
	}
	return words
}

// do runs actions, each for as long as it may take in a test.
func (b *Tab) do(steps ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, patience)
	defer cancel()
	if err := chromedp.Do(ctx, steps...); err != nil {
		b.t.Fatalf("%v\nthe page:\n%s", err, b.text())
	}
}

// Eval returns what a JavaScript expression comes to; of a promise, what that does.
func Eval[T any](b *Tab, expression string) T {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, patience)
	defer cancel()
	v, err := chromedp.Run(ctx, chromedp.Evaluate[T](expression, chromedp.EvalAwaitPromise))
	if err != nil {
		b.t.Fatalf("%s: %v\nthe page:\n%s", expression, err, b.text())
	}
	return v
}

// Await waits until a JavaScript expression is true, looking again whenever the
// page changes.
func (b *Tab) Await(condition string) {
	b.t.Helper()
	Eval[bool](b, `new Promise((done) => {
		const look = () => { if (`+condition+`) { observer.disconnect(); done(true); } };
		const observer = new MutationObserver(look);
		observer.observe(document, { subtree: true, childList: true, attributes: true, characterData: true });
		look();
	})`)
}

// text is what a reader sees, for messages of tests.
func (b *Tab) text() string {
	ctx, cancel := context.WithTimeout(b.ctx, 5*time.Second)
	defer cancel()
	text, err := chromedp.Run(ctx, chromedp.Evaluate[string](`document.body.innerText`))
	if err != nil {
		return err.Error()
	}
	return text
}

// Press presses keys, of package kb.
func (b *Tab) Press(keys string) {
	b.t.Helper()
	b.do(chromedp.KeyEvent(keys))
}

// Resize gives the page another width and height, in CSS pixels.
func (b *Tab) Resize(width, height int64) {
	b.t.Helper()
	b.do(chromedp.EmulateViewport(width, height))
}

// Prefer answers a media feature, such as prefers-color-scheme.
func (b *Tab) Prefer(feature, value string) {
	b.t.Helper()
	b.do(chromedp.Func(func(ctx context.Context, _ *chromedp.Target) error {
		_, err := chromedp.Call(ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
			Features: []*emulation.MediaFeature{{Name: feature, Value: value}},
		})
		return err
	}))
}

// Screenshot is the visible part of the page, as a PNG.
func (b *Tab) Screenshot() []byte {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, patience)
	defer cancel()
	png, err := chromedp.Run(ctx, chromedp.CaptureScreenshot())
	if err != nil {
		b.t.Fatal(err)
	}
	return png
}

// A Node is what a screen reader is told of a part of the page.
type Node struct{ Role, Name string }

// Nodes is the accessibility tree, in the order of the page, as a list.
func (b *Tab) Nodes() []Node {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, patience)
	defer cancel()
	tree, err := chromedp.Call(ctx, accessibility.GetFullAXTree, accessibility.GetFullAXTreeParams{})
	if err != nil {
		b.t.Fatal(err)
	}
	var nodes []Node
	for _, n := range tree.Nodes {
		if !n.Ignored {
			nodes = append(nodes, Node{word(n.Role), word(n.Name)})
		}
	}
	return nodes
}

func word(v *accessibility.Value) string {
	var text string
	if v == nil || json.Unmarshal(v.Value, &text) != nil {
		return "" // no string, no word
	}
	return text
}
