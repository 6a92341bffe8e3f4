package audit

import (
	"slices"
	"time"
)

// What is served after a decision, and from when on something else may be.

// serve decides what is served from here on, and tells what changed with it.
// moved tells that the head is another than before, or is there again.
func (t *turn) serve(moved bool) { t.serveAfter(t.s.served(), moved) }

// serveAfter is serve when it is was that clients got until now. It returns
// whether something else is served than before the call.
func (t *turn) serveAfter(was *Content, moved bool) bool {
	next, reason, ok := t.choose()
	if ok {
		t.give(next)
	}
	t.lag()
	effect := Effect{Effect: servingNew, Until: t.s.until(t.rule)}
	if t.s.Served == "" {
		effect.Effect = refusing
	} else if t.s.Served != t.s.Head {
		effect.Effect = servingOld
	}
	for i := range t.events {
		if t.events[i].Type.Moves() {
			t.events[i].Policy = effect
		}
	}
	if ok && !(moved && next.Digest == t.s.Head) {
		t.release(was, next, reason, nil)
	}
	if moved && t.s.Served != t.s.Head {
		t.hold(effect)
	}
	t.starve()
	return ok
}

// give serves c from here on. What came before it is no candidate any more.
func (t *turn) give(c Candidate) {
	t.s.Served, t.s.ServedMediaType, t.s.ServedSize = c.Digest, c.MediaType, c.Size
	i := slices.IndexFunc(t.s.Candidates, func(o Candidate) bool { return o.Digest == c.Digest })
	t.s.Candidates = slices.Clone(t.s.Candidates[i+1:])
	if len(t.s.Candidates) == 0 {
		t.s.Candidates = nil
	}
}

func (t *turn) release(was *Content, c Candidate, reason string, op *Operator) {
	since := c.Since
	effect := servingNew
	if c.Digest != t.s.Head {
		effect = servingOld // an earlier one; the head still waits
	}
	t.event(Event{
		Type: Released, Reason: reason, Operator: op, Policy: Effect{Effect: effect},
		Old: was, New: &Content{Digest: c.Digest, MediaType: c.MediaType, Size: c.Size, FirstSeen: &since},
	})
}

// hold tells that the new head is not served: as a violation, if it never may be.
func (t *turn) hold(effect Effect) {
	e := Event{Type: Held, Old: t.s.served(), New: t.s.head(), Reason: t.s.why(t.rule), Policy: effect}
	for _, move := range t.events {
		if move.Type.Moves() {
			e.Class, e.Signals = move.Class, move.Signals
		}
	}
	if c, _ := t.s.candidate(t.s.Head); c.Rejected || t.rule.Mode == Immutable {
		e.Type = Violation
	}
	t.event(e)
}

// lag keeps since when the head is not what is served.
func (t *turn) lag() {
	switch {
	case t.s.Head == t.s.Served:
		t.s.Behind = nil
	case t.s.Behind == nil || t.s.Served != t.r.State.Served:
		t.s.Behind = &Behind{Since: t.now}
	}
}

// starve tells once that nothing became eligible for too long, unless somebody
// rejected what waits.
func (t *turn) starve() {
	b := t.s.Behind
	if c, ok := t.s.candidate(t.s.Head); ok && c.barred() {
		return
	}
	if t.rule.Mode != Cooldown || b == nil || b.Told || t.behind || t.s.Hold != nil || t.now.Sub(b.Since) < t.rule.MaxLag {
		return
	}
	t.s.Behind = &Behind{b.Since, true}
	t.event(Event{Type: Starved, Old: t.s.served(), New: t.s.head(), Policy: Effect{Effect: servingOld}})
}

