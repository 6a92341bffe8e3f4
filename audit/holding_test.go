package audit_test

import (
	"context"
	"errors"
	"io/fs"
	"testing"
	"time"

	"tidemark/audit"
	"tidemark/audit/audittest"
)

// While a cooldown waits, answers are good for their TTL; but the moment it is
// over is not waited past, also when that is within the TTL.
func TestCooldownEndsOnTimeWhateverTheTTL(t *testing.T) {
	clk, u, store := newClock(), &upstream{says: "a"}, openStore(t, t.TempDir())
	l := audit.New(audit.Options{Store: store, TTL: 24 * time.Hour, Now: clk.Now, Policy: compile(t, audit.RuleText{Mode: audit.Cooldown, Age: 30 * time.Hour})})
	resolve(t, l, u)
	clk.advance(25 * time.Hour)
	u.set("b", nil)
	a := resolve(t, l, u)
	head, until, why := a.Withheld()
	if a.Served != audittest.Digest("a") || head != audittest.Digest("b") || why != "cooldown" || !until.Equal(noon.Add(55*time.Hour)) {
		t.Errorf("held: %s is served, %s is withheld until %v, %s", a.Served, head, until, why)
	}
	clk.advance(23 * time.Hour)
	if a := resolve(t, l, u); a.Asked {
		t.Error("upstream was asked within the TTL")
	}
	clk.advance(8 * time.Hour)
	if a := resolve(t, l, u); a.Served != audittest.Digest("b") || !a.New {
		t.Errorf("afterwards: %+v", a)
	}
	if n := u.asked.Load(); n != 3 {
		t.Errorf("upstream was asked %d times, want 3", n)
	}
	audittest.Check(t, store)
}

// Nothing is promoted while upstream does not answer: what waits may have been
// taken back meanwhile.
func TestNothingIsPromotedUnconfirmed(t *testing.T) {
	clk, u := newClock(), &upstream{says: "a"}
	l := audit.New(audit.Options{Store: openStore(t, t.TempDir()), Now: clk.Now, Policy: compile(t, audit.RuleText{Mode: audit.Cooldown, Age: hour})})
	resolve(t, l, u)
	u.set("b", nil)
	clk.advance(hour)
	resolve(t, l, u)
	u.set("", errors.New("503"))
	clk.advance(2 * hour)
	if a := resolve(t, l, u); a.Served != audittest.Digest("a") || a.Stale == nil {
		t.Errorf("upstream is down: %+v, want what was served", a)
	}
	u.set("b", nil)
	if a := resolve(t, l, u); a.Served != audittest.Digest("b") {
		t.Errorf("upstream is back: %s is served", a.Served)
	}
}

// A tag that a rule denies is refused without asking anybody; one that is new
// under refuse_until_age is refused until then.
func TestRefusals(t *testing.T) {
	clk, u := newClock(), &upstream{says: "a"}
	l := audit.New(audit.Options{Store: openStore(t, t.TempDir()), TTL: time.Minute, Now: clk.Now, Policy: compile(t, audit.RuleText{Mode: audit.Deny})})
	if _, err := l.Resolve(t.Context(), audittest.Ref("1"), u.ask); !errors.Is(err, audit.ErrDenied) || u.asked.Load() != 0 {
		t.Errorf("denied: %v, upstream was asked %d times", err, u.asked.Load())
	}
	if err := l.SetPolicy(t.Context(), compile(t, audit.RuleText{Mode: audit.Cooldown, Age: hour, OnNew: audit.NewRefuse}), "test"); err != nil {
		t.Fatal(err)
	}
	for range 2 { // asked, and remembered
		if _, err := l.Resolve(t.Context(), audittest.Ref("1"), u.ask); !errors.Is(err, audit.ErrTooNew) {
			t.Errorf("too new: %v", err)
		}
	}
	clk.advance(hour)
	if a := resolve(t, l, u); a.Served != audittest.Digest("a") {
		t.Errorf("old enough: %+v", a)
	}
}

