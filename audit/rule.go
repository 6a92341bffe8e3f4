package audit

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// A Mode says what is served after the head of a ref has moved.
type Mode string

// The modes, from the loosest to the strictest.
const (
	Observe   Mode = "observe"   // the head, at once
	Alert     Mode = "alert"     // the head, at once; people are told
	Cooldown  Mode = "cooldown"  // the newest head that is old enough and was not taken back
	HoldMode  Mode = "hold"      // what was served, until somebody approves
	Immutable Mode = "immutable" // what was served first, for ever
	Deny      Mode = "deny"      // nothing
)

var modes = []Mode{Observe, Alert, Cooldown, HoldMode, Immutable, Deny}

// holdsBack tells the modes under which a head may not be served.
func (m Mode) holdsBack() bool { return m == Cooldown || m == HoldMode || m == Immutable }

// A PolicyText is a policy as an operator writes it. The zero value observes.
type PolicyText struct {
	Preset string     `json:"preset,omitempty"` // see Presets
	Rules  []RuleText `json:"rules"`            // before those of the preset; first match wins

	FlapWindow         time.Duration   `json:"flap_window"`         // in which changes there and back are one flap; 0 is 15 min
	DeleteObservations int             `json:"delete_observations"` // answers that a ref is gone before it is believed; 0 is 3
	DeleteOver         time.Duration   `json:"delete_over"`         // the time they must span, unless DeleteObservations is 0: then it is 1 h
	GapAfter           time.Duration   `json:"gap_after"`           // without an answer before it is a gap; 0 is 45 min
	GapFactor          int             `json:"gap_factor"`          // times the interval of a ref that is asked about less often; 0 is 3
	Denied             []digest.Digest `json:"denied,omitempty"`    // never served, whatever a rule says
	Allowed            []digest.Digest `json:"allowed,omitempty"`   // need not wait under cooldown or hold

	Mirrors []string `json:"mirrors,omitempty"` // upstreams whose tags lag: they are given twice the time

	// Upstreams are all there are, nil if that is not known: a rule about another
	// one has no effect. They are not part of the policy.
	Upstreams []string `json:"-"`
}

// A RuleText is a rule as an operator writes it. Mode and Match are required;
// the zero value of everything else is its default.
type RuleText struct {
	Name        string         `json:"name,omitempty"`         // default: the conditions
	Match       string         `json:"match"`                  // a Glob of refs
	Tag         string         `json:"tag,omitempty"`          // RE2, unanchored, of the tag
	FullVersion *bool          `json:"full_version,omitempty"` // only tags that look like a full version, or only others
	Mode        Mode           `json:"mode"`
	Age         time.Duration  `json:"age,omitempty"`        // cooldown: how old a digest must be
	Tenure      *time.Duration `json:"tenure,omitempty"`     // cooldown: how long it must have been the head; default 24 h or Age, whichever is less
	MaxLag      time.Duration  `json:"max_lag,omitempty"`    // cooldown: behind the head before policy.starved; default 4 Age
	OnStarved   string         `json:"on_starved,omitempty"` // cooldown: keep or longest_tenure
	OnNew       string         `json:"on_new,omitempty"`     // cooldown: serve or refuse_until_age
	OnDeleted   string         `json:"on_deleted,omitempty"` // serve or refuse
	Escalate    []string       `json:"escalate,omitempty"`   // what has a digest held until it is approved, see Escalations
	Bypass      []string       `json:"bypass,omitempty"`     // cooldown, hold: classes that need not wait
}

// Escalations are the words of RuleText.Escalate.
func Escalations() []string { return slices.Sorted(maps.Keys(escalations)) }

// The values of OnStarved, OnNew and OnDeleted; the first of each is the default.
const (
	StarvedKeep    = "keep"
	StarvedLongest = "longest_tenure"
	NewServe       = "serve"
	NewRefuse      = "refuse_until_age"
	DeletedServe   = "serve"
	DeletedRefuse  = "refuse"
)

var yes = true

// Presets are policies for common situations.
var Presets = map[string][]RuleText{
	"homelab": {{Name: "homelab", Match: "**", Mode: Alert}},
	"balanced": {
		{Name: "balanced: official full versions", Match: "docker.io/library/**", FullVersion: &yes, Mode: Alert},
		{Name: "balanced: full versions", Match: "**", FullVersion: &yes, Mode: Immutable},
		{
			Name: "balanced", Match: "**", Mode: Cooldown, Age: 72 * time.Hour,
			Escalate: []string{string(Downgraded), string(Burst), string(Aliased)}, Bypass: []string{string(ClassRepackaged), string(ClassAttestationOnly)},
		},
	},
	"strict":     {{Name: "strict", Match: "**", Mode: HoldMode}},
	"airgap":     {{Name: "airgap", Match: "**", Mode: HoldMode}},
	"ci-private": {{Name: "ci-private", Match: "**", Mode: Observe}},
}

