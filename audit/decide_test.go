package audit_test

import (
	"errors"
	"io/fs"
	"strings"
	"testing"
	"time"

	"tidemark/audit"
	"tidemark/audit/audittest"
)

// An operator's decision is an event with its reason, binds to a digest, and
// changes what is served from then on. One about something that is not so is
// refused, names what is pending, and changes nothing.
func TestDecisions(t *testing.T) {
	type step struct {
		see    string // upstream says, or
		action string // an operator decides
		digest string
		serve  string // what clients then get
		events string
		err    string // or why it is refused
	}
	for _, tt := range []struct {
		name  string
		rule  audit.RuleText
		steps []step
	}{
		{"approve is the way out of a hold, for that digest", audit.RuleText{Mode: audit.HoldMode}, []step{
			{see: "a", serve: "a", events: "first_seen"},
			{action: "approve", digest: "a", serve: "a", err: "nothing is pending"},
			{see: "b", serve: "a", events: "moved held"},
			{action: "approve", digest: "a", serve: "a", err: "pending is " + audittest.Digest("b").String()},
			{action: "release", serve: "a", err: "approved or rejected"},
			{action: "approve", digest: "b", serve: "b", events: "operator.action released"},
			{see: "c", serve: "b", events: "moved held"},
			{action: "approve", digest: "b", serve: "b", err: "pending is " + audittest.Digest("c").String()},
			{see: "b", serve: "b", events: "reverted withdrawn"},
		}},
		{"an approval does not carry over to the next move", audit.RuleText{Mode: audit.HoldMode}, []step{
			{see: "a", serve: "a", events: "first_seen"}, {see: "b", serve: "a", events: "moved held"}, {see: "c", serve: "a", events: "moved withdrawn held"},
			{action: "approve", digest: "b", serve: "a", err: "pending is " + audittest.Digest("c").String()},
		}},
		{"approve overrides immutable, and binds from there on", audit.RuleText{Mode: audit.Immutable}, []step{
			{see: "a", serve: "a", events: "first_seen"}, {see: "b", serve: "a", events: "moved policy.violation"},
			{action: "approve", digest: "b", serve: "b", events: "operator.action released"}, {see: "a", serve: "b", events: "reverted policy.violation"},
		}},
		{"what is rejected is never served, and its return is a violation", audit.RuleText{Mode: audit.Cooldown, Age: hour}, []step{
			{see: "a", serve: "a", events: "first_seen"}, {see: "b", serve: "a", events: "moved held"},
			{action: "reject", digest: "b", serve: "a", events: "operator.action tag.rejected"},
			{action: "reject", digest: "b", serve: "a", err: "rejected already"},
			{see: "b", serve: "a", events: ""}, {see: "b", serve: "a", events: ""}, {see: "b", serve: "a", events: ""}, {see: "b", serve: "a", events: ""},
			{see: "a", serve: "a", events: "reverted"}, {see: "b", serve: "a", events: "reverted policy.violation"},
			{action: "approve", digest: "b", serve: "b", events: "operator.action released"}, {see: "a", serve: "b", events: "reverted held"},
			{see: "b", serve: "b", events: "reverted withdrawn"},
		}},
		{"a hold by hand keeps what is served under any rule", audit.RuleText{Mode: audit.Observe}, []step{
			{see: "a", serve: "a", events: "first_seen"},
			{action: "hold", serve: "a", events: "operator.action held"},
			{see: "b", serve: "a", events: "moved held"}, {see: "c", serve: "a", events: "moved withdrawn held"},
			{action: "approve", digest: "c", serve: "a", err: "held by hand"},
			{action: "release", serve: "c", events: "operator.action released"},
			{action: "release", serve: "c", err: "not held by hand"},
		}},
		{"a hold by hand can go back", audit.RuleText{Mode: audit.Observe}, []step{
			{see: "a", serve: "a", events: "first_seen"}, {see: "b", serve: "b", events: "moved"}, {see: "c", serve: "c", events: "moved"},
			{action: "hold", digest: "never", serve: "c", err: "was never what this tag meant"},
			{action: "hold", digest: "a", serve: "a", events: "operator.action held"},
			{see: "c", serve: "a", events: ""},
			{action: "hold", digest: "c", serve: "a", err: "approve it"},
			{action: "release", serve: "c", events: "operator.action released"},
		}},
		{"a hold that went back is released to what the tag means by then, in one step", audit.RuleText{Mode: audit.Observe}, []step{
			{see: "a", serve: "a", events: "first_seen"}, {see: "b", serve: "b", events: "moved"},
			{action: "hold", digest: "a", serve: "a", events: "operator.action held"},
			{see: "c", serve: "a", events: "moved held"},
			{action: "release", serve: "c", events: "operator.action released"},
		}},
		{"released under a rule that holds, what is pending stays so", audit.RuleText{Mode: audit.HoldMode}, []step{
			{see: "a", serve: "a", events: "first_seen"}, {see: "b", serve: "a", events: "moved held"},
			{action: "hold", serve: "a", events: "operator.action held"}, {action: "release", serve: "a", events: "operator.action"},
			{action: "approve", digest: "b", serve: "b", events: "operator.action released"},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStory(compile(t, tt.rule))
			now := noon
			for i, st := range tt.steps {
				now = now.Add(59 * time.Minute)
				if st.see != "" {
					if got := short(s.see(st.see, now)); got != st.events {
						t.Errorf("step %d: upstream says %q: %q, want %q", i, st.see, got, st.events)
					}
				} else {
					d := audit.Decision{Action: st.action, Reason: "because"}
					if st.digest != "" {
						d.Digest = audittest.Digest(st.digest)
					}
					next, events, err := s.policy.Decide(s.ref, s.record(), d, now)
					var conflict *audit.ConflictError
					switch {
					case st.err != "" && (!errors.As(err, &conflict) || !strings.Contains(err.Error(), st.err)):
						t.Errorf("step %d: %s: %v, want a conflict that says %q", i, st.action, err, st.err)
					case st.err == "" && err != nil:
						t.Fatalf("step %d: %s: %v", i, st.action, err)
					case st.err == "":
						want := strings.Replace(st.events, "tag.rejected", "rejected", 1)
						if got := short(s.take(next, events)); got != want {
							t.Errorf("step %d: %s: %q, want %q", i, st.action, got, want)
						}
					}
				}
				if s.state.Served != audittest.Digest(st.serve) {
					t.Errorf("step %d: %s is served, want %q", i, s.state.Served, st.serve)
				}
			}
			s.check(t)
		})
	}
}

