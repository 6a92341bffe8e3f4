package audit_test

import (
	"errors"
	"io/fs"
	"testing"
	"time"

	"tidemark/audit"
	"tidemark/audit/audittest"
)

// chronicle is what a store knows of a ref, looked at some time after.
func chronicle(t *testing.T, store audittest.Store, ref audit.Ref) audit.Chronicle {
	t.Helper()
	c, err := store.Chronicle(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// A tag's past is what clients were given then: the digest from before the first
// move, nothing before the first sight, nothing of a time to come, and while a rule
// held a move back, what it went on serving.
func TestThePastIsWhatWasServed(t *testing.T) {
	clk, u, store := newClock(), &upstream{says: "a"}, openStore(t, t.TempDir())
	l := audit.New(audit.Options{Store: store, Now: clk.Now, Policy: compile(t, audit.RuleText{Mode: audit.Cooldown, Age: 30 * hour})})
	resolve(t, l, u) // noon: a
	clk.advance(10 * time.Hour)
	u.set("b", nil)
	resolve(t, l, u) // 22:00: b is held
	clk.advance(30 * time.Hour)
	resolve(t, l, u) // b is served
	moved := noon.Add(40 * time.Hour)
	clk.advance(time.Hour)

	c := chronicle(t, store, audittest.Ref("1"))
	for _, tt := range []struct {
		name string
		at   audit.Moment
		want string // "" is none
	}{
		{"before it was seen", audit.AtTime(noon.Add(-time.Second)), ""},
		{"the moment it was seen", audit.AtTime(noon), "a"},
		{"while the move was held back", audit.AtTime(noon.Add(20 * time.Hour)), "a"},
		{"just before it was let through", audit.AtTime(moved.Add(-time.Millisecond)), "a"},
		{"when it was let through", audit.AtTime(moved), "b"},
		{"now", audit.AtTime(clk.Now()), "b"},
		{"a time to come", audit.AtTime(clk.Now().Add(time.Second)), ""},
		{"after the first entry", audit.AtIndex(0), "a"},
		{"after the last entry", audit.AtIndex(c.Size - 1), "b"},
		{"an entry to come", audit.AtIndex(c.Size), ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			then, err := c.AsOf(tt.at, clk.Now())
			switch {
			case tt.want == "":
				var past *audit.PastError
				if !errors.As(err, &past) || !errors.Is(err, fs.ErrNotExist) || past.Earliest == nil || !past.Earliest.Equal(noon) {
					t.Errorf("%+v, %v; want a PastError that knows something from %s on", then, err, noon)
				}
			case err != nil || then.Digest != audittest.Digest(tt.want) || then.Basis != audit.Observed:
				t.Errorf("%+v, %v; want %s, observed", then, err, tt.want)
			case tt.want == "a" && (!then.From.Equal(noon) || then.Until == nil || !then.Until.Equal(moved)):
				t.Errorf("from %s until %v, want from %s until %s", then.From, then.Until, noon, moved)
			case tt.want == "b" && (!then.From.Equal(moved) || then.Until != nil):
				t.Errorf("from %s until %v, want from %s on", then.From, then.Until, moved)
			}
		})
	}
	audittest.Check(t, store)
}

func decide(t *testing.T, l *audit.Ledger, d audit.Decision) {
	t.Helper()
	if _, err := l.Decide(t.Context(), audittest.Ref("1"), d); err != nil {
		t.Fatal(err)
	}
}

// What upstream had deleted is not there as of then, and what an operator rejected
// since is given to nobody, whatever the time.
func TestThePastWithoutWhatWasDeletedOrRejected(t *testing.T) {
	clk, u, store := newClock(), &upstream{says: "a"}, openStore(t, t.TempDir())
	l := audit.New(audit.Options{Store: store, Now: clk.Now, Policy: compile(t, audit.RuleText{Mode: audit.HoldMode})})
	resolve(t, l, u)
	clk.advance(hour)
	u.set("b", nil)
	resolve(t, l, u)
	clk.advance(hour)
	decide(t, l, audit.Decision{Action: audit.Approve, Digest: audittest.Digest("b"), Reason: "read"})
	clk.advance(hour)
	u.set("c", nil)
	resolve(t, l, u)
	clk.advance(hour)
	decide(t, l, audit.Decision{Action: audit.Reject, Digest: audittest.Digest("c"), Reason: "a miner"})
	c := chronicle(t, store, audittest.Ref("1"))
	c.Rejected[audittest.Digest("b")] = true // as if it had been rejected later
	if then, err := c.AsOf(audit.AtTime(noon.Add(2*hour)), clk.Now()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("rejected since: %+v, %v", then, err)
	}
	if then, err := c.AsOf(audit.AtTime(noon.Add(hour)), clk.Now()); err != nil || then.Digest != audittest.Digest("a") {
		t.Errorf("before that: %+v, %v", then, err)
	}
	if !c.Rejected[audittest.Digest("c")] {
		t.Error("a rejection is not in the chronicle")
	}
}

// Claims of others count only where this log has no word of its own, and say so.
func TestClaimsOfOthersFillWhatIsBeforeUs(t *testing.T) {
	seen := noon
	until := noon.Add(-24 * hour)
	claim := func(basis, source, d string, since time.Time, until *time.Time) audit.Claim {
		return audit.Claim{Basis: basis, Served: basis == audit.Imported, Source: source, Digest: audittest.Digest(d), Since: since, LastConfirmed: since.Add(hour), Until: until}
	}
	clk, u, store := newClock(), &upstream{says: "a"}, openStore(t, t.TempDir())
	l := audit.New(audit.Options{Store: store, Now: clk.Now})
	resolve(t, l, u)
	c := chronicle(t, store, audittest.Ref("1"))
	c.Claims = []audit.Claim{
		claim(audit.Asserted, "quay", "y", until, nil),
		claim(audit.Asserted, "quay", "x", noon.Add(-48*hour), &until),
		claim(audit.Imported, "tidemark/other", "i", noon.Add(-30*hour), &until),
		{Basis: audit.Imported, Source: "tidemark/other", Digest: audittest.Digest("held there"), Since: noon.Add(-60 * hour), LastConfirmed: noon},
	}
	for _, tt := range []struct {
		name  string
		at    time.Time
		want  string
		basis string
	}{
		{"before anybody says something", noon.Add(-72 * hour), "", ""},
		{"upstream alone says something", noon.Add(-40 * hour), "x", audit.Asserted},
		{"an imported log was there", noon.Add(-25 * hour), "i", audit.Imported},
		{"after its word ended", noon.Add(-2 * hour), "", ""},
		{"what was seen here is not overridden", seen, "a", audit.Observed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			then, err := c.AsOf(audit.AtTime(tt.at), clk.Now())
			if tt.want == "" {
				if !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("%+v, %v", then, err)
				}
				return
			}
			if err != nil || then.Digest != audittest.Digest(tt.want) || then.Basis != tt.basis || (then.Source == "") != (tt.basis == audit.Observed) {
				t.Errorf("%+v, %v; want %s, %s", then, err, tt.want, tt.basis)
			}
		})
	}
	c.Withheld[audittest.Digest("x")] = true
	if then, err := c.AsOf(audit.AtTime(noon.Add(-40*hour)), clk.Now()); err == nil {
		t.Errorf("what may not be served yet is served of the past: %+v", then)
	}
}

