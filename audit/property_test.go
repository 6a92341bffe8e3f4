package audit_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"pgregory.net/rapid"

	"tidemark/audit"
	"tidemark/audit/audittest"
)

// drawRule draws a rule that makes sense.
func drawRule(t *rapid.T) audit.RuleText {
	r := audit.RuleText{Match: "**", Mode: rapid.SampledFrom([]audit.Mode{audit.Observe, audit.Alert, audit.Cooldown, audit.Cooldown, audit.HoldMode, audit.Immutable}).Draw(t, "mode")}
	if r.Mode == audit.Cooldown {
		r.Age = time.Duration(rapid.Int64Range(1, 100).Draw(t, "age")) * time.Hour
		if rapid.Bool().Draw(t, "own tenure") {
			r.Tenure = tenure(time.Duration(rapid.Int64Range(0, 50).Draw(t, "tenure")) * time.Hour)
		}
		r.OnStarved = rapid.SampledFrom([]string{"", audit.StarvedLongest}).Draw(t, "starved")
	}
	if r.Mode == audit.Observe || r.Mode == audit.Alert || r.Mode == audit.Cooldown {
		r.OnDeleted = rapid.SampledFrom([]string{"", audit.DeletedRefuse}).Draw(t, "deleted")
	}
	return r
}

// drawObservation draws what an upstream may say.
func drawObservation(t *rapid.T, s *story) audit.Observation {
	name := rapid.SampledFrom([]string{"a", "b", "c", "d", "-"}).Draw(t, "seen")
	if name == "-" {
		return audit.Observation{Absent: errors.New("404"), Gone: rapid.Bool().Draw(t, "gone")}
	}
	seen := audit.Observation{Digest: audittest.Digest(name), Evidence: audit.Evidence{
		Identity: rapid.SampledFrom([]string{"", "anonymous", "user-1"}).Draw(t, "identity"),
		Edge:     rapid.SampledFrom([]string{"", "one", "two"}).Draw(t, "edge"),
	}}
	if rapid.IntRange(0, 3).Draw(t, "blind") == 0 {
		seen.Blind = "503"
	}
	if class := rapid.SampledFrom([]audit.Class{"", audit.ClassRepackaged, audit.ClassPlatformAdded}).Draw(t, "class"); class != "" {
		seen.Change = &audit.Comparison{Old: s.state.Head, New: seen.Digest, Class: class}
	}
	return seen
}

// Whatever upstream says, operators decide, policies are put in place and clocks
// do: the record of a ref has no hole and no overlap; something that was taken
// back is not served by a rule; and what is served is always something that the
// tag meant.
func TestAnyHistoryKeepsThePromises(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := newStory(compileT(t, drawRule(t)))
		now := noon
		withdrawn := make(map[digest.Digest]bool) // and not approved since
		for step := range rapid.IntRange(1, 60).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.Int64Range(-20, 40).Draw(t, "hours")) * time.Hour)
			servedBefore := s.state.Served
			var events []audit.Event
			switch rapid.IntRange(0, 9).Draw(t, "what") {
			case 0:
				s.policy = compileT(t, drawRule(t))
				continue
			case 1:
				events = s.decide(t, now)
			default:
				events = s.observe(drawObservation(t, s), now)
			}
			for _, e := range events {
				switch {
				case e.Type == audit.Withdrawn:
					withdrawn[e.New.Digest] = true
				case e.Type == audit.Released && e.Operator != nil:
					delete(withdrawn, e.New.Digest)
				}
				if e.Policy.SHA256 != s.policy.SHA256() {
					t.Fatalf("step %d: %s was not decided by the policy", step, e.Type)
				}
			}
			if !s.state.Known() {
				continue
			}
			if s.state.Served == "" {
				t.Fatalf("step %d: nothing is served of a tag that is known", step)
			}
			rule := s.policy.Rule(s.ref)
			byRule := s.state.Served != servedBefore && s.state.Hold == nil && (len(events) == 0 || events[0].Type != audit.Action)
			if byRule && withdrawn[s.state.Served] && rule.Mode == audit.Cooldown && rule.OnStarved != audit.StarvedLongest {
				t.Fatalf("step %d: %s is served, which upstream had taken back", step, s.state.Served)
			}
			if rule.Mode == audit.Observe && s.state.Hold == nil && s.state.Deleted.IsZero() && s.state.Served != s.state.Head && len(events) > 0 && events[0].Type.Moves() {
				if _, rejected := s.rejected(); !rejected {
					t.Fatalf("step %d: under observe %s is served, not the head", step, s.state.Served)
				}
			}
		}
		s.checkChain(t)
	})
}

func compileT(t *rapid.T, r audit.RuleText) *audit.Policy {
	p, errs := audit.Compile(audit.PolicyText{Rules: []audit.RuleText{r}})
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	return p
}

// rejected tells whether an operator rejected the head.
func (s *story) rejected() (digest.Digest, bool) {
	for _, c := range s.state.Candidates {
		if c.Digest == s.state.Head {
			return c.Digest, c.Rejected
		}
	}
	return "", false
}

// decide has an operator try something.
func (s *story) decide(t *rapid.T, now time.Time) []audit.Event {
	d := audit.Decision{
		Action: rapid.SampledFrom([]string{audit.Approve, audit.Reject, audit.HoldAt, audit.Release}).Draw(t, "action"),
		Reason: "because",
	}
	if d.Action != audit.Release && rapid.IntRange(0, 3).Draw(t, "wanted") > 0 {
		d.Digest = audittest.Digest(rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(t, "digest"))
	}
	before := fmt.Sprintf("%+v", s.state)
	st, events, err := s.policy.Decide(s.ref, s.record(), d, now)
	if err != nil {
		if len(events) > 0 || fmt.Sprintf("%+v", s.state) != before {
			t.Fatalf("%s was refused (%v) and changed something", d.Action, err)
		}
		return nil
	}
	if events[0].Type != audit.Action || events[0].Operator.Reason != "because" {
		t.Fatalf("%s is not on the record: %+v", d.Action, events[0])
	}
	return s.take(st, events)
}

// checkChain is the chain part of check, over a story in which the policy changed.
func (s *story) checkChain(t *rapid.T) {
	head, deleted := "", false
	var after time.Time
	for i, e := range s.events {
		if !e.Type.Moves() && e.Type != audit.Deleted {
			continue
		}
		if (head == "") != (e.Type == audit.FirstSeen) || (e.Type == audit.Restored) != deleted {
			t.Fatalf("event %d is %s; head %q, deleted %t", i, e.Type, head, deleted)
		}
		if e.Old != nil && string(e.Old.Digest) != head {
			t.Fatalf("event %d, %s, does not begin where the one before ended", i, e.Type)
		}
		if nb := e.Interval.NotBefore; nb != nil && (nb.Before(after) || e.Interval.NotAfter.Before(*nb)) {
			t.Fatalf("event %d, %s, is from %v to %v; the one before ended %v", i, e.Type, nb, e.Interval.NotAfter, after)
		}
		after, deleted = e.Interval.NotAfter, e.Type == audit.Deleted
		if e.Type.Moves() {
			head = string(e.New.Digest)
		}
	}
}
