package audit_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/rs/zerolog"

	"tidemark/audit"
	"tidemark/audit/audittest"
)

// looks is an answer with what the move to it looks like.
func looks(s *story, name string, class audit.Class, signals ...string) audit.Observation {
	o := seen(name)
	if s.state.Known() {
		o.Change = &audit.Comparison{Old: s.state.Head, New: o.Digest, Class: class, Signals: signals}
	}
	return o
}

// What a move looks like can have its digest held in any mode, until somebody approves
// it; and can have it served at once under a rule that would hold it.
func TestARuleIsRaisedAndLowered(t *testing.T) {
	for name, tt := range map[string]struct {
		rule    audit.RuleText
		class   audit.Class
		signals []string
		events  string
		reason  string
		after   string // what is served an hour later
	}{
		"alert serves":                  {audit.RuleText{Mode: audit.Alert, Escalate: []string{"user_to_root"}}, audit.ClassUnknown, []string{"cmd_changed"}, "moved", "", "b"},
		"alert is raised":               {audit.RuleText{Mode: audit.Alert, Escalate: []string{"user_to_root"}}, audit.ClassUnknown, []string{"user_to_root"}, "moved held", "user_to_root", "a"},
		"a cooldown is raised":          {audit.RuleText{Mode: audit.Cooldown, Age: time.Minute, Escalate: []string{"digest.aliased"}}, audit.ClassUnknown, []string{"alias:1.0"}, "moved held", "digest.aliased", "a"},
		"nobody has that platform":      {audit.RuleText{Mode: audit.Alert, Escalate: []string{"platform_removed"}}, audit.ClassPlatformRemoved, []string{"platform_removed", "unconsumed"}, "moved", "", "b"},
		"hold holds":                    {audit.RuleText{Mode: audit.HoldMode, Bypass: []string{"base_refresh"}}, audit.ClassRebuild, nil, "moved held", "hold", "a"},
		"hold is lowered":               {audit.RuleText{Mode: audit.HoldMode, Bypass: []string{"base_refresh"}}, audit.ClassBaseRefresh, nil, "moved", "", "b"},
		"a cooldown is lowered":         {audit.RuleText{Mode: audit.Cooldown, Age: 72 * time.Hour, Bypass: []string{"repackaged"}}, audit.ClassRepackaged, nil, "repackaged", "", "b"},
		"what raises counts more":       {audit.RuleText{Mode: audit.HoldMode, Bypass: []string{"base_refresh"}, Escalate: []string{"repo.burst"}}, audit.ClassBaseRefresh, []string{"burst:3"}, "moved held", "repo.burst", "a"},
		"immutable knows no exceptions": {audit.RuleText{Mode: audit.Immutable}, audit.ClassRepackaged, nil, "repackaged policy.violation", "immutable", "a"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStory(compile(t, tt.rule))
			s.observe(seen("a"), at(0))
			events := s.observe(looks(s, "b", tt.class, tt.signals...), at(60))
			if got := short(events); got != tt.events {
				t.Errorf("events %q, want %q", got, tt.events)
			}
			if last := events[len(events)-1]; tt.reason != "" && last.Reason != tt.reason {
				t.Errorf("held because of %q, want %q", last.Reason, tt.reason)
			}
			s.observe(seen("b"), at(120))
			if s.state.Served != audittest.Digest(tt.after) {
				t.Errorf("an hour later %s is served, want %s", s.state.Served, tt.after)
			}
			if tt.after == "a" {
				d := audit.Decision{Action: audit.Approve, Digest: audittest.Digest("b"), Reason: "looked at"}
				st, events, err := s.policy.Decide(s.ref, s.record(), d, at(180))
				if err != nil {
					t.Fatal(err)
				}
				s.take(st, events)
				s.observe(seen("b"), at(190))
				if s.state.Served != audittest.Digest("b") {
					t.Error("approved, and not served")
				}
			}
		})
	}
}

