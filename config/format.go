package config

import (
	"encoding"
	"encoding/json"
	"fmt"
	"math"
	"net"
	"net/netip"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/invopop/jsonschema"

	"nlb/balancer"
)

// show is how a word appears in a message: numbers bare, text in quotes.
func show(w word) string {
	if !w.quoted && numberLike.MatchString(w.text) {
		return w.text
	}
	return quote(w.text)
}

var numberLike = regexp.MustCompile(`^[+-]?[0-9][0-9a-zA-Zµ._+-]{0,39}$`)

// ---- words ----

// words are the choices that the tag enum lists, separated by "|".
type words struct{}

func (words) parse(w word, tag reflect.StructTag) (string, *fault) {
	choices := words{}.choices(tag)
	for _, c := range choices {
		if w.text == c {
			return c, nil
		}
	}
	return "", notChoice(w, choices, words{}.want(tag))
}

func (words) choices(tag reflect.StructTag) []string { return strings.Split(tag.Get("enum"), "|") }

func (words) want(tag reflect.StructTag) string {
	quoted := words{}.choices(tag)
	for i, c := range quoted {
		if c == "" {
			quoted[i] = `""`
		}
	}
	return list(quoted)
}

func (words) schema(tag reflect.StructTag) *jsonschema.Schema {
	return enumSchema(words{}.choices(tag))
}

func notChoice(w word, choices []string, want string) *fault {
	if hint := didYouMean(w.text, choices); hint != "" {
		want = hint + " " + want
	}
	return &fault{show(w) + " is not a choice", want}
}

func enumSchema(choices []string) *jsonschema.Schema {
	node := &jsonschema.Schema{Type: "string"}
	for _, c := range choices {
		node.Enum = append(node.Enum, c)
	}
	return node
}

// enum has the choices of one of balancer's types. The tag meaning may explain
// them.
type enum[E enumValue, P enumPointer[E]] struct{}

type enumValue interface {
	~uint8
	encoding.TextMarshaler
}

type enumPointer[E any] interface {
	*E
	encoding.TextUnmarshaler
}

func (enum[E, P]) parse(w word, tag reflect.StructTag) (E, *fault) {
	var e E
	if err := P(&e).UnmarshalText([]byte(w.text)); err != nil {
		return e, notChoice(w, enum[E, P]{}.choices(), enum[E, P]{}.want(tag))
	}
	return e, nil
}

func (enum[E, P]) choices() []string {
	var choices []string
	for i := range math.MaxUint8 {
		if text, err := E(i).MarshalText(); err == nil {
			choices = append(choices, string(text))
		}
	}
	return choices
}

func (enum[E, P]) want(tag reflect.StructTag) string {
	if m := tag.Get("meaning"); m != "" {
		return m
	}
	return list(enum[E, P]{}.choices())
}

func (enum[E, P]) schema(reflect.StructTag) *jsonschema.Schema {
	return enumSchema(enum[E, P]{}.choices())
}

// boolean is true or false. YAML 1.1's yes, no, on and off are not.
type boolean struct{}

func (boolean) parse(w word, tag reflect.StructTag) (bool, *fault) {
	switch {
	case w.quoted && (w.text == "true" || w.text == "false"):
		return false, &fault{show(w) + " is text", w.text + ", without quotes"}
	case !w.quoted && w.text == "true":
		return true, nil
	case !w.quoted && w.text == "false":
		return false, nil
	}
	return false, &fault{what: show(w) + " is not a boolean"}
}

func (boolean) want(reflect.StructTag) string { return "true or false" }
func (boolean) schema(reflect.StructTag) *jsonschema.Schema {
	return &jsonschema.Schema{Type: "boolean"}
}

// ---- numbers ----

// integer is a decimal number within the tag range, "0-999" or "0-".
type integer struct{}

func (integer) parse(w word, tag reflect.StructTag) (int, *fault) {
	low, high := integer{}.limits(tag)
	n, bad := decimal(w)
	if bad != nil {
		return 0, bad
	}
	if n < int64(low) || n > int64(high) {
		return 0, &fault{what: show(w) + " is out of range"}
	}
	return int(n), nil
}

func (integer) limits(tag reflect.StructTag) (low, high int) {
	first, last, _ := strings.Cut(tag.Get("range"), "-")
	low, _ = strconv.Atoi(first)
	if last == "" {
		return low, math.MaxInt32
	}
	high, _ = strconv.Atoi(last)
	return low, high
}

