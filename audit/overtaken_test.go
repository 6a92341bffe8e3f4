package audit_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"tidemark/audit"
	"tidemark/audit/audittest"
)

// A question that was asked before an operator decided does not undo the
// decision, whatever comes of it: not for who waits for it, and not later.
func TestQuestionUnderWayDoesNotUndoADecision(t *testing.T) {
	for _, answer := range []error{nil, errors.New("503")} {
		clk, u, store := newClock(), &upstream{says: "a"}, openStore(t, t.TempDir())
		l := audit.New(audit.Options{Store: store, Now: clk.Now})
		pull := func() audit.Answer {
			clk.advance(time.Hour)
			return resolve(t, l, u)
		}
		pull()
		u.set("b", nil)
		for range 30 {
			pull()
		}
		asked, goOn, done := make(chan bool), make(chan bool), make(chan audit.Answer)
		go func() {
			a, err := l.Resolve(t.Context(), audittest.Ref("1"), func(context.Context, audit.Question) (audit.Observation, error) {
				close(asked)
				<-goOn
				return audit.Observation{Digest: audittest.Digest("b")}, answer
			})
			if err != nil {
				t.Error(err)
			}
			done <- a
		}()
		<-asked
		d := audit.Decision{Action: audit.HoldAt, Digest: audittest.Digest("a"), Reason: "b is malicious"}
		if err := l.Try(t.Context(), audittest.Ref("1"), d); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Decide(t.Context(), audittest.Ref("1"), d); err != nil {
			t.Fatal(err)
		}
		close(goOn)
		if a := <-done; a.Served != audittest.Digest("a") {
			t.Errorf("upstream says %v: who waited gets %s, want what is held", answer, a.Served)
		}
		for range 5 {
			if a := pull(); a.Served != audittest.Digest("a") {
				t.Errorf("upstream says %v: afterwards %s is served, want what is held", answer, a.Served)
			}
		}
	}
}

// What is recorded after a change of the policy was decided by the new one, also
// if upstream was asked before.
func TestQuestionUnderWayIsDecidedByTheNewPolicy(t *testing.T) {
	u, store := &upstream{says: "a"}, openStore(t, t.TempDir())
	l := audit.New(audit.Options{Store: store, Now: newClock().Now, Policy: compile(t, audit.RuleText{Mode: audit.Observe})})
	resolve(t, l, u)
	asked, goOn, done := make(chan bool), make(chan bool), make(chan bool)
	go func() {
		defer close(done)
		a, err := l.Resolve(t.Context(), audittest.Ref("1"), func(context.Context, audit.Question) (audit.Observation, error) {
			close(asked)
			<-goOn
			return audit.Observation{Digest: audittest.Digest("b")}, nil
		})
		if err != nil || a.Served != audittest.Digest("a") {
			t.Errorf("who waited gets %+v, %v; want what is held", a, err)
		}
	}()
	<-asked
	hold := compile(t, audit.RuleText{Mode: audit.HoldMode})
	if err := l.SetPolicy(t.Context(), hold, "test"); err != nil {
		t.Fatal(err)
	}
	close(goOn)
	<-done
	events := audittest.Check(t, store)
	for _, e := range events[2:] {
		if e.Policy.SHA256 != hold.SHA256() {
			t.Errorf("%s was decided by the policy from before", e.Type)
		}
	}
	if got := short(events); got != "first_seen operator.action moved held" {
		t.Errorf("events are %s", got)
	}
}

// What a cooldown serves and upstream takes back within its tenure is not served
// on: the digest from before is as old as it is.
func TestServedDigestThatIsTakenBack(t *testing.T) {
	day := 24 * 60.0
	for name, arrive := range map[string]func(s *story){
		"it was served under another rule": func(s *story) {
			s.policy = compile(t, audit.RuleText{Mode: audit.Observe})
			s.see("m", at(100*day+30))
			s.policy = compile(t, audit.RuleText{Mode: audit.Cooldown, Age: 72 * hour})
		},
		"somebody approved it": func(s *story) {
			s.see("m", at(100*day+30))
			st, events, err := s.policy.Decide(s.ref, s.record(), audit.Decision{Action: audit.Approve, Digest: audittest.Digest("m"), Reason: "r"}, at(100*day+40))
			if err != nil {
				t.Fatal(err)
			}
			s.take(st, events)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStory(compile(t, audit.RuleText{Mode: audit.Cooldown, Age: 72 * hour}))
			s.see("a", at(0))
			s.see("a", at(100*day))
			arrive(s)
			if s.state.Served != audittest.Digest("m") {
				t.Fatal("m is not served; the test tests nothing")
			}
			if got := short(s.see("a", at(100*day+90))); got != "reverted withdrawn" || s.state.Served != audittest.Digest("a") {
				t.Errorf("taken back: %q, %s is served; want what upstream went back to", got, s.state.Served)
			}
			if got := short(s.see("m", at(100*day+100))); got != "reverted held" || s.state.Served != audittest.Digest("a") {
				t.Errorf("it returns: %q, %s is served", got, s.state.Served)
			}
		})
	}
}

