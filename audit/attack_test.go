package audit_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
	"tidemark/audit/audittest"
)

// What somebody with a publisher's rights would try, and what goes wrong by itself around
// it.

// with is a part of an answer.
type with func(*audit.Observation)

func signals(names ...string) with {
	return func(o *audit.Observation) { o.Change.Signals = names }
}

func fromServed(class audit.Class, names ...string) with {
	return func(o *audit.Observation) { o.Served.Class, o.Served.Signals = class, names }
}

func beside(old, new audit.Trust) with {
	return func(o *audit.Observation) { o.Change.Trust = &audit.TrustChange{Old: old, New: new} }
}

func nowBeside(t audit.Trust) with { return func(o *audit.Observation) { o.Trust = &t } }

// see has a tag mean something later on, and returns what is served then, by name.
func (w *town) see(tag, name string, later time.Duration, parts ...with) string {
	w.t.Helper()
	w.now = w.now.Add(later)
	ref := audittest.Ref(tag)
	st, err := w.store.Advance(w.t.Context(), ref, func(r audit.Record) (audit.State, []audit.Event, error) {
		o := seen(name)
		o.MediaType, o.Size = "application/x", 7
		if r.State.Known() && r.State.Head != o.Digest {
			o.Change = &audit.Comparison{Old: r.State.Head, New: o.Digest, Class: audit.ClassUnknown}
			o.Served = &audit.Comparison{Old: r.State.Served, New: o.Digest, Class: audit.ClassUnknown}
		}
		for _, p := range parts {
			p(&o)
		}
		if o.Served != nil && len(o.Served.Signals) == 0 && o.Served.Class == audit.ClassUnknown {
			o.Served = nil // it could not be compared
		}
		st, events := w.policy.Next(ref, r, o, w.now)
		audit.Identify(&st, events)
		return st, events, nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return w.name(st.Served)
}

func (w *town) name(d digest.Digest) string {
	for _, name := range []string{"good", "evil", "evil 2", "better", "fixed", "older"} {
		if audittest.Digest(name) == d {
			return name
		}
	}
	return d.String()
}

func (w *town) decide(tag, action, name string) {
	w.t.Helper()
	_, err := w.store.Advance(w.t.Context(), audittest.Ref(tag), func(r audit.Record) (audit.State, []audit.Event, error) {
		st, events, err := w.policy.Decide(audittest.Ref(tag), r, audit.Decision{Action: action, Digest: audittest.Digest(name), Reason: "x"}, w.now)
		audit.Identify(&st, events)
		return st, events, err
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// adopt has another policy decide from here on.
func (w *town) adopt(text audit.PolicyText) {
	w.t.Helper()
	p, errs := audit.Compile(text)
	if len(errs) > 0 {
		w.t.Fatal(errs)
	}
	w.policy = p
}

func (w *town) want(when, got, want string) {
	w.t.Helper()
	if got != want {
		w.t.Errorf("%s: %q is served, want %q", when, got, want)
	}
}

// What is held for what it looks like is not got round by pushing it once more, with
// nothing new in it: a rule is raised by how a digest differs from what is served.
func TestASecondPushIsHeldToo(t *testing.T) {
	for _, rule := range []audit.RuleText{
		{Match: "**", Mode: audit.Alert, Escalate: []string{"user_to_root"}},
		{Match: "**", Mode: audit.Cooldown, Age: time.Hour, Escalate: []string{"user_to_root"}},
	} {
		w := newTown(t, rule)
		w.see("1", "good", 0)
		w.see("1", "evil", time.Hour, signals("user_to_root"))
		w.see("1", "evil 2", time.Minute)
		w.want("it could not be compared", w.see("1", "evil 2", 2*time.Hour), "good")
		w.see("1", "evil", time.Minute, fromServed(audit.ClassUnknown, "user_to_root"))
		w.want("it was compared", w.see("1", "evil", 2*time.Hour), "good")
		w.see("1", "fixed", time.Minute, signals("user_changed"), fromServed(audit.ClassRebuild, "cmd_changed"))
		w.want("what the publisher makes of it", w.see("1", "fixed", 2*time.Hour), "fixed")
	}
	signed := audit.Trust{Signers: []string{"ci"}}
	w := newTown(t, audit.RuleText{Match: "**", Mode: audit.Alert, Escalate: []string{"trust.downgraded"}})
	w.see("1", "good", 0)
	w.see("1", "evil", time.Hour, beside(signed, audit.Trust{}))
	w.see("1", "evil", 11*time.Minute, nowBeside(audit.Trust{}))
	w.want("without a signature again", w.see("1", "evil 2", time.Minute), "good")
	w.want("nothing stands beside anything any more", w.see("1", "evil", time.Minute, fromServed(audit.ClassRebuild, "cmd_changed")), "good")
	w.want("signed again", w.see("1", "fixed", time.Minute, fromServed(audit.ClassRebuild), func(o *audit.Observation) {
		o.Served.Trust = &audit.TrustChange{Old: signed, New: signed}
	}), "fixed")
}

// What stood beside the head is remembered: to take it away before the push does not help.
func TestASignatureThatWasTakenAwayFirst(t *testing.T) {
	signed := audit.Trust{Signers: []string{"ci"}}
	w := newTown(t, audit.RuleText{Match: "**", Mode: audit.Alert})
	w.see("1", "older", 0)
	w.see("1", "good", time.Hour)
	w.see("1", "good", 11*time.Minute, nowBeside(signed))
	w.see("1", "evil", 24*time.Hour) // upstream says that nothing stands beside anything
	w.see("1", "evil", 11*time.Minute, nowBeside(audit.Trust{}))
	if told := of(audittest.Check(t, w.store), audit.Downgraded); len(told) != 1 || told[0].New.Digest != audittest.Digest("evil") {
		t.Errorf("told: %v", told)
	}
}

// What cannot be looked at is looked for less and less often, not with every pull, and
// told when it can be.
func TestLooksThatFailAreFew(t *testing.T) {
	w := newTown(t, audit.RuleText{Match: "**", Mode: audit.Alert})
	w.see("1", "good", 0)
	w.see("1", "evil", time.Hour, beside(audit.Trust{Signers: []string{"ci"}}, audit.Trust{}))
	looks := 0
	for range 24 * 60 {
		st, err := w.store.State(t.Context(), audittest.Ref("1"))
		if err != nil {
			t.Fatal(err)
		}
		w.now = w.now.Add(time.Minute)
		if !w.now.Before(st.TrustDue()) {
			looks++
			w.see("1", "evil", 0, func(o *audit.Observation) { o.Unseen = true })
		}
	}
	if looks < 6 || looks > 9 {
		t.Errorf("looked %d times in a day", looks)
	}
	w.see("1", "evil", 48*time.Hour, nowBeside(audit.Trust{}))
	if told := of(audittest.Check(t, w.store), audit.Downgraded); len(told) != 1 {
		t.Errorf("told %d times", len(told))
	}
}

// A signature that is missed hides nothing else, and one that comes takes back only that.
func TestASignatureExcusesNothingElse(t *testing.T) {
	signed := audit.Trust{Signers: []string{"ci"}}
	w := newTown(t, audit.RuleText{Match: "**", Mode: audit.Alert, Escalate: []string{"trust.downgraded", "user_to_root"}})
	w.see("1", "good", 0)
	w.see("1", "evil", time.Hour, signals("user_to_root"), beside(signed, audit.Trust{}))
	w.want("signed by now", w.see("1", "evil", 11*time.Minute, nowBeside(signed)), "good")
}

// A publisher that goes back to what was there before is not held.
func TestRevertsAreNotHeld(t *testing.T) {
	w := newTown(t, audit.RuleText{Match: "**", Mode: audit.Alert, Escalate: []string{"repo.burst"}})
	tags := []string{"1.0.0", "1.0.1", "1.0.2"}
	for _, name := range []string{"good", "evil", "good"} {
		for _, tag := range tags {
			served := w.see(tag, name, time.Minute)
			if name == "good" {
				w.want(tag, served, "good")
			}
		}
		w.now = w.now.Add(20 * time.Minute)
		if name == "good" {
			w.now = w.now.Add(60 * 24 * time.Hour)
		}
	}
}

// When what is served is denied, nothing is served that somebody rejected, that was never
// served, or that a hold by hand was against.
func TestDenialDoesNotServeWorse(t *testing.T) {
	cooldown := audit.RuleText{Match: "**", Mode: audit.Cooldown, Age: 24 * time.Hour}
	w := newTown(t, cooldown)
	w.see("1", "good", 0)
	w.see("1", "evil", time.Hour)
	w.decide("1", audit.Reject, "evil")
	w.see("1", "evil 2", time.Hour)
	w.see("1", "better", 30*time.Hour)
	w.want("of age", w.see("1", "better", 48*time.Hour), "better")
	w.adopt(audit.PolicyText{Rules: []audit.RuleText{cooldown}, Denied: []digest.Digest{audittest.Digest("better")}})
	w.want("denied", w.see("1", "better", time.Hour), "good")

	w = newTown(t, audit.RuleText{Match: "**", Mode: audit.Alert})
	w.see("1", "good", 0)
	w.see("1", "better", time.Hour)
	w.decide("1", audit.HoldAt, "better")
	w.see("1", "evil", time.Hour)
	w.adopt(audit.PolicyText{Rules: []audit.RuleText{{Match: "**", Mode: audit.Alert}}, Denied: []digest.Digest{audittest.Digest("better")}})
	w.want("held by hand, and denied", w.see("1", "evil", time.Hour), "good")
	if st, err := w.store.State(t.Context(), audittest.Ref("1")); err != nil || st.Hold == nil {
		t.Errorf("the hold has ended: %v", err)
	}
}

// That something older is served does not end the alert about what still waits.
func TestAnAlertIsEndedByWhatItIsAbout(t *testing.T) {
	w := newTown(t, audit.RuleText{Match: "**", Mode: audit.Cooldown, Age: 72 * time.Hour, Escalate: []string{"user_to_root"}})
	w.see("1", "good", 0)
	w.see("1", "better", time.Hour)
	w.see("1", "better", 40*time.Hour)
	w.see("1", "evil", time.Hour, signals("user_to_root"))
	w.want("of age", w.see("1", "evil", 40*time.Hour), "better")
	open, err := w.store.Alerts(t.Context(), false, 10)
	if err != nil || len(open) != 1 || open[0].Digest != audittest.Digest("evil") {
		t.Errorf("open: %+v, %v", open, err)
	}
	w.decide("1", audit.Reject, "evil")
	if open, err = w.store.Alerts(t.Context(), false, 10); err != nil || len(open) != 0 {
		t.Errorf("open after it was rejected: %+v, %v", open, err)
	}
}

// What the policy comes to allow need not wait any longer, and what it no longer does waits.
func TestAllowedWhileItWaits(t *testing.T) {
	cooldown := audit.RuleText{Match: "**", Mode: audit.Cooldown, Age: 72 * time.Hour, Escalate: []string{"user_to_root"}}
	w := newTown(t, cooldown)
	for i, name := range []string{"better", "fixed"} {
		tag := fmt.Sprint(i)
		w.see(tag, "good", 0)
		w.want("it waits", w.see(tag, name, time.Hour, signals("user_to_root")), "good")
		w.adopt(audit.PolicyText{Rules: []audit.RuleText{cooldown}, Allowed: []digest.Digest{audittest.Digest(name)}})
		w.want("allowed", w.see(tag, name, time.Hour), name)
		w.adopt(audit.PolicyText{Rules: []audit.RuleText{cooldown}})
	}
}