// A deleted tag is served as it was, told as stale, or refused, as its rule says.
func TestDeletedTags(t *testing.T) {
	for onDeleted, refused := range map[string]bool{audit.DeletedServe: false, audit.DeletedRefuse: true} {
		clk, store := newClock(), openStore(t, t.TempDir())
		l := audit.New(audit.Options{Store: store, Now: clk.Now, Policy: compile(t, audit.RuleText{Mode: audit.Observe, OnDeleted: onDeleted})})
		there, corroborated := true, 0
		ask := func(_ context.Context, q audit.Question) (audit.Observation, error) {
			if there {
				return audit.Observation{Digest: audittest.Digest("a")}, nil
			}
			if q.Corroborate {
				corroborated++
			}
			return audit.Observation{Absent: fs.ErrNotExist, Gone: q.Corroborate}, nil
		}
		if _, err := l.Resolve(t.Context(), audittest.Ref("1"), ask); err != nil {
			t.Fatal(err)
		}
		there = false
		for i := range 4 {
			clk.advance(25 * time.Minute)
			a, err := l.Resolve(t.Context(), audittest.Ref("1"), ask)
			switch {
			case i == 3 && refused:
				if !errors.Is(err, audit.ErrDeleted) {
					t.Errorf("%s, absence %d: %+v, %v; want ErrDeleted", onDeleted, i, a, err)
				}
			case err != nil || a.Served != audittest.Digest("a") || !errors.Is(a.Stale, fs.ErrNotExist):
				t.Errorf("%s, absence %d: %+v, %v; want what was served, and why it is stale", onDeleted, i, a, err)
			}
		}
		if corroborated != 1 {
			t.Errorf("%s: another sign was looked for %d times, want once", onDeleted, corroborated)
		}
		there = true
		if a, err := l.Resolve(t.Context(), audittest.Ref("1"), ask); err != nil || a.Served != audittest.Digest("a") || a.Stale != nil {
			t.Errorf("%s, back: %+v, %v", onDeleted, a, err)
		}
		events := audittest.Check(t, store)
		if got := short(events); got != "first_seen deleted restored" {
			t.Errorf("%s: events are %s", onDeleted, got)
		}
	}
}

// An upstream that contradicts itself is on the record once, and the last good
// digest is served.
func TestContradictionsAreTold(t *testing.T) {
	store := openStore(t, t.TempDir())
	l := audit.New(audit.Options{Store: store, Now: newClock().Now})
	u := &upstream{says: "a"}
	resolve(t, l, u)
	lie := &audit.InconsistentError{Claimed: audittest.Digest("lie"), Err: errors.New("its bytes are others")}
	for range 3 {
		u.set("", lie)
		if a := resolve(t, l, u); a.Served != audittest.Digest("a") || !errors.Is(a.Stale, lie) {
			t.Errorf("answer is %+v", a)
		}
	}
	u.set("b", nil)
	resolve(t, l, u)
	u.set("", lie)
	resolve(t, l, u)
	if got := short(audittest.Check(t, store)); got != "first_seen upstream.inconsistent moved upstream.inconsistent" {
		t.Errorf("events are %s", got)
	}
	if _, err := l.Resolve(t.Context(), audittest.Ref("unknown"), u.ask); !errors.Is(err, lie) {
		t.Errorf("a tag never seen: %v", err)
	}
}