func (integer) want(tag reflect.StructTag) string {
	if limits := tag.Get("range"); !strings.HasSuffix(limits, "-") {
		return limits
	}
	low, _ := integer{}.limits(tag)
	return fmt.Sprintf("%d or more", low)
}

func (integer) schema(tag reflect.StructTag) *jsonschema.Schema {
	low, high := integer{}.limits(tag)
	return numberSchema(low, high)
}

func numberSchema(low, high int) *jsonschema.Schema {
	node := &jsonschema.Schema{Type: "integer", Minimum: json.Number(strconv.Itoa(low))}
	if high < math.MaxInt32 {
		node.Maximum = json.Number(strconv.Itoa(high))
	}
	return node
}

var (
	digits      = regexp.MustCompile(`^-?[0-9]+$`)
	leadingZero = regexp.MustCompile(`^[+-]?0[0-9]+$`)
)

// decimal reads a number. YAML 1.1 reads 010 as 8 and YAML 1.2 as 10, so neither
// is believed.
func decimal(w word) (int64, *fault) {
	switch {
	case leadingZero.MatchString(w.text):
		return 0, &fault{show(w) + " has a leading zero", withoutZeros(w.text)}
	case !digits.MatchString(w.text):
		return 0, &fault{what: show(w) + " is not a whole number"}
	case w.quoted:
		return 0, &fault{show(w) + " is text", w.text + ", without quotes"}
	}
	n, err := strconv.ParseInt(w.text, 10, 64)
	if err != nil {
		return 0, &fault{what: quote(w.text) + " is out of range"}
	}
	return n, nil
}

func withoutZeros(text string) string {
	if trimmed := strings.TrimLeft(strings.TrimLeft(text, "+-"), "0"); trimmed != "" {
		return "write " + trimmed
	}
	return "write 0"
}

// port is a TCP or UDP port.
type port struct{}

func (port) parse(w word, tag reflect.StructTag) (uint16, *fault) {
	n, bad := decimal(w)
	if bad != nil {
		if strings.HasSuffix(bad.what, "not a whole number") || strings.HasSuffix(bad.what, "out of range") {
			bad.what = show(w) + " is not a port"
		}
		return 0, bad
	}
	if n < 1 || n > math.MaxUint16 {
		return 0, &fault{what: show(w) + " is not a port"}
	}
	return uint16(n), nil
}

func (port) want(reflect.StructTag) string               { return "1-65535" }
func (port) schema(reflect.StructTag) *jsonschema.Schema { return numberSchema(1, math.MaxUint16) }

// trafficPort is a port, or 0 for the word traffic-port.
type trafficPort struct{}

const trafficPortWord = "traffic-port"

func (trafficPort) parse(w word, tag reflect.StructTag) (uint16, *fault) {
	if w.text == trafficPortWord {
		return 0, nil
	}
	n, bad := port{}.parse(w, tag)
	if bad != nil && closest(w.text, []string{trafficPortWord}) != "" {
		bad.want = didYouMean(w.text, []string{trafficPortWord})
	}
	return n, bad
}

func (trafficPort) want(reflect.StructTag) string { return "traffic-port or 1-65535" }

func (trafficPort) schema(reflect.StructTag) *jsonschema.Schema {
	return &jsonschema.Schema{AnyOf: []*jsonschema.Schema{
		{Type: "string", Enum: []any{trafficPortWord}},
		numberSchema(1, math.MaxUint16),
	}}
}

// duration is a Go duration within the tag range, "1s-300s", and a multiple of
// the tag step.
type duration struct{}

func (duration) parse(w word, tag reflect.StructTag) (time.Duration, *fault) {
	if digits.MatchString(w.text) {
		return 0, &fault{show(w) + " has no unit", fmt.Sprintf("such as %ss; %s", w.text, duration{}.want(tag))}
	}
	d, err := time.ParseDuration(w.text)
	if err != nil {
		return 0, &fault{show(w) + " is not a duration", "such as 30s or 5m; " + duration{}.want(tag)}
	}
	low, high := duration{}.limits(tag)
	if d < low || d > high {
		return 0, &fault{what: show(w) + " is out of range"}
	}
	if step, err := time.ParseDuration(tag.Get("step")); err == nil && d%step != 0 {
		return 0, &fault{what: show(w) + " is not a multiple of " + tag.Get("step")}
	}
	return d, nil
}

func (duration) limits(tag reflect.StructTag) (low, high time.Duration) {
	first, last, _ := strings.Cut(tag.Get("range"), "-")
	low, _ = time.ParseDuration(first)
	high, _ = time.ParseDuration(last)
	return low, high
}

