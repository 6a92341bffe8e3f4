package audit_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"tidemark/audit"
	"tidemark/audit/audittest"
)

// compile makes a policy of one rule for everything.
func compile(t testing.TB, rule audit.RuleText) *audit.Policy {
	t.Helper()
	if rule.Match == "" {
		rule.Match = "**"
	}
	return compileText(t, audit.PolicyText{Rules: []audit.RuleText{rule}})
}

func compileText(t testing.TB, text audit.PolicyText) *audit.Policy {
	t.Helper()
	p, errs := audit.Compile(text)
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	return p
}

func tenure(d time.Duration) *time.Duration { return &d }

const hour = time.Hour

// Each mode keeps its word, told as what upstream says hour by hour, what
// clients get, and what is on the record.
func TestModes(t *testing.T) {
	type answer struct {
		hour   float64
		seen   string // what upstream says; "-" is that there is no such tag
		serve  string // what clients then get; "" is nothing
		events string // without the prefix tag.
	}
	cooldown := audit.RuleText{Mode: audit.Cooldown, Age: 72 * hour, Tenure: tenure(24 * hour)}
	for _, tt := range []struct {
		name    string
		rule    audit.RuleText
		answers []answer
	}{
		{"observe follows at once", audit.RuleText{Mode: audit.Observe}, []answer{
			{0, "a", "a", "first_seen"}, {1, "b", "b", "moved"}, {2, "a", "a", "reverted"},
		}},
		{"alert follows at once", audit.RuleText{Mode: audit.Alert}, []answer{
			{0, "a", "a", "first_seen"}, {1, "b", "b", "moved"},
		}},
		{"hold stays until somebody approves", audit.RuleText{Mode: audit.HoldMode}, []answer{
			{0, "a", "a", "first_seen"}, {1, "b", "a", "moved held"}, {500, "b", "a", ""}, {501, "c", "a", "moved held"},
		}},
		{"hold is over when upstream comes back", audit.RuleText{Mode: audit.HoldMode}, []answer{
			{0, "a", "a", "first_seen"}, {1, "b", "a", "moved held"}, {2, "a", "a", "reverted withdrawn"},
		}},
		{"immutable never moves", audit.RuleText{Mode: audit.Immutable}, []answer{
			{0, "a", "a", "first_seen"}, {1, "b", "a", "moved policy.violation"}, {5000, "b", "a", ""},
		}},
		{"immutable survives deletion and re-creation", audit.RuleText{Mode: audit.Immutable}, []answer{
			{0, "a", "a", "first_seen"}, {1, "-", "a", ""}, {2, "-", "a", ""}, {3, "-", "a", "deleted"}, {4, "-", "a", ""},
			{5, "b", "a", "restored policy.violation"}, {6, "a", "a", "reverted withdrawn"},
		}},
		{"a deleted tag that comes back as it was", audit.RuleText{Mode: audit.Observe}, []answer{
			{0, "a", "a", "first_seen"}, {1, "-", "a", ""}, {2, "-", "a", ""}, {3, "-", "a", "deleted"}, {5, "a", "a", "restored"}, {6, "b", "b", "moved"},
		}},
		{"deny serves nothing, not even what it sees first", audit.RuleText{Mode: audit.Deny}, []answer{
			{0, "a", "", "first_seen held"}, {1, "b", "", "moved withdrawn held"},
		}},

		{"cooldown serves what is old enough", cooldown, []answer{
			{0, "a", "a", "first_seen"}, {100, "b", "a", "moved held"}, {171.9, "b", "a", ""}, {172, "b", "b", "released"},
		}},
		{"cooldown does not start over when upstream moves again", cooldown, []answer{
			{0, "a", "a", "first_seen"}, {100, "b", "a", "moved held"}, {130, "b", "a", ""}, {131, "c", "a", "moved held"},
			{171, "c", "a", ""}, {172, "c", "b", "released"}, {203, "c", "c", "released"},
		}},
		{"weekly rebuilds never starve: what is served lags by the age", cooldown, []answer{
			{0, "a", "a", "first_seen"}, {168, "b", "a", "moved held"}, {240, "b", "b", "released"},
			{336, "c", "b", "moved held"}, {408, "c", "c", "released"}, {504, "d", "c", "moved held"}, {576, "d", "d", "released"},
		}},
		{"a bad digest that stood for minutes is never served", cooldown, []answer{
			{0, "a", "a", "first_seen"}, {100, "bad", "a", "moved held"}, {100.5, "fresh", "a", "moved withdrawn held"},
			{172, "fresh", "a", ""}, {172.4, "fresh", "a", ""}, {172.5, "fresh", "fresh", "released"},
		}},
		{"what upstream takes back is never served, also when it returns", cooldown, []answer{
			{0, "a", "a", "first_seen"}, {100, "b", "a", "moved held"}, {110, "a", "a", "reverted withdrawn"}, {200, "a", "a", ""},
			{201, "b", "a", "reverted held"}, {300, "b", "a", ""}, {489, "b", "a", "policy.starved"},
		}},
		{"what was deleted while it was new is never served", cooldown, []answer{
			{0, "a", "a", "first_seen"}, {100, "b", "a", "moved held"}, {101, "-", "a", ""}, {102, "-", "a", ""}, {103, "-", "a", "deleted withdrawn"},
			{110, "b", "a", "restored held"}, {190, "b", "a", ""},
		}},
		{"the first digest of a tag is served: there is nothing older", cooldown, []answer{{0, "a", "a", "first_seen"}}},
		{"unless a new tag is to be refused", audit.RuleText{Mode: audit.Cooldown, Age: 72 * hour, OnNew: audit.NewRefuse}, []answer{
			{0, "a", "", "first_seen held"}, {71, "a", "", ""}, {72, "a", "a", "released"},
		}},
		{"a rollback to what was served long ago takes its time too", cooldown, []answer{
			{0, "a", "a", "first_seen"}, {100, "b", "a", "moved held"}, {172, "b", "b", "released"}, {200, "a", "b", "reverted held"}, {272, "a", "a", "released"},
		}},
		{"nothing is eligible for too long: that is told, once", audit.RuleText{Mode: audit.Cooldown, Age: 72 * hour, Tenure: tenure(24 * hour), MaxLag: 80 * hour}, []answer{
			{0, "a", "a", "first_seen"}, {10, "b", "a", "moved held"}, {30, "c", "a", "moved withdrawn held"}, {50, "d", "a", "moved withdrawn held"},
			{70, "e", "a", "moved withdrawn held"}, {90, "f", "a", "moved withdrawn held policy.starved"}, {91, "f", "a", ""}, {162, "f", "f", "released"},
		}},
		{"starving can be ended by what stood longest", audit.RuleText{Mode: audit.Cooldown, Age: 72 * hour, Tenure: tenure(24 * hour), MaxLag: 80 * hour, OnStarved: audit.StarvedLongest}, []answer{
			{0, "a", "a", "first_seen"}, {10, "b", "a", "moved held"}, {30, "b", "a", ""}, {31, "c", "a", "moved withdrawn held"}, {45, "c", "a", ""},
			{46, "d", "a", "moved withdrawn held"}, {89, "d", "a", ""}, {90, "d", "d", "released"},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStory(compile(t, tt.rule))
			for _, a := range tt.answers {
				now := noon.Add(time.Duration(a.hour * float64(hour)))
				seen := audit.Observation{Digest: audittest.Digest(a.seen)}
				if a.seen == "-" {
					seen = audit.Observation{Absent: fmt.Errorf("404"), Gone: true}
				}
				if got := short(s.observe(seen, now)); got != a.events {
					t.Errorf("hour %v: %q became %q, want %q", a.hour, a.seen, got, a.events)
				}
				want := audittest.Digest(a.serve)
				if a.serve == "" {
					want = ""
				}
				if s.state.Served != want {
					t.Errorf("hour %v: upstream says %q, %s is served, want %q", a.hour, a.seen, s.state.Served, a.serve)
				}
			}
			s.check(t)
		})
	}
}