// An operator's decision is what the next answer says, whatever the TTL; it is
// recorded once, and when the ledger cannot be written it is refused and nothing
// has changed: or, if it was done and reported as failed, the next answer knows.
func TestDecisionsTakeEffectAtOnce(t *testing.T) {
	full := errors.New("disk full")
	store := openStore(t, t.TempDir())
	f := &faulty{Store: store}
	l := audit.New(audit.Options{Store: f, TTL: time.Hour, Now: newClock().Now, Policy: compile(t, audit.RuleText{Mode: audit.HoldMode})})
	u := &upstream{says: "a"}
	ref := audittest.Ref("1")
	resolve(t, l, u)
	u.set("b", nil)
	if err := l.SetPolicy(t.Context(), compile(t, audit.RuleText{Mode: audit.HoldMode, Name: "other"}), "forget what was remembered"); err != nil {
		t.Fatal(err)
	}
	resolve(t, l, u)
	approve := audit.Decision{Action: audit.Approve, Digest: audittest.Digest("b"), Reason: "read"}
	f.advance = func(func() (audit.State, error)) (audit.State, error) { return audit.State{}, full }
	if _, err := l.Decide(t.Context(), ref, approve); !errors.Is(err, audit.ErrLedger) || !errors.Is(err, full) {
		t.Errorf("refused by the disk: %v", err)
	}
	f.advance = nil
	if a := resolve(t, l, u); a.Served != audittest.Digest("a") {
		t.Errorf("after a decision that was not recorded %s is served", a.Served)
	}
	f.advance = func(do func() (audit.State, error)) (audit.State, error) {
		_, err := do()
		return audit.State{}, errors.Join(err, full)
	}
	if _, err := l.Decide(t.Context(), ref, approve); !errors.Is(err, audit.ErrLedger) {
		t.Errorf("done but reported as failed: %v", err)
	}
	f.advance = nil
	if a := resolve(t, l, u); a.Served != audittest.Digest("b") {
		t.Errorf("the decision was recorded, and %s is served", a.Served)
	}
	if _, err := l.Decide(t.Context(), ref, approve); err == nil {
		t.Error("the same decision was taken twice")
	}
	if got := short(audittest.Check(t, store)); got != "first_seen operator.action moved held operator.action released" {
		t.Errorf("events are %s", got)
	}
}

// A change of the policy is on the record before it decides, also one that came
// while no process was there; so are other credentials, and a time in which
// nothing was observed.
func TestWhatChangedBetweenProcessesIsOnTheRecord(t *testing.T) {
	store, clk := openStore(t, t.TempDir()), newClock()
	begin := func(p *audit.Policy, identity string) *audit.Ledger {
		t.Helper()
		l := audit.New(audit.Options{Store: store, Memory: store, Now: clk.Now, Policy: p})
		if err := l.Begin(t.Context(), map[string]string{"docker.io": identity}); err != nil {
			t.Fatal(err)
		}
		return l
	}
	count := func() int { return len(audittest.Check(t, store)) }
	observe, hold := compile(t, audit.RuleText{Mode: audit.Observe}), compile(t, audit.RuleText{Mode: audit.HoldMode})
	begin(observe, "anonymous")
	clk.advance(10 * time.Minute)
	begin(observe, "anonymous")
	if n := count(); n != 0 {
		t.Errorf("a first start and a restart are %d events, want none", n)
	}
	clk.advance(2 * hour)
	begin(hold, "user-1")
	events := audittest.Check(t, store)
	if len(events) != 3 {
		t.Fatalf("%d events, want policy, credentials and gap", len(events))
	}
	if op := events[0].Operator; op.Action != "policy.changed" || op.Old != observe.SHA256() || op.New != hold.SHA256() {
		t.Errorf("the policy: %+v", op)
	}
	if op := events[1].Operator; op.Action != "credentials.changed" || op.Target != "docker.io" || op.Old != "anonymous" || op.New != "user-1" {
		t.Errorf("the credentials: %+v", op)
	}
	if g := events[2].Gap; g.Cause != "stopped" || !g.Start.Equal(noon.Add(10*time.Minute)) || !g.End.Equal(noon.Add(130*time.Minute)) {
		t.Errorf("the gap: %+v", g)
	}
	l := begin(hold, "user-1")
	if err := l.Reload(t.Context(), observe, map[string]string{"docker.io": "user-1"}, "SIGHUP"); err != nil {
		t.Fatal(err)
	}
	begin(observe, "user-1")
	if events = audittest.Check(t, store); len(events) != 4 || events[3].Operator.Reason != "SIGHUP" || l.Policy() != observe {
		t.Errorf("after a reload and a restart: %d events", len(events))
	}
}