func (duration) want(tag reflect.StructTag) string { return tag.Get("range") }

func (duration) schema(reflect.StructTag) *jsonschema.Schema {
	return &jsonschema.Schema{Type: "string", Pattern: `^([0-9]+(\.[0-9]+)?(ns|us|µs|ms|s|m|h))+$`}
}

// ---- addresses ----

// address is one usable IPv4 or IPv6 address. With the tag optional, "" is the
// zero Addr.
type address struct{}

func (address) parse(w word, tag reflect.StructTag) (netip.Addr, *fault) {
	if w.text == "" && tag.Get("optional") != "" {
		return netip.Addr{}, nil
	}
	a, err := netip.ParseAddr(w.text)
	if err != nil {
		return a, notAddress(w)
	}
	return a, unusable(a)
}

// notAddress says which of the usual mistakes it was.
func notAddress(w word) *fault {
	what := quote(w.text) + " is not an address"
	if ap, err := netip.ParseAddrPort(w.text); err == nil {
		return &fault{what, "without the port: " + ap.Addr().String()}
	}
	if p, err := netip.ParsePrefix(w.text); err == nil {
		return &fault{what + " but a prefix", "without the length: " + p.Addr().String()}
	}
	if inner := strings.Trim(w.text, "[]"); inner != w.text {
		if _, err := netip.ParseAddr(inner); err == nil {
			return &fault{what, "without the brackets: " + inner}
		}
	}
	return &fault{what: what}
}

// unusable says why no host can be reached, or bound, at a.
func unusable(a netip.Addr) *fault {
	shown := a.String()
	switch {
	case a.Zone() != "":
		return &fault{quote(shown) + " has a zone, which only means something on one host", "a routable address"}
	case a.Is4In6():
		return &fault{quote(shown) + " is an IPv4-mapped IPv6 address", "write " + a.Unmap().String()}
	case a.IsUnspecified() || a.Is4() && a.As4()[0] == 0:
		return &fault{quote(shown) + " is not the address of a host", "a routable address"}
	case a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return &fault{quote(shown) + " is the broadcast address", "the address of one host"}
	case a.IsMulticast():
		return &fault{quote(shown) + " is a multicast address", "the address of one host"}
	case a.IsLoopback():
		return &fault{quote(shown) + " is a loopback address, which no packet carries from host to host; route_localnet is never set", "a routable address, the host's own if it is this host"}
	case a.IsLinkLocalUnicast():
		return &fault{quote(shown) + " is a link-local address, which is another host on each link", "a routable address"}
	}
	return nil
}

func (address) want(tag reflect.StructTag) string {
	if tag.Get("optional") != "" {
		return `an IPv4 or IPv6 address, or ""`
	}
	return "an IPv4 or IPv6 address"
}

func (address) schema(tag reflect.StructTag) *jsonschema.Schema {
	if tag.Get("optional") != "" {
		return &jsonschema.Schema{Type: "string", Pattern: `^[0-9a-fA-F.:]*$`}
	}
	return &jsonschema.Schema{Type: "string", Pattern: `^[0-9a-fA-F.:]+$`}
}

// prefix is a network whose host bits are zero, or an address for that host
// alone.
type prefix struct{}

func (prefix) parse(w word, tag reflect.StructTag) (netip.Prefix, *fault) {
	p, err := netip.ParsePrefix(w.text)
	if err != nil {
		a, err := netip.ParseAddr(w.text)
		if err != nil || a.Zone() != "" {
			return p, &fault{what: quote(w.text) + " is not a prefix"}
		}
		p = netip.PrefixFrom(a, a.BitLen())
	}
	if p.Addr().Is4In6() {
		return p, &fault{quote(w.text) + " is an IPv4-mapped IPv6 prefix", "an IPv4 prefix, such as 10.0.0.0/8"}
	}
	if m := p.Masked(); m != p {
		return p, &fault{fmt.Sprintf("%s has bits after its length of %d", quote(w.text), p.Bits()), "write " + m.String() + " for the network or " + p.Addr().String() + " for the host"}
	}
	return p, nil
}

func (prefix) want(reflect.StructTag) string {
	return "such as 10.0.0.0/8, 2001:db8::/32 or an address"
}

func (prefix) schema(reflect.StructTag) *jsonschema.Schema {
	return &jsonschema.Schema{Type: "string", Pattern: `^[0-9a-fA-F.:]+(/[0-9]{1,3})?$`}
}

// hostPort is where to listen: "" for nowhere, otherwise host:port. An empty
// host is every address, port 0 one that the kernel picks.
type hostPort struct{}