// short are the types of events in the words of a story.
func short(events []audit.Event) string {
	var out []string
	for _, e := range events {
		out = append(out, strings.TrimPrefix(string(e.Type), "tag."))
	}
	return strings.Join(out, " ")
}

// check is what holds for every story, whatever happened in it.
func (s *story) check(t interface {
	Helper()
	Fatalf(string, ...any)
}) {
	t.Helper()
	var head, lastAfter = "", time.Time{}
	heads := make(map[string]bool)
	for i, e := range s.events {
		if e.Policy.SHA256 != s.policy.SHA256() || e.Policy.Mode == "" {
			t.Fatalf("event %d, %s, does not say which policy decided", i, e.Type)
		}
		if served := string(e.Policy.Served); served != "" && !heads[served] && !(e.New != nil && string(e.New.Digest) == served) {
			t.Fatalf("event %d, %s, says that %s is served, which no event before it told of", i, e.Type, served)
		}
		if !e.Type.Moves() && e.Type != audit.Deleted {
			continue
		}
		if i == 0 != (e.Old == nil) || e.Old != nil && string(e.Old.Digest) != head {
			t.Fatalf("event %d, %s, does not begin where the one before ended", i, e.Type)
		}
		if e.Interval.NotBefore != nil && (e.Interval.NotBefore.Before(lastAfter) || e.Interval.NotAfter.Before(*e.Interval.NotBefore)) {
			t.Fatalf("event %d, %s, overlaps the one before", i, e.Type)
		}
		lastAfter = e.Interval.NotAfter
		if e.Type.Moves() {
			head = string(e.New.Digest)
			heads[head] = true
		}
	}
	if string(s.state.Head) != head {
		t.Fatalf("the head is %s, the events say %s", s.state.Head, head)
	}
}