// What a rule denies is not served, whatever is decided: the ledger does not say
// that it were.
func TestDeniedIsNotServedByHand(t *testing.T) {
	s := newStory(nil)
	s.see("a", noon)
	next, events, err := s.policy.Decide(s.ref, s.record(), audit.Decision{Action: audit.HoldAt, Reason: "freeze"}, noon)
	if err != nil {
		t.Fatal(err)
	}
	s.take(next, events)
	s.policy = compile(t, audit.RuleText{Name: "no", Mode: audit.Deny})
	var conflict *audit.ConflictError
	for _, action := range []string{audit.HoldAt, audit.Approve} {
		if _, _, err := s.policy.Decide(s.ref, s.record(), audit.Decision{Action: action, Digest: audittest.Digest("a"), Reason: "r"}, noon); !errors.As(err, &conflict) || !strings.Contains(err.Error(), `"no" denies it`) {
			t.Errorf("%s: %v", action, err)
		}
	}
	_, events, err = s.policy.Decide(s.ref, s.record(), audit.Decision{Action: audit.Release, Reason: "r"}, noon)
	if err != nil || len(events) != 1 || events[0].Policy.Served != "" || events[0].Policy.Mode != audit.Deny {
		t.Errorf("release: %+v, %v", events, err)
	}
}

// A decision without a reason, about a tag that was never seen, or that is none,
// is refused.
func TestDecisionsThatAreNone(t *testing.T) {
	s := newStory(nil)
	if _, _, err := s.policy.Decide(s.ref, s.record(), audit.Decision{Action: audit.HoldAt, Reason: "r"}, noon); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a tag never seen: %v, want fs.ErrNotExist", err)
	}
	s.see("a", noon)
	for _, reason := range []string{"", "two\nlines", "\x1b[2J", "\xff", strings.Repeat("x", 1001)} {
		if _, _, err := s.policy.Decide(s.ref, s.record(), audit.Decision{Action: audit.HoldAt, Reason: reason}, noon); !errors.Is(err, audit.ErrReason) {
			t.Errorf("reason %.20q: %v", reason, err)
		}
	}
	if _, _, err := s.policy.Decide(s.ref, s.record(), audit.Decision{Action: "forget", Reason: "r"}, noon); err == nil {
		t.Error("an action that is none was carried out")
	}
}
