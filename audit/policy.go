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