func (hostPort) parse(w word, tag reflect.StructTag) (string, *fault) {
	if w.text == "" {
		return "", nil
	}
	what := quote(w.text) + " is not host:port"
	host, number, err := net.SplitHostPort(w.text)
	if err != nil || unprintable(host) {
		return "", &fault{what: what}
	}
	if n, bad := decimal(word{text: number}); bad != nil || n < 0 || n > math.MaxUint16 {
		return "", &fault{what, quote(number) + " should be a port, 0-65535"}
	}
	return w.text, nil
}

func (hostPort) want(reflect.StructTag) string { return `such as 127.0.0.1:9469, or ""` }

func (hostPort) schema(reflect.StructTag) *jsonschema.Schema {
	return &jsonschema.Schema{Type: "string", Pattern: `^(|.*:[0-9]{1,5})$`}
}

// ---- names and other text ----

// name is what ELBv2 allows (CreateTargetGroup, Name): it does not begin or end
// with a hyphen.
type name struct{}

const namePattern = `^[A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?$`

var nameExpr = regexp.MustCompile(namePattern)

func (name) parse(w word, tag reflect.StructTag) (string, *fault) {
	switch {
	case nameExpr.MatchString(w.text):
		return w.text, nil
	case len(w.text) > 32:
		return "", &fault{what: fmt.Sprintf("%s is %d characters long", quote(w.text), len([]rune(w.text)))}
	}
	return "", &fault{what: quote(w.text) + " is not a name"}
}

func (name) want(reflect.StructTag) string {
	return "1-32 letters, digits and hyphens, without a hyphen at either end"
}

func (name) schema(reflect.StructTag) *jsonschema.Schema {
	return &jsonschema.Schema{Type: "string", Pattern: namePattern}
}

// link is the name of a network interface, by the rules of dev_valid_name
// (net/core/dev.c), or "".
type link struct{}

func (link) parse(w word, tag reflect.StructTag) (string, *fault) {
	const longest = 15 // IFNAMSIZ without its final NUL
	switch {
	case len(w.text) > longest:
		return "", &fault{what: fmt.Sprintf("%s is %d bytes long", quote(w.text), len(w.text))}
	case w.text == "." || w.text == ".." || strings.ContainsAny(w.text, "/:") || unprintable(w.text):
		return "", &fault{what: quote(w.text) + " is not the name of an interface"}
	}
	return w.text, nil
}

func (link) want(reflect.StructTag) string { return "1-15 characters without spaces, / and :" }

func (link) schema(reflect.StructTag) *jsonschema.Schema {
	return &jsonschema.Schema{Type: "string", Pattern: `^[^/:\s]{0,15}$`}
}

// unprintable says whether s has spaces, control characters or anything else
// that has no place in a header, a URL or the name of a link.
func unprintable(s string) bool {
	return strings.ContainsFunc(s, func(c rune) bool { return c <= ' ' || c > '~' })
}

// urlPath is the target of an HTTP request.
type urlPath struct{}

func (urlPath) parse(w word, tag reflect.StructTag) (string, *fault) {
	const longest = 1024 // ELBv2, HealthCheckPath
	switch {
	case !strings.HasPrefix(w.text, "/"):
		return "", &fault{what: quote(w.text) + ` does not begin with "/"`}
	case len(w.text) > longest:
		return "", &fault{what: fmt.Sprintf("%s is %d bytes long", quote(w.text), len(w.text))}
	case unprintable(w.text):
		return "", &fault{what: quote(w.text) + " has characters that must be percent-encoded"}
	}
	return w.text, nil
}

func (urlPath) want(reflect.StructTag) string { return "such as /healthz, at most 1024 characters" }

func (urlPath) schema(reflect.StructTag) *jsonschema.Schema {
	return &jsonschema.Schema{Type: "string", Pattern: `^/[!-~]*$`}
}

// hostHeader is what an HTTP request calls its server, or "".
type hostHeader struct{}

func (hostHeader) parse(w word, tag reflect.StructTag) (string, *fault) {
	const longest = 261 // a DNS name of 255 bytes, a colon and a port
	if len(w.text) > longest || unprintable(w.text) || strings.ContainsAny(w.text, `/\@?#`) {
		return "", &fault{what: quote(w.text) + " is not a Host header"}
	}
	return w.text, nil
}

func (hostHeader) want(reflect.StructTag) string { return `such as www.example.com, or ""` }