// A rule applies to what it matches, the first one counts, and one that matches
// nothing else is observed.
func TestRulesMatch(t *testing.T) {
	yes, no := true, false
	p := compileText(t, audit.PolicyText{Rules: []audit.RuleText{
		{Name: "versions", Match: "ghcr.io/acme/**", FullVersion: &yes, Mode: audit.Immutable},
		{Name: "candidates", Match: "ghcr.io/**", Tag: `-rc\.?[0-9]+$`, Mode: audit.Alert},
		{Name: "moving", Match: "ghcr.io/**", FullVersion: &no, Mode: audit.Cooldown, Age: hour},
		{Name: "latest", Match: "docker.io/library/*:latest", Mode: audit.HoldMode},
	}})
	for ref, want := range map[string]string{
		"ghcr.io/acme/app:1.2.3": "versions", "ghcr.io/acme/deep/app:v2.1.20-debian": "versions", "ghcr.io/acme/app:20260701": "versions",
		"ghcr.io/acme/app:2026-07-01": "versions", "ghcr.io/acme/app:1.27.5_alpine3.20": "versions", "ghcr.io/acme/app:1.2.3.4": "versions",
		"ghcr.io/other/app:1.2.3-rc1": "candidates", "ghcr.io/acme/app:3.13-slim": "moving", "ghcr.io/acme/app:latest": "moving",
		"ghcr.io/acme/app:20261399": "moving", "ghcr.io/acme/app:2026-0701": "moving", "ghcr.io/other/app:1.2.3": "",
		"docker.io/library/nginx:latest": "latest", "docker.io/grafana/grafana:latest": "", "docker.io/library/nginx:1": "",
	} {
		r, err := audit.ParseRef(ref)
		if err != nil {
			t.Fatal(err)
		}
		if got := p.Rule(r).Name; got != want {
			t.Errorf("%s is under rule %q, want %q", ref, got, want)
		}
	}
	if mode := p.Rule(audittest.Ref("x")).Mode; mode != audit.Observe {
		t.Errorf("what no rule matches is under %s, want observe", mode)
	}
}

// Presets are what AUDIT.md says they are.
func TestPresets(t *testing.T) {
	for preset, want := range map[string]map[string]audit.Mode{
		"homelab":    {"docker.io/library/nginx:1.27.5": audit.Alert},
		"balanced":   {"docker.io/library/nginx:1.27.5": audit.Alert, "docker.io/library/nginx:latest": audit.Cooldown, "quay.io/org/app:1.2.3": audit.Immutable, "quay.io/org/app:1": audit.Cooldown},
		"strict":     {"quay.io/org/app:1.2.3": audit.HoldMode},
		"airgap":     {"quay.io/org/app:1.2.3": audit.HoldMode},
		"ci-private": {"quay.io/org/app:1.2.3": audit.Observe},
	} {
		p := compileText(t, audit.PolicyText{Preset: preset})
		for s, mode := range want {
			ref, err := audit.ParseRef(s)
			if err != nil {
				t.Fatal(err)
			}
			if got := p.Rule(ref).Mode; got != mode {
				t.Errorf("%s: %s is under %s, want %s", preset, s, got, mode)
			}
		}
	}
	own := compileText(t, audit.PolicyText{Preset: "strict", Rules: []audit.RuleText{{Match: "quay.io/**", Mode: audit.Observe}}})
	if mode := own.Rule(audit.Ref{Upstream: "quay.io", Repository: "a", Tag: "b"}).Mode; mode != audit.Observe {
		t.Errorf("a rule before the preset: %s, want observe", mode)
	}
}

