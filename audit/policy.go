package audit

import (
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// clockSlack is how far the clock may be behind the newest entry of the log
// before nothing is decided by it any more (AUDIT.md, R14).
const clockSlack = 5 * time.Minute

// Next returns the state that follows r's when upstream answers seen at now,
// and what happened, if anything did. It touches neither clock nor storage: the
// store calls it with the ref's row locked and commits what it returns. The
// events have no ID yet: Identify gives them theirs.
func (p *Policy) Next(ref Ref, r Record, seen Observation, now time.Time) (State, []Event) {
	t := p.turn(ref, r, now)
	t.seen = seen
	if seen.Absent != nil {
		t.absent()
		return t.end()
	}
	t.clock()
	t.gap()
	before := t.s
	switch {
	case !t.s.Known():
		t.arrive(FirstSeen)
	case !t.s.Deleted.IsZero():
		t.arrive(Restored)
	case seen.Digest != t.s.Head:
		t.arrive(t.kindOfMove())
	default:
		t.confirm()
	}
	t.expel()
	t.allow()
	t.serve(t.s.Head != before.Head || !before.Deleted.IsZero())
	return t.end()
}

// Identify gives events their identities, and the state that of the move it
// refers to.
func Identify(s *State, events []Event) {
	for i := range events {
		events[i].ID = newID()
		if events[i].Type.Moves() && s.Move != nil {
			s.Move.Event = events[i].ID
		}
	}
}

// A turn is one decision about one ref.
type turn struct {
	p      *Policy
	rule   *Rule
	ref    Ref
	r      Record
	s      State // as it becomes
	seen   Observation
	now    time.Time
	behind bool // the clock is not to be trusted
	events []Event
}

func (p *Policy) turn(ref Ref, r Record, now time.Time) *turn {
	t := &turn{p: p, rule: p.Rule(ref), ref: ref, r: r, s: r.State, now: now.UTC().Truncate(time.Millisecond)}
	newest := r.Last
	if t.s.LastConfirmed.After(newest) {
		newest = t.s.LastConfirmed
	}
	t.behind = newest.Sub(t.now) > clockSlack
	// A clock that was set back does not turn an interval round.
	floor := []time.Time{t.s.LastConfirmed, t.s.Deleted}
	if t.s.Missing != nil {
		floor = append(floor, t.s.Missing.Since)
	}
	for _, at := range floor {
		if t.now.Before(at) {
			t.now = at
		}
	}
	return t
}

// event appends an event about the ref, with what the policy makes of it.
func (t *turn) event(e Event) {
	e.Time, e.Ref = t.now, t.ref
	t.events = append(t.events, e)
}

// end returns what the turn came to. Every event carries what the policy makes
// of it, and which policy that was.
func (t *turn) end() (State, []Event) {
	for i := range t.events {
		e := &t.events[i].Policy
		e.Rule, e.Mode, e.Served, e.SHA256 = t.rule.Name, t.rule.Mode, t.s.Served, t.p.SHA256()
		if e.Mode == Deny {
			e.Served = "" // whatever was served before the rule was made
			if e.Effect != "" {
				e.Effect = refusing
			}
		}
	}
	return t.s, t.events
}

// clock tells once that the clock was set back while something is waiting for
// its time, and forgets that when it is right again.
func (t *turn) clock() {
	waiting := t.rule.Mode == Cooldown && len(t.s.Candidates) > 0
	if t.behind == t.s.ClockGap || t.behind && !waiting {
		return
	}
	t.s.ClockGap = t.behind
	if t.behind {
		end := t.s.LastConfirmed
		if t.r.Last.After(end) {
			end = t.r.Last
		}
		t.event(Event{Type: Gap, Gap: &Blind{Start: end, End: end, Cause: "clock"}})
	}
}

// gap tells that upstream answers again after it did not for too long.
func (t *turn) gap() {
	if t.seen.Blind == "" || !t.s.Known() || t.now.Sub(t.s.LastConfirmed) <= t.p.gapAfter(t.seen.Every) {
		return
	}
	t.event(Event{Type: Gap, Gap: &Blind{Start: t.s.LastConfirmed, End: t.now, Cause: "upstream"}, Reason: t.seen.Blind})
}

// absent counts an answer that a known ref is not there, and believes it when
// there were enough of them and upstream's list says so too (R6).
func (t *turn) absent() {
	if !t.s.Known() || !t.s.Deleted.IsZero() {
		return
	}
	m := Missing{Since: t.now}
	if t.s.Missing != nil {
		m = *t.s.Missing
	}
	m.Count++
	t.s.Missing = &m
	if !t.s.doubted(t.p, t.now, 0) || !t.seen.Gone {
		return
	}
	t.s.Deleted, t.s.Missing, t.s.Tombstone = t.now, nil, t.rule.Mode == HoldMode || t.rule.Mode == Immutable
	confirmed := t.s.LastConfirmed
	e := Event{Type: Deleted, Old: t.s.head(), Interval: &Interval{NotBefore: &confirmed, NotAfter: m.Since}, Evidence: t.seen.Evidence}
	e.Policy.Effect = servingOld
	if t.rule.OnDeleted == DeletedRefuse {
		e.Policy.Effect = refusing
	}
	t.event(e)
	t.leave()
	if w := t.withdraw(t.s.Head, "deleted"); w != nil {
		t.event(*w)
	}
}

// doubted tells whether, with more answers that it is gone, s would be believed
// to be deleted.
func (s State) doubted(p *Policy, now time.Time, more int) bool {
	n, over := p.goneAfter()
	if s.Missing == nil {
		return n <= more && over == 0
	}
	return s.Missing.Count+more >= n && now.Sub(s.Missing.Since) >= over
}

// kindOfMove is the most specific type of a change of the head.
func (t *turn) kindOfMove() Type {
	if _, was := t.past(t.seen.Digest); was {
		return Reverted
	}
	if c := t.change(); c != nil && c.Class == ClassRepackaged {
		return Repackaged
	}
	return Moved
}

func (t *turn) past(d digest.Digest) (Past, bool) {
	if t.r.Past == nil {
		return Past{}, false
	}
	return t.r.Past(d)
}

// change is what is different from the head, if that was found out about the
// head that is.
func (t *turn) change() *Comparison {
	if c := t.seen.Change; c != nil && c.Old == t.s.Head && c.New == t.seen.Digest {
		return c
	}
	return nil
}

// confirm records that the head is what it was.
func (t *turn) confirm() {
	t.s.LastConfirmed, t.s.Missing = t.now, nil
	if profile := t.seen.Evidence.Profile(); profile != "" {
		t.s.Profile = profile
	}
	t.settle()
	t.calm()
	t.look()
}

// arrive makes what was seen the head.
func (t *turn) arrive(kind Type) {
	e := Event{
		Type:     kind,
		New:      &Content{Digest: t.seen.Digest, MediaType: t.seen.MediaType, Size: t.seen.Size},
		Interval: &Interval{NotAfter: t.now},
		Evidence: t.seen.Evidence,
	}
	past, was := t.past(t.seen.Digest)
	before, by := t.s.Head, "replaced"
	switch kind {
	case FirstSeen:
	case Restored:
		if t.seen.Digest != before {
			t.describe(&e, was)
		}
		deleted := t.s.Deleted
		e.Old, e.Interval.NotBefore = t.s.head(), &deleted
	default:
		t.describe(&e, was)
		confirmed := t.s.LastConfirmed
		e.Old, e.Interval.NotBefore = t.s.head(), &confirmed
		if kind == Reverted {
			e.RevertsEvent, by = &past.Left, "reverted"
		}
	}
	if m := t.s.Move; kind == Reverted && m != nil && t.now.Sub(m.At) <= t.p.flapWindow(t.ref) {
		e.Flapped = m.Event
	}
	takenBack := t.takenBack(kind)
	t.leave()
	t.s.Head, t.s.HeadMediaType, t.s.HeadSize = t.seen.Digest, t.seen.MediaType, t.seen.Size
	t.s.HeadSince, t.s.LastConfirmed, t.s.Deleted, t.s.Missing, t.s.Refused = t.now, t.now, time.Time{}, nil, nil
	t.s.Tombstone = false
	t.s.Profile = t.seen.Evidence.Profile()
	t.s.Move = nil // a first sighting is a baseline: nobody is told
	if kind != FirstSeen {
		t.s.Move = &Move{At: t.now, Edge: t.seen.Evidence.Edge}
	}
	changed := before != "" && before != t.s.Head
	var withdrawn *Event
	switch {
	case takenBack:
		withdrawn = t.withdrawal(*t.s.served(), by)
	case changed && e.Amends == nil:
		withdrawn = t.withdraw(before, by)
	}
	t.enter(past, takenBack)
	more := t.judge(&e)
	t.weigh(&e)
	t.event(e)
	for _, m := range more {
		t.event(m)
	}
	if withdrawn != nil {
		withdrawn.Flapped = e.Flapped
		t.event(*withdrawn)
	}
	if changed {
		t.flap(before)
	}
}

// takenBack tells that upstream goes back from what a cooldown serves, which it
// had for less than its tenure. To serve it on would be to serve what was
// withdrawn: what it goes back to is as old as it is, and need not wait again.
func (t *turn) takenBack(kind Type) bool {
	if kind != Reverted || t.rule.Mode != Cooldown || t.s.Hold != nil || t.s.Head != t.s.Served {
		return false
	}
	first := t.s.HeadSince
	if p, was := t.past(t.s.Head); was && !p.FirstSeen.IsZero() && p.FirstSeen.Before(first) {
		first = p.FirstSeen
	}
	return t.now.Sub(first) < t.rule.Tenure
}

// describe says of a move what it looks like.
func (t *turn) describe(e *Event, was bool) {
	profile := t.seen.Evidence.Profile()
	e.Rebaseline = t.s.Profile != "" && profile != "" && profile != t.s.Profile
	c := t.change()
	e.Class = classify(c, was)
	t.distrust(e, c)
	if c == nil {
		return
	}
	e.Signals, e.Diff = append(slices.Clone(c.Signals), e.Signals...), c.Diff
	if c.Created.Sub(t.now) > createdSlack {
		e.Signals = append(e.Signals, "created_future")
	}
	if m := t.s.Move; m != nil && c.Class == ClassPlatformAdded && t.now.Sub(m.At) <= assembly {
		amends := m.Event
		e.Amends = &amends
	}
}

// assembly is how long after a move an index that only grows still belongs to
// it: architectures are built one after the other (R11).
const assembly = 24 * time.Hour

// leave ends the time of the head as a head.
func (t *turn) leave() {
	c, ok := t.s.candidate(t.s.Head)
	if !ok || c.Left {
		return
	}
	c.Left, c.Tenure = true, max(0, t.s.LastConfirmed.Sub(c.Since))
	t.s.setCandidate(c)
}

// withdraw marks a digest that upstream left before its tenure, so that no rule
// will serve it (A9.2), and returns the event that tells so, or nil. It must be
// certain: how long a digest was the head is known to lie between the last answer
// that said so and the first that said otherwise.
func (t *turn) withdraw(d digest.Digest, by string) *Event {
	c, ok := t.s.candidate(d)
	if !ok || c.Withdrawn != "" || c.Served || t.now.Sub(c.Since) >= t.rule.Tenure {
		return nil
	}
	c.Withdrawn = by
	t.s.setCandidate(c)
	since := c.Since
	return t.withdrawal(Content{Digest: c.Digest, MediaType: c.MediaType, Size: c.Size, FirstSeen: &since}, by)
}

func (t *turn) withdrawal(c Content, by string) *Event {
	return &Event{Type: Withdrawn, Reason: by, Policy: Effect{Effect: servingOld}, New: &c}
}

// candidatesMost bounds what is remembered of heads that were not served. The
// oldest go first: a rule serves the newest it may.
const candidatesMost = 32

// enter makes the new head a candidate, unless it is what is served: then
// upstream is where we are, and what was between is of no interest any more. Its
// age is that of this time around, unless it was there all along.
func (t *turn) enter(past Past, allAlong bool) {
	if t.s.Head == t.s.Served {
		t.s.Candidates = nil
		return
	}
	c := Candidate{
		Digest: t.s.Head, MediaType: t.s.HeadMediaType, Size: t.s.HeadSize, Since: t.now,
		Withdrawn: past.Withdrawn, Rejected: past.Rejected, Escalated: past.Escalated,
	}
	if known, ok := t.s.candidate(t.s.Head); ok {
		c.Withdrawn, c.Rejected, c.Escalated = known.Withdrawn, known.Rejected, known.Escalated
	}
	if allAlong && !past.FirstSeen.IsZero() {
		c.Since = past.FirstSeen
	}
	list := slices.DeleteFunc(slices.Clone(t.s.Candidates), func(o Candidate) bool { return o.Digest == c.Digest })
	list = append(list, c)
	t.s.Candidates = list[max(0, len(list)-candidatesMost):]
}

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

// Refuse records, once, that upstream claims a digest that it does not have, or
// whose bytes are others.
func (p *Policy) Refuse(ref Ref, r Record, bad *InconsistentError, now time.Time) (State, []Event) {
	t := p.turn(ref, r, now)
	if !t.s.Known() || t.s.refused(bad.Claimed, t.now) {
		return t.s, nil
	}
	t.s.Refused = &Change{t.now, bad.Claimed}
	t.event(Event{Type: Inconsistent, Old: t.s.head(), New: &Content{Digest: bad.Claimed}, Reason: bad.Err.Error(), Policy: Effect{Effect: servingOld}})
	return t.end()
}

// refused tells whether that upstream does not have d was told within a day.
func (s State) refused(d digest.Digest, now time.Time) bool {
	return s.Refused != nil && s.Refused.Digest == d && now.Sub(s.Refused.At) < 24*time.Hour
}

// Refuses tells whether it is on the record that upstream claimed d without
// having it.
func (s State) Refuses(d digest.Digest) bool { return s.Refused != nil && s.Refused.Digest == d }

// An InconsistentError is an upstream that contradicts itself.
type InconsistentError struct {
	Claimed digest.Digest // what it says the tag means
	Err     error
}

func (e *InconsistentError) Error() string {
	return fmt.Sprintf("upstream says that the tag means %s: %v", e.Claimed, e.Err)
}

func (e *InconsistentError) Unwrap() error { return e.Err }