// How long a digest was the head is not certain when nobody asked for a while: it
// is not served by its age, and not called withdrawn either.
func TestTenureThatIsNotKnownIsNoWithdrawal(t *testing.T) {
	week := 7 * 24 * 60.0
	s := newStory(compile(t, audit.RuleText{Mode: audit.Cooldown, Age: 72 * hour}))
	s.see("a", at(0))
	for i := range 5 {
		if got := short(s.see(string(rune('b'+i)), at(float64(i+1)*week))); got != "moved held" && got != "moved held policy.starved" {
			t.Errorf("week %d: %q", i+1, got)
		}
	}
	s.see("f", at(5*week+73*60))
	if s.state.Served != audittest.Digest("f") {
		t.Errorf("%s is served, want what stood for three days", s.state.Served)
	}
}

// A hold that went back leaves, when it is released, what the rule had; and a rule
// never goes back from there to something older.
func TestReleasedHoldGivesBackWhatTheRuleHad(t *testing.T) {
	cooldown := audit.RuleText{Mode: audit.Cooldown, Age: 10 * hour, Tenure: tenure(hour)}
	decide := func(s *story, action, name string, hours float64) []audit.Event {
		t.Helper()
		d := audit.Decision{Action: action, Reason: "r"}
		if name != "" {
			d.Digest = audittest.Digest(name)
		}
		st, events, err := s.policy.Decide(s.ref, s.record(), d, at(60*hours))
		if err != nil {
			t.Fatal(err)
		}
		return s.take(st, events)
	}
	s := newStory(compile(t, cooldown))
	s.see("p", at(0))
	s.see("a", at(60))
	s.see("a", at(60*12)) // served from here on
	s.see("b", at(60*13))
	decide(s, audit.HoldAt, "p", 13.5)
	if got := short(decide(s, audit.Release, "", 13.6)); got != "operator.action released" || s.state.Served != audittest.Digest("a") {
		t.Errorf("released: %q, %s is served, want what was served before the hold", got, s.state.Served)
	}
	s.check(t)

	s = newStory(compile(t, cooldown))
	s.see("a", at(0))
	s.see("w", at(60*20))
	s.see("w", at(60*22))
	s.see("x", at(60*23))
	s.see("x", at(60*25))
	s.see("h", at(60*26))
	decide(s, audit.HoldAt, "x", 26.5)
	s.see("h", at(60*31))
	decide(s, audit.Release, "", 32)
	s.see("h", at(60*33))
	if s.state.Served != audittest.Digest("a") && s.state.Served != audittest.Digest("x") {
		t.Errorf("released, %s is served, which is older than what was gone to", s.state.Served)
	}

	hold := newStory(compile(t, audit.RuleText{Mode: audit.HoldMode}))
	hold.see("p", at(0))
	hold.see("a", at(60))
	decide(hold, audit.Approve, "a", 2)
	hold.see("b", at(60*3))
	decide(hold, audit.HoldAt, "p", 4)
	decide(hold, audit.Release, "", 5)
	if hold.state.Served != audittest.Digest("a") {
		t.Errorf("under hold: %s is served, want what was approved", hold.state.Served)
	}
}

// One edge of upstream that lies now and then is told once a day.
func TestAContradictionIsToldOnceADay(t *testing.T) {
	clk, u, store := newClock(), &upstream{says: "a"}, openStore(t, t.TempDir())
	l := audit.New(audit.Options{Store: store, Now: clk.Now})
	resolve(t, l, u)
	for range 60 {
		u.set("", &audit.InconsistentError{Claimed: audittest.Digest("x"), Err: errors.New("404")})
		clk.advance(20 * time.Minute)
		resolve(t, l, u)
		u.set("a", nil)
		clk.advance(20 * time.Minute)
		resolve(t, l, u)
	}
	if got := short(audittest.Check(t, store)); got != "first_seen upstream.inconsistent upstream.inconsistent" {
		t.Errorf("in forty hours: %s", got)
	}
}

// A tag that comes back as it was has not been rolled back.
func TestRestoredAsItWas(t *testing.T) {
	s := newStory(compile(t, audit.RuleText{Mode: audit.Observe}))
	s.observe(seen("a"), at(0))
	s.observe(absent, at(1))
	s.observe(absent, at(30))
	s.observe(gone(), at(62))
	s.past[audittest.Digest("a")] = audit.Past{FirstSeen: at(0)} // a deletion ends its time, in a store
	if e := s.observe(seen("a"), at(100))[0]; e.Class != "" || e.Rebaseline {
		t.Errorf("restored as it was: class %q", e.Class)
	}
}