// A policy that cannot mean what it says is refused, all of it at once, with the
// place; and one that says the same has the same hash.
func TestPoliciesThatMakeNoSense(t *testing.T) {
	yes := true
	for _, tt := range []struct {
		text audit.PolicyText
		want []string
	}{
		{audit.PolicyText{Rules: []audit.RuleText{{Match: "docker.io/[a-z]", Mode: audit.Observe}}}, []string{"rules[0].match"}},
		{audit.PolicyText{Rules: []audit.RuleText{{Mode: audit.Observe}}}, []string{"rules[0].match"}},
		{audit.PolicyText{Rules: []audit.RuleText{{Match: "**", Tag: "(", Mode: audit.Observe}}}, []string{"rules[0].tag"}},
		{audit.PolicyText{Rules: []audit.RuleText{{Match: "**", Mode: "freeze"}, {Match: "a/b:*"}}}, []string{"rules[0].mode", "rules[1].match: the rule has no effect", "rules[1].mode"}},
		{audit.PolicyText{Rules: []audit.RuleText{{Match: "**", Mode: audit.Cooldown}}}, []string{"rules[0].age"}},
		{audit.PolicyText{Rules: []audit.RuleText{{Match: "**", Mode: audit.HoldMode, Age: hour, Tenure: tenure(hour), MaxLag: hour, OnNew: "serve", OnStarved: "keep"}}},
			[]string{"rules[0].age: has no effect in mode hold", "rules[0].tenure", "rules[0].max_lag", "rules[0].on_starved", "rules[0].on_new"}},
		{audit.PolicyText{Rules: []audit.RuleText{{Match: "**", Mode: audit.Cooldown, Age: hour, MaxLag: time.Minute}}}, []string{"rules[0].max_lag"}},
		{audit.PolicyText{Rules: []audit.RuleText{{Match: "**", Mode: audit.Immutable, OnDeleted: "refuse"}}}, []string{"rules[0].on_deleted: has no effect"}},
		{audit.PolicyText{Rules: []audit.RuleText{{Match: "**", Mode: audit.Observe, OnDeleted: "forget"}}}, []string{`rules[0].on_deleted: "forget" is neither`}},
		{audit.PolicyText{Rules: []audit.RuleText{{Match: "a/**", FullVersion: &yes, Mode: audit.Observe}, {Match: "a/**", FullVersion: &yes, Mode: audit.Alert}}}, []string{"rules[1].match: the rule has no effect: rules[0]"}},
		{audit.PolicyText{Rules: []audit.RuleText{{Match: "**", Mode: audit.Observe}, {Match: "a/b:c", Mode: audit.Alert}}}, []string{"rules[1].match: the rule has no effect: rules[0]"}},
		{audit.PolicyText{Rules: []audit.RuleText{{Match: "docker.io/nginx:*", Mode: audit.Observe}, {Match: "docker.io/*:latest", Mode: audit.Alert}}}, []string{`rules[0].match: the rule has no effect: Docker Hub's own images are below library; did you mean "docker.io/library/nginx:*"`, "rules[1].match"}},
		{audit.PolicyText{Rules: []audit.RuleText{{Name: "n", Match: "a/**", Mode: audit.Observe}, {Name: "n", Match: "b/**", Mode: audit.Alert}}}, []string{"rules[1].name: rules[0] has it already"}},
		{audit.PolicyText{Preset: "paranoid"}, []string{"preset"}},
		{audit.PolicyText{Preset: "strict", Rules: []audit.RuleText{{Match: "**", Mode: audit.Observe}}}, []string{"preset: has no effect"}},
	} {
		p, errs := audit.Compile(tt.text)
		got := fmt.Sprint(errs)
		ok := p == nil && len(errs) == len(tt.want)
		for _, w := range tt.want {
			ok = ok && strings.Contains(got, w)
		}
		if !ok {
			t.Errorf("%+v:\ngot  %s\nwant %q", tt.text, got, tt.want)
		}
	}
	rule := audit.RuleText{Match: "**", Mode: audit.Cooldown, Age: hour}
	one, same, other := compile(t, rule), compile(t, rule), compile(t, audit.RuleText{Match: "**", Mode: audit.Cooldown, Age: 2 * hour})
	if one.SHA256() != same.SHA256() || one.SHA256() == other.SHA256() || len(one.SHA256()) != 64 {
		t.Errorf("hashes are %s, %s, %s", one.SHA256(), same.SHA256(), other.SHA256())
	}
}