// A Rule is a rule that makes sense.
type Rule struct {
	Name      string
	Mode      Mode
	Age       time.Duration
	Tenure    time.Duration // a head that is left before this was withdrawn
	MaxLag    time.Duration
	OnStarved string
	OnNew     string
	OnDeleted string
	Escalate  []string
	Bypass    []string

	match       Glob
	tag         *regexp.Regexp
	fullVersion *bool
	conditions  string // what it matches, in words
}

// defaultTenure is how long a digest that a rule holds back must have been the
// head, else it counts as taken back (AUDIT.md, A9.2).
const defaultTenure = 24 * time.Hour

// last is the implicit last rule.
var last = &Rule{Mode: Observe, OnDeleted: DeletedServe, Tenure: defaultTenure}

// A PolicyError is one thing that is wrong with a policy as it is written.
type PolicyError struct {
	Path    string // of the value, such as rules[2].age
	Message string
}

func (e PolicyError) Error() string { return e.Path + ": " + e.Message }

// A Policy decides what an observation means for what is served. The nil Policy
// observes: what upstream says is served at once, and every move is an event. A
// Policy never changes.
type Policy struct {
	text   PolicyText
	sha256 string
	rules  []*Rule
}

// Compile makes a policy of its text, or tells everything that is wrong with it.
func Compile(text PolicyText) (*Policy, []PolicyError) {
	p := &Policy{text: text}
	var errs []PolicyError
	if text.FlapWindow == 0 {
		p.text.FlapWindow = 15 * time.Minute
	}
	if text.DeleteObservations == 0 {
		p.text.DeleteObservations, p.text.DeleteOver = 3, time.Hour
	}
	if text.GapAfter == 0 {
		p.text.GapAfter = 45 * time.Minute
	}
	if text.GapFactor == 0 {
		p.text.GapFactor = 3
	}
	rules := slices.Clone(text.Rules)
	if text.Preset != "" {
		preset, ok := Presets[text.Preset]
		if !ok {
			errs = append(errs, PolicyError{"preset", fmt.Sprintf("%q is not one of airgap, balanced, ci-private, homelab, strict", text.Preset)})
		}
		rules = append(rules, preset...)
	}
	for i, rt := range rules {
		r, problems := compileRule(rt)
		path := fmt.Sprintf("rules[%d]", i)
		own := i < len(text.Rules)
		if why := reachable(rt, rules[:i], text.Upstreams); why != "" && own {
			problems = append(problems, PolicyError{"match", "the rule has no effect: " + why})
		} else if why != "" && i == len(text.Rules) {
			errs = append(errs, PolicyError{"preset", "has no effect: " + why})
		}
		if j := slices.IndexFunc(p.rules, func(o *Rule) bool { return o.Name == r.Name }); own && j >= 0 && rt.Name != "" {
			problems = append(problems, PolicyError{"name", fmt.Sprintf("rules[%d] has it already; entries of the ledger tell rules by their names", j)})
		}
		for _, e := range problems {
			errs = append(errs, PolicyError{path + "." + e.Path, e.Message})
		}
		p.rules = append(p.rules, r)
	}
	if len(errs) > 0 {
		return nil, errs
	}
	p.text.Rules = rules
	for _, d := range text.Denied {
		if slices.Contains(text.Allowed, d) {
			return nil, []PolicyError{{"allowed", fmt.Sprintf("%s is in denied, too", d)}}
		}
	}
	canonical, err := json.Marshal(p.text)
	if err != nil {
		panic("audit: policy cannot be encoded: " + err.Error())
	}
	sum := sha256.Sum256(canonical)
	p.sha256 = hex.EncodeToString(sum[:])
	return p, nil
}