// What is served because only its wrapping is new must be new to what was served: the
// same wrapping of what is held is held.
func TestABypassIsFromWhatWasServed(t *testing.T) {
	s := newStory(compile(t, audit.RuleText{Mode: audit.HoldMode, Bypass: []string{"repackaged"}}))
	s.observe(seen("good"), at(0))
	s.observe(looks(s, "evil", audit.ClassUnknown), at(10))
	s.observe(looks(s, "evil, wrapped anew", audit.ClassRepackaged), at(20))
	if s.state.Served != audittest.Digest("good") {
		t.Errorf("%s is served", s.state.Served)
	}
}

// A signature that is missed raises the rule until it comes.
func TestLateSignatureReleases(t *testing.T) {
	s := newStory(compile(t, audit.RuleText{Mode: audit.Alert, Escalate: []string{"trust.downgraded"}}))
	signed := audit.Trust{Signers: []string{"release.yml"}}
	s.observe(seen("a"), at(0))
	o := looks(s, "b", audit.ClassUnknown)
	o.Change.Trust = &audit.TrustChange{Old: signed}
	if got := short(s.observe(o, at(60))); got != "moved held" || s.state.TrustDue() != at(70) {
		t.Fatalf("%q, looked at again at %v", got, s.state.TrustDue())
	}
	o = seen("b")
	o.Trust = &signed
	if got := short(s.observe(o, at(71))); got != "released" || s.state.Served != audittest.Digest("b") {
		t.Errorf("it is signed now: %q, %s is served", got, s.state.Served)
	}
}

// The tags that moved before a burst was one are raised, too: when a cooldown would let
// them through, it is known.
func TestTheFirstOfABurstAreHeld(t *testing.T) {
	w := newTown(t, audit.RuleText{Match: "**", Mode: audit.Cooldown, Age: 72 * time.Hour, Escalate: []string{"repo.burst"}})
	w.poll("acme/app", "a", "1", "b", "1", "c", "1", "d", "1")
	w.now = w.now.Add(40 * 24 * time.Hour)
	w.poll("acme/app", "a", "2", "b", "2", "c", "2")
	w.now = w.now.Add(100 * time.Hour)
	events := w.poll("acme/app", "a", "2", "b", "2", "c", "2")
	for _, tag := range []string{"a", "b", "c"} {
		st, err := w.store.State(t.Context(), audit.Ref{Upstream: "docker.io", Repository: "acme/app", Tag: tag})
		if err != nil || st.Served != audittest.Digest("1") {
			t.Errorf("%s serves %s, %v", tag, st.Served, err)
		}
	}
	if held := of(events, audit.Held); len(held) != 2 || held[0].Reason != "repo.burst" {
		t.Errorf("held: %v", events)
	}
	if events := w.poll("acme/app", "a", "2", "b", "2", "c", "2"); len(events) != 0 {
		t.Errorf("told again: %v", events)
	}
}