func (hostHeader) schema(reflect.StructTag) *jsonschema.Schema {
	return &jsonschema.Schema{Type: "string", Pattern: `^[^\s/\\@?#]{0,261}$`}
}

// hostName is a DNS name as it goes into SNI, or "": no address and no final dot
// (RFC 6066, 3), and other scripts in their ASCII form.
type hostName struct{}

var hostNameExpr = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?)*$`)

func (hostName) parse(w word, tag reflect.StructTag) (string, *fault) {
	const longest = 253 // 255 bytes on the wire (RFC 1035, 2.3.4)
	if w.text == "" {
		return "", nil
	}
	if _, err := netip.ParseAddr(w.text); err == nil {
		return "", &fault{quote(w.text) + " is an address, which SNI cannot carry", "a name, or leave the key out to demand the target's address"}
	}
	if len(w.text) > longest || !hostNameExpr.MatchString(w.text) {
		return "", &fault{what: quote(w.text) + " is not a host name"}
	}
	return w.text, nil
}

func (hostName) want(reflect.StructTag) string { return `such as www.example.com, or ""` }

func (hostName) schema(reflect.StructTag) *jsonschema.Schema {
	return &jsonschema.Schema{Type: "string", Pattern: `^[A-Za-z0-9_.-]{0,253}$`}
}

// matcher lists the HTTP status codes that mean healthy, as ELBv2 writes them.
type matcher struct{}

const (
	lowestStatus, highestStatus = 200, 599
	matcherPattern              = `^[2-5][0-9]{2}(-[2-5][0-9]{2})?(,[2-5][0-9]{2}(-[2-5][0-9]{2})?)*$`
)

func (matcher) parse(w word, tag reflect.StructTag) ([]balancer.StatusRange, *fault) {
	const longest = 1024 // enough for every second code; the list is walked per probe
	if len(w.text) > longest {
		return nil, &fault{what: fmt.Sprintf("%s is %d bytes long", quote(w.text), len(w.text))}
	}
	var ranges []balancer.StatusRange
	for part := range strings.SplitSeq(w.text, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		a, okA := status(first)
		b, okB := status(last)
		switch {
		case !okA || !okB:
			return nil, &fault{what: show(word{part, w.quoted}) + " is neither a status code nor a range of them"}
		case a > b:
			return nil, &fault{show(word{part, w.quoted}) + " is a range without codes", fmt.Sprintf("write %d-%d", b, a)}
		}
		ranges = append(ranges, balancer.StatusRange{First: a, Last: b})
	}
	return ranges, nil
}

func status(text string) (int, bool) {
	n, bad := decimal(word{text: text})
	return int(n), bad == nil && n >= lowestStatus && n <= highestStatus
}

func (matcher) want(reflect.StructTag) string {
	return `such as "200-399" or "200,204,301-302", within 200-599`
}

func (matcher) schema(reflect.StructTag) *jsonschema.Schema {
	return &jsonschema.Schema{AnyOf: []*jsonschema.Schema{
		{Type: "string", Pattern: matcherPattern},
		numberSchema(lowestStatus, highestStatus),
	}}
}

// folder is an absolute path.
type folder struct{}

func (folder) parse(w word, tag reflect.StructTag) (string, *fault) { return absolutePath(w) }

func absolutePath(w word) (string, *fault) {
	control := strings.ContainsFunc(w.text, func(c rune) bool { return c < ' ' || c == 0x7f })
	if !filepath.IsAbs(w.text) || control {
		return "", &fault{what: quote(w.text) + " is not an absolute path"}
	}
	return filepath.Clean(w.text), nil
}

func (folder) want(reflect.StructTag) string { return "such as /var/lib/nlb" }

func (folder) schema(reflect.StructTag) *jsonschema.Schema {
	return &jsonschema.Schema{Type: "string", Pattern: `^/`}
}

// file is the absolute path of a file to read, or "": what a relative one means
// would depend on where the daemon was started.
type file struct{}

func (file) parse(w word, tag reflect.StructTag) (string, *fault) {
	const longest = 4095 // PATH_MAX (linux/limits.h) without its final NUL
	switch {
	case w.text == "":
		return "", nil
	case len(w.text) > longest:
		return "", &fault{what: fmt.Sprintf("%s is %d bytes long", quote(w.text), len(w.text))}
	}
	return absolutePath(w)
}

func (file) want(reflect.StructTag) string { return `such as /etc/nlb/ca.pem, or ""` }

func (file) schema(reflect.StructTag) *jsonschema.Schema {
	return &jsonschema.Schema{Type: "string", Pattern: `^(/.*)?$`}
}