// reachable returns why a rule can match nothing that the rules before it leave,
// or "". It finds what is written by mistake, not everything that could be proven.
func reachable(t RuleText, before []RuleText, upstreams []string) string {
	if g, err := ParseGlob(t.Match); err != nil {
		return "" // told as what it is
	} else if !g.Possible() {
		return fmt.Sprintf("%q matches no whole reference, which is upstream/repository:tag, such as docker.io/library/nginx:1.27", t.Match)
	}
	if rest, ok := strings.CutPrefix(t.Match, "docker.io/"); ok {
		if repository, _, _ := strings.Cut(rest, ":"); !strings.Contains(repository, "/") && !strings.Contains(repository, "**") {
			return fmt.Sprintf("Docker Hub's own images are below library; did you mean %q?", "docker.io/library/"+rest)
		}
	}
	if name, _, ok := strings.Cut(t.Match, "/"); ok && upstreams != nil && !strings.ContainsAny(name, "*?") && !slices.Contains(upstreams, name) {
		return fmt.Sprintf("%s is not one of the upstreams: %s", name, strings.Join(upstreams, ", "))
	}
	for i, b := range before {
		if b.conditions() == t.conditions() {
			return fmt.Sprintf("rules[%d] matches the same", i)
		}
		begin, all := strings.CutSuffix(b.Match, "**")
		if all && b.Tag == "" && b.FullVersion == nil && !strings.ContainsAny(begin, "*?") && strings.HasPrefix(t.Match, begin) {
			if begin == "" {
				return fmt.Sprintf("rules[%d] matches everything before it", i)
			}
			return fmt.Sprintf("rules[%d] matches everything below %s before it", i, begin)
		}
	}
	return ""
}

// conditions is what a rule matches, in words.
func (t RuleText) conditions() string {
	s := t.Match
	if t.Tag != "" {
		s += " tag " + t.Tag
	}
	if t.FullVersion != nil {
		s += map[bool]string{true: " full versions", false: " no full versions"}[*t.FullVersion]
	}
	return s
}

func compileRule(t RuleText) (*Rule, []PolicyError) {
	var errs []PolicyError
	fail := func(path, format string, args ...any) {
		errs = append(errs, PolicyError{path, fmt.Sprintf(format, args...)})
	}
	r := &Rule{
		Name: t.Name, Mode: t.Mode, Age: t.Age, Tenure: defaultTenure, MaxLag: t.MaxLag,
		OnStarved: t.OnStarved, OnNew: t.OnNew, OnDeleted: t.OnDeleted, Escalate: t.Escalate, Bypass: t.Bypass, fullVersion: t.FullVersion, conditions: t.conditions(),
	}
	if r.Name == "" {
		r.Name = t.conditions()
	}
	var err error
	if r.match, err = ParseGlob(t.Match); err != nil {
		fail("match", "%v", err)
	}
	if t.Tag != "" {
		if r.tag, err = regexp.Compile(t.Tag); err != nil {
			fail("tag", "%v", err)
		}
	}
	if !slices.Contains(modes, t.Mode) {
		fail("mode", "%q is not one of observe, alert, cooldown, hold, immutable, deny", t.Mode)
		return r, errs
	}
	for i, name := range t.Escalate {
		if escalations[name] == nil {
			fail(fmt.Sprintf("escalate[%d]", i), "%q is not one of %s", name, strings.Join(Escalations(), ", "))
		}
	}
	for i, name := range t.Bypass {
		if !slices.Contains(bypasses, name) {
			fail(fmt.Sprintf("bypass[%d]", i), "%q is not one of %s", name, strings.Join(bypasses, ", "))
		}
	}
	if len(t.Escalate) > 0 && (t.Mode == HoldMode && len(t.Bypass) == 0 || t.Mode == Immutable || t.Mode == Deny) {
		fail("escalate", "has no effect in mode %s: everything is held", t.Mode)
	}
	if len(t.Bypass) > 0 && t.Mode != Cooldown && t.Mode != HoldMode {
		fail("bypass", "has no effect in mode %s; it is for cooldown and hold", t.Mode)
	}
	if t.Mode == Cooldown {
		if t.Age <= 0 {
			fail("age", "a cooldown without an age holds nothing back")
		}
		r.Tenure = min(t.Age, defaultTenure)
		if t.Tenure != nil {
			r.Tenure = *t.Tenure
		}
		if r.MaxLag == 0 {
			r.MaxLag = min(t.Age, math.MaxInt64/4) * 4
		}
		if r.MaxLag < t.Age {
			fail("max_lag", "%v is less than the age: every move would be reported as starved", r.MaxLag)
		}
	} else {
		for _, v := range []struct {
			path string
			set  bool
		}{{"age", t.Age != 0}, {"tenure", t.Tenure != nil}, {"max_lag", t.MaxLag != 0}, {"on_starved", t.OnStarved != ""}, {"on_new", t.OnNew != ""}} {
			if v.set {
				fail(v.path, "has no effect in mode %s; it is for cooldown", t.Mode)
			}
		}
	}
	for _, v := range []struct {
		path    string
		value   *string
		allowed []string
	}{
		{"on_starved", &r.OnStarved, []string{StarvedKeep, StarvedLongest}},
		{"on_new", &r.OnNew, []string{NewServe, NewRefuse}},
		{"on_deleted", &r.OnDeleted, []string{DeletedServe, DeletedRefuse}},
	} {
		if *v.value == "" {
			*v.value = v.allowed[0]
		} else if !slices.Contains(v.allowed, *v.value) {
			fail(v.path, "%q is neither %s", *v.value, strings.Join(v.allowed, " nor "))
		}
	}
	if r.OnDeleted == DeletedRefuse && (t.Mode == HoldMode || t.Mode == Immutable || t.Mode == Deny) {
		fail("on_deleted", "has no effect in mode %s", t.Mode)
	}
	return r, errs
}