// What was held because of what it looks like is held when it comes back, too, whatever
// it looks like then.
func TestARaisedRuleIsRemembered(t *testing.T) {
	w := newTown(t, audit.RuleText{Match: "**", Mode: audit.Cooldown, Age: 24 * time.Hour, Escalate: []string{"user_to_root"}})
	ref := audittest.Ref("1")
	see := func(name string, later time.Duration, signals ...string) audit.State {
		t.Helper()
		w.now = w.now.Add(later)
		st, err := w.store.Advance(t.Context(), ref, func(r audit.Record) (audit.State, []audit.Event, error) {
			o := seen(name)
			if r.State.Known() && r.State.Head != o.Digest {
				o.Change = &audit.Comparison{Old: r.State.Head, New: o.Digest, Class: audit.ClassUnknown, Signals: signals}
			}
			st, events := w.policy.Next(ref, r, o, w.now)
			audit.Identify(&st, events)
			return st, events, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	see("good", 0)
	see("evil", time.Hour, "user_to_root")
	see("evil", 48*time.Hour) // it stood for longer than its tenure
	see("good", time.Hour)
	see("evil", time.Hour)
	if st := see("evil", 200*time.Hour); st.Served != audittest.Digest("good") {
		t.Errorf("%s is served", st.Served)
	}
	see("good", time.Hour)
	see("fine", time.Hour)
	if st := see("fine", 200*time.Hour); st.Served != audittest.Digest("fine") {
		t.Errorf("another digest is not: %s is served", st.Served)
	}
}

// A digest that is denied is served to nobody from the moment on that it is: what the
// tag meant before is, and who got it is told once, in numbers. A tag that never meant
// anything else is refused.
func TestDeniedDigest(t *testing.T) {
	store, clk := openStore(t, t.TempDir()), newClock()
	exposed := audit.NewExposures(store, 24*time.Hour, clk.Now, zerolog.Nop())
	policy := func(denied ...string) *audit.Policy {
		text := audit.PolicyText{Rules: []audit.RuleText{{Match: "**", Mode: audit.Alert}}}
		for _, d := range denied {
			text.Denied = append(text.Denied, audittest.Digest(d))
		}
		p, errs := audit.Compile(text)
		if len(errs) > 0 {
			t.Fatal(errs)
		}
		return p
	}
	begin := func(p *audit.Policy) *audit.Ledger {
		t.Helper()
		l := audit.New(audit.Options{Store: store, Memory: store, Now: clk.Now, Policy: p, Exposed: func(ctx context.Context, d digest.Digest) (audit.Exposed, error) {
			list, err := store.Exposures(ctx, d)
			return audit.CountExposed(list), err
		}})
		if err := l.Begin(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		return l
	}
	l := begin(policy())
	ask := func(tag, says string) (audit.Answer, error) {
		return l.Resolve(t.Context(), audittest.Ref(tag), func(context.Context, audit.Question) (audit.Observation, error) {
			if says == "" {
				return audit.Observation{}, errors.New("upstream is down")
			}
			return seen(says), nil
		})
	}
	serves := func(tag, says, want string) {
		t.Helper()
		a, err := ask(tag, says)
		if want == "" && errors.Is(err, audit.ErrDenied) && strings.Contains(err.Error(), "audit.denied") {
			return
		}
		if err != nil || a.Served != audittest.Digest(want) {
			t.Errorf("%s: %s, %v; want %q", tag, a.Served, err, want)
		}
	}
	for _, says := range []string{"good", "evil"} {
		serves("1", says, says)
		clk.advance(time.Hour)
	}
	serves("only", "evil", "evil")
	for _, client := range []string{"10.0.0.1", "10.0.0.2", "10.0.0.1"} {
		exposed.Note(audit.Visit{Digest: audittest.Digest("evil"), Client: client, Upstream: "docker.io", Repository: "library/app", Tag: "1", Fetched: true})
	}
	exposed.Flush(t.Context())
	if err := l.Reload(t.Context(), policy("evil", "never seen"), nil, "SIGHUP"); err != nil {
		t.Fatal(err)
	}
	events := audittest.Check(t, store)
	found := of(events, audit.ExposureFound)
	if len(found) != 1 || found[0].New.Digest != audittest.Digest("evil") || found[0].Exposed.Clients != 2 || found[0].Exposed.Fetches != 3 || found[0].Severity() != audit.Critical {
		t.Fatalf("exposures: %+v", found)
	}
	leaf, err := found[0].Leaf()
	if err != nil || strings.Contains(string(leaf), "10.0.0") {
		t.Errorf("the leaf says who: %s, %v", leaf, err)
	}
	serves("1", "", "") // upstream is down: what is denied is not served, and nothing else is decided yet
	serves("1", "evil", "good")
	serves("1", "", "good")
	serves("only", "evil", "")
	serves("new", "evil", "")
	serves("1", "better", "better")
	serves("1", "evil", "better")
	if _, err := l.Decide(t.Context(), audittest.Ref("1"), audit.Decision{Action: audit.Approve, Digest: audittest.Digest("evil"), Reason: "x"}); err == nil || !strings.Contains(err.Error(), "audit.denied") {
		t.Errorf("approved what is denied: %v", err)
	}
	if got := of(audittest.Check(t, store), audit.Violation); len(got) != 4 || slices.ContainsFunc(got, func(e audit.Event) bool { return e.Reason != "denied" }) {
		t.Errorf("violations: %s", fmt.Sprint(got))
	}
	begin(policy("never seen", "evil"))
	begin(policy("evil", "never seen"))
	if n := len(of(audittest.Check(t, store), audit.ExposureFound)); n != 1 {
		t.Errorf("who got it was told %d times", n)
	}
}