// What an imported log says is what its clients were given: not what its policy held
// back, not while upstream had deleted it. A delta goes on where the bundle before it
// ended.
func TestClaimsOfAnImportedLogAreWhatItServed(t *testing.T) {
	clk, u, there := newClock(), &upstream{says: "a"}, openStore(t, t.TempDir())
	l := audit.New(audit.Options{Store: there, Now: clk.Now, Policy: compile(t, audit.RuleText{Mode: audit.HoldMode})})
	resolve(t, l, u) // noon: a
	clk.advance(hour)
	u.set("b", nil)
	resolve(t, l, u) // 13: b is held
	carried := func(from int) audit.Carried {
		h := &audit.History{Source: "tidemark.test/there"}
		for i, e := range audittest.Check(t, there) {
			if i >= from {
				h.Add(int64(i), e)
			}
		}
		st, err := there.State(t.Context(), audittest.Ref("1"))
		if err != nil {
			t.Fatal(err)
		}
		return audit.Carried{Ref: audittest.Ref("1"), Digest: st.Served, Confirmed: st.LastConfirmed, Claims: h.All(), Closed: h.Closed}
	}
	here := openStore(t, t.TempDir())
	island := audit.New(audit.Options{Store: here, Now: func() time.Time { return noon.Add(100 * hour) }})
	bring := func(bundle string, from int) {
		t.Helper()
		c := audit.Cargo{Bundle: audittest.Digest(bundle), Origin: "tidemark.test/there", LogSize: 10, Refs: []audit.Carried{carried(from)}}
		if _, err := island.Import(t.Context(), here, c); err != nil {
			t.Fatal(err)
		}
	}
	bring("first", 0)
	had := len(audittest.Check(t, there))
	clk.advance(hour)
	decide(t, l, audit.Decision{Action: audit.Approve, Digest: audittest.Digest("b"), Reason: "read"}) // 14: b is served
	bring("second", had)

	c := chronicle(t, here, audittest.Ref("1"))
	for at, want := range map[time.Duration]string{-hour: "", 0: "a", 90 * time.Minute: "a", 2 * hour: "b", 50 * hour: "b", 100 * hour: "b"} {
		then, err := c.AsOf(audit.AtTime(noon.Add(at)), noon.Add(200*hour))
		switch {
		case want == "" && !errors.Is(err, fs.ErrNotExist), want != "" && (err != nil || then.Digest != audittest.Digest(want)):
			t.Errorf("after %v: %+v, %v; want %q", at, then, err, want)
		case at >= 0 && at < 100*hour && then.Basis != audit.Imported:
			t.Errorf("after %v: by %s", at, then.Basis)
		}
	}
}

// Where this server was blind, the answer says so.
func TestGapsAreTold(t *testing.T) {
	clk, u, store := newClock(), &upstream{says: "a"}, openStore(t, t.TempDir())
	l := audit.New(audit.Options{Store: store, Now: clk.Now})
	resolve(t, l, u)
	clk.advance(48 * hour)
	u.set("b", nil)
	resolve(t, l, u)
	c := chronicle(t, store, audittest.Ref("1"))
	then, err := c.AsOf(audit.AtTime(noon.Add(24*hour)), clk.Now())
	if err != nil || then.Digest != audittest.Digest("a") || then.Gap == "" {
		t.Errorf("in between: %+v, %v; want a, and that nobody looked", then, err)
	}
	if then, err := c.AsOf(audit.AtTime(noon), clk.Now()); err != nil || then.Gap != "" {
		t.Errorf("when it was looked at: %+v, %v", then, err)
	}
	c.Gaps = []audit.Blind{{Start: noon.Add(-hour), End: noon.Add(hour), Cause: "was not running"}}
	if then, err := c.AsOf(audit.AtTime(noon), clk.Now()); err != nil || then.Gap == "" {
		t.Errorf("inside of a recorded gap: %+v, %v", then, err)
	}
}