// SHA256 identifies the policy: of its text with every default, as JSON.
func (p *Policy) SHA256() string {
	if p == nil {
		return ""
	}
	return p.sha256
}

// Refuses are the names of the rules under which tags can be answered with an
// error: clients that know another registry go there.
func (p *Policy) Refuses() []string {
	if p == nil {
		return nil
	}
	var names []string
	for _, r := range p.rules {
		if r.Mode == Deny || r.OnNew == NewRefuse || r.OnDeleted == DeletedRefuse {
			names = append(names, r.Name)
		}
	}
	return names
}

// Rules are the rules in effect, those of the preset and the implicit last one
// included, each in a line, in the order in which they are tried.
func (p *Policy) Rules() []string {
	var out []string
	if p != nil {
		for _, r := range p.rules {
			out = append(out, r.String())
		}
	}
	return append(out, last.String())
}

// String is the rule with every default.
func (r *Rule) String() string {
	what, name := "", r.Name
	switch {
	case r == last:
		what, name = "everything else", ""
	case r.conditions == name:
		what, name = name, ""
	default:
		what, name = r.conditions, fmt.Sprintf(" %q", name)
	}
	s := fmt.Sprintf("%-9s  %s%s", r.Mode, what, name)
	if r.Mode == Cooldown {
		s += fmt.Sprintf("  age %v, tenure %v, max_lag %v, on_starved %s, on_new %s", r.Age, r.Tenure, r.MaxLag, r.OnStarved, r.OnNew)
	}
	if r.OnDeleted == DeletedRefuse {
		s += "  on_deleted " + r.OnDeleted
	}
	if len(r.Escalate) > 0 {
		s += "  escalate " + strings.Join(r.Escalate, " ")
	}
	if len(r.Bypass) > 0 {
		s += "  bypass " + strings.Join(r.Bypass, " ")
	}
	return s
}

// Rule returns the first rule that matches ref.
func (p *Policy) Rule(ref Ref) *Rule {
	if p != nil {
		for _, r := range p.rules {
			if r.matches(ref) {
				return r
			}
		}
	}
	return last
}

func (r *Rule) matches(ref Ref) bool {
	return (r.fullVersion == nil || *r.fullVersion == FullVersion(ref.Tag)) &&
		(r.tag == nil || r.tag.MatchString(ref.Tag)) && r.match.Matches(ref)
}

// The shapes of a full version: three or four numbers with an optional suffix,
// or a date.
var (
	versionShape = regexp.MustCompile(`^v?[0-9]+\.[0-9]+\.[0-9]+(\.[0-9]+)?([-_.+].+)?$`)
	dateShape    = regexp.MustCompile(`^(19|20)[0-9]{2}(-?)(0[1-9]|1[0-2])(-?)(0[1-9]|[12][0-9]|3[01])$`)
)

// FullVersion tells whether a tag looks like one that is never to be moved.
func FullVersion(tag string) bool {
	if versionShape.MatchString(tag) {
		return true
	}
	m := dateShape.FindStringSubmatch(tag)
	return m != nil && m[2] == m[4]
}

// flapWindow is the time in which changes of ref there and back are one flap.
func (p *Policy) flapWindow(ref Ref) time.Duration {
	if p == nil {
		return 15 * time.Minute
	}
	if slices.Contains(p.text.Mirrors, ref.Upstream) {
		return 2 * p.text.FlapWindow
	}
	return p.text.FlapWindow
}

// goneAfter is how many answers over which time make a ref deleted.
func (p *Policy) goneAfter() (int, time.Duration) {
	if p == nil {
		return 3, time.Hour
	}
	return p.text.DeleteObservations, p.text.DeleteOver
}

// gapAfter is GapAfter for a ref that is asked about on a schedule, or not if every is 0.
func (p *Policy) gapAfter(every time.Duration) time.Duration {
	factor := 3
	if p != nil {
		factor = p.text.GapFactor
	}
	return max(p.GapAfter(), time.Duration(factor)*every)
}

// GapAfter is the time without an answer that is worth a record.
func (p *Policy) GapAfter() time.Duration {
	if p == nil {
		return 45 * time.Minute
	}
	return p.text.GapAfter
}