// choose returns the candidate that is to be served from now on, and why, or
// false when what is served stays.
func (t *turn) choose() (c Candidate, reason string, ok bool) {
	s, r := &t.s, t.rule
	if s.Hold != nil || len(s.Candidates) == 0 || !s.Deleted.IsZero() {
		return Candidate{}, "", false
	}
	head := s.Candidates[len(s.Candidates)-1]
	switch {
	case s.Served == "" && r.Mode != Deny && r.OnNew != NewRefuse:
		return head, "rule", !head.barred() && head.Withdrawn == "" // there is nothing older to serve
	case !r.Mode.holdsBack() && r.Mode != Deny:
		return head, "rule", !head.barred()
	case r.Mode != Cooldown && r.Mode != HoldMode || t.behind || s.flapping():
		return Candidate{}, "", false
	case (head.Bypass == allowed || slices.Contains(r.Bypass, head.Bypass)) && head.Withdrawn == "" && !head.barred():
		return head, head.Bypass, true
	case r.Mode != Cooldown:
		return Candidate{}, "", false
	}
	for _, c := range slices.Backward(slices.Clone(s.Candidates)) {
		if at, may := c.eligible(r); may && !t.now.Before(at) && !t.bursting(c) {
			return c, "age", true
		}
	}
	if r.OnStarved == StarvedLongest && s.Behind != nil && t.now.Sub(s.Behind.Since) >= r.MaxLag {
		return s.longest()
	}
	return Candidate{}, "", false
}

// eligible tells from when on a cooldown may serve c, if ever (A9.2): it is old
// enough by our own clock, was the head for long enough or still is, and was
// neither taken back nor rejected.
func (c Candidate) eligible(r *Rule) (at time.Time, may bool) {
	if c.Served {
		return c.Since, c.Withdrawn == "" && !c.barred()
	}
	return c.Since.Add(r.Age), c.Withdrawn == "" && !c.barred() && (!c.Left || c.Tenure >= r.Tenure)
}

// longest returns the candidate that was the head for the longest time, of those
// that upstream did not take back and no one rejected.
func (s State) longest() (best Candidate, reason string, ok bool) {
	tenure := time.Duration(-1)
	for _, c := range s.Candidates {
		if !c.Left {
			c.Tenure = s.LastConfirmed.Sub(c.Since)
		}
		if (c.Withdrawn == "" || c.Withdrawn == "replaced") && !c.barred() && c.Tenure > tenure {
			best, tenure, ok = c, c.Tenure, true
		}
	}
	return best, "starved", ok
}

// until is when the head becomes eligible if nothing happens until then.
func (s State) until(r *Rule) *time.Time {
	c, ok := s.candidate(s.Head)
	if !ok || r.Mode != Cooldown || s.Hold != nil {
		return nil
	}
	at, may := c.eligible(r)
	if !may {
		return nil
	}
	return &at
}

// why is the reason for which the head is not served, in one word.
func (s State) why(r *Rule) string {
	c, _ := s.candidate(s.Head)
	switch {
	case s.Hold != nil:
		return "operator"
	case c.Escalated != "":
		return c.Escalated
	case c.Rejected:
		return "rejected"
	case r.Mode == Cooldown && c.Withdrawn != "":
		return "withdrawn"
	case r.Mode == Cooldown && s.flapping():
		return "flapping"
	}
	return string(r.Mode)
}

// due is when the decision may be another although upstream says the same,
// zero for never.
func (s State) due(p *Policy, ref Ref) time.Time {
	var at time.Time
	earlier := func(t time.Time) {
		if at.IsZero() || t.Before(at) {
			at = t
		}
	}
	r := p.Rule(ref)
	switch {
	case s.Hold != nil || s.Head == s.Served:
	case !r.Mode.holdsBack() && r.Mode != Deny:
		if c, ok := s.candidate(s.Head); ok && !c.barred() {
			earlier(s.HeadSince) // the rule is another than it was
		}
	case r.Mode == Cooldown:
		for _, c := range s.Candidates {
			if t, may := c.eligible(r); may {
				earlier(t)
			}
		}
		if c, _ := s.candidate(s.Head); s.Behind != nil && !s.Behind.Told && !c.barred() {
			earlier(s.Behind.Since.Add(r.MaxLag))
		}
	}
	return at
}
