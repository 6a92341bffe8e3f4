// Package notify tells others of events: at least once, from an outbox that is
// committed with the event, and never in the way of a pull.
package notify

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"

	"tidemark/audit"
)

// A Sink is one place that is told. Send is given the same message again until it
// returns nil; a message is known by its ID.
type Sink interface {
	// Send tells of m. What it returns holds no secret; a *Failure says more than that
	// it is to be tried again.
	Send(ctx context.Context, m Message) error
}

// A Failure is why a sink did not take a message.
type Failure struct {
	After time.Duration // the sink asked not to be told again before this, 0 if it did not
	Gone  bool          // nobody is there any more: the sink is not to be told anything again
	Err   error
}

func (f *Failure) Error() string { return f.Err.Error() }
func (f *Failure) Unwrap() error { return f.Err }

// A Message is what a sink is told at once.
type Message struct {
	ID     string // the same whenever it is sent again, and no other message's
	Origin string // of the log
	Items  []Item // at least one, oldest first
	Digest bool   // it is the digest of what was not worth a message of its own

	// Reminder counts how often it was told before: something is still open, and nobody
	// acknowledged it.
	Reminder int
	Test     bool // it never happened

	title, text string // by templates, "" for what is built in
}

// Severity is that of the most severe item.
func (m Message) Severity() audit.Severity {
	s := audit.Info
	for _, i := range m.Items {
		s = max(s, i.Event.Severity())
	}
	return s
}

// An Item is one event that a message is about.
type Item struct {
	Index   int64
	Leaf    []byte // as it is hashed
	Event   audit.Event
	Clients int // that had the digest from before, -1 if that is not known
}

// A Route says of what a sink is told, and when.
type Route struct {
	Name  string // unique, and what the outbox knows the sink by: what was not delivered waits under it
	Sink  Sink
	Match audit.Glob
	Types map[audit.Type]bool // nil is all that are alerts

	MinSeverity audit.Severity // of what is told as it comes
	Digest      *TimeOfDay     // when the rest is told, nil for never

	ByRepository bool          // what comes within Wait about one repository is one message
	Wait         time.Duration // before what is not critical is told
	FlapWindow   time.Duration // before a move that is not critical is told: it may be taken back

	Templates Templates // what its messages say

	Quiet  Hours         // in which what is not critical waits for their end
	Remind time.Duration // after which what is still open is told again, 0 for never
}

// A TimeOfDay is minutes since midnight, of the machine's own clock.
type TimeOfDay int

// ParseTimeOfDay reads daily@08:00.
func ParseTimeOfDay(s string) (TimeOfDay, error) {
	t, err := time.Parse("daily@15:04", s)
	if err != nil {
		return 0, fmt.Errorf("%q is not a time such as daily@08:00", s)
	}
	return TimeOfDay(t.Hour()*60 + t.Minute()), nil
}

// Next is the first such time after now.
func (d TimeOfDay) Next(now time.Time) time.Time {
	y, m, day := now.Date()
	at := time.Date(y, m, day, int(d)/60, int(d)%60, 0, 0, now.Location())
	if !at.After(now) {
		at = time.Date(y, m, day+1, int(d)/60, int(d)%60, 0, 0, now.Location())
	}
	return at
}

// Hours are from a time of the day until another, which may be the next day. The zero
// Hours are none.
type Hours struct{ From, Until TimeOfDay }

// ParseHours reads 22:00-07:00.
func ParseHours(s string) (h Hours, err error) {
	from, until, ok := strings.Cut(s, "-")
	f, err1 := time.Parse("15:04", from)
	u, err2 := time.Parse("15:04", until)
	if !ok || err1 != nil || err2 != nil || f.Equal(u) {
		return Hours{}, fmt.Errorf("%q are no hours such as 22:00-07:00", s)
	}
	return Hours{TimeOfDay(f.Hour()*60 + f.Minute()), TimeOfDay(u.Hour()*60 + u.Minute())}, nil
}

// End is when the hours that at is in are over, or at.
func (h Hours) End(at time.Time) time.Time {
	if h.From == h.Until {
		return at
	}
	local := at.Local()
	now := TimeOfDay(local.Hour()*60 + local.Minute())
	in := now >= h.From && now < h.Until
	if h.From > h.Until { // over midnight
		in = now >= h.From || now < h.Until
	}
	if !in {
		return at
	}
	return h.Until.Next(local)
}

// alerts are the types that a sink is told of unless it says which.
var alerts = map[audit.Type]bool{
	audit.Moved: true, audit.Reverted: true, audit.Repackaged: true, audit.Restored: true, audit.Deleted: true,
	audit.Held: true, audit.Released: true, audit.Withdrawn: true, audit.Violation: true, audit.Starved: true, audit.Flapping: true,
	audit.Burst: true, audit.Aliased: true, audit.AccessLost: true, audit.Degraded: true, audit.Recovered: true, audit.Downgraded: true, audit.ExposureFound: true, audit.TrustChanged: true,
	audit.Inconsistent: true, audit.Gap: true, audit.Forked: true, audit.DeadLetter: true,
}

// digested tells that e is for the digest of r.
func (r Route) digested(e audit.Event) bool { return e.Severity() < r.MinSeverity }

// due is when the sink is told of e, or never.
func (r Route) due(e audit.Event) (at time.Time, ok bool) {
	types := r.Types
	if types == nil {
		types = alerts
	}
	moves := e.Type.Moves() && e.Type != audit.FirstSeen
	kept := moves && e.Policy.Served != "" && e.New != nil && e.Policy.Served != e.New.Digest
	switch {
	case !types[e.Type], !r.matches(e), e.Evidence.Trigger == audit.TriggerImport:
		return time.Time{}, false
	case moves && e.Policy.Mode == audit.Observe, e.Rebaseline, e.Amends != nil:
		return time.Time{}, false // for the record only (AUDIT.md, A9.1, R11, R16)
	case kept && types[audit.Held] && types[audit.Violation]:
		return time.Time{}, false // that it is held, or against the policy, says all of it
	case e.Type == audit.Withdrawn && e.Flapped != uuid.Nil:
		return time.Time{}, false // that it moved back says it (R4)
	case e.Dead != nil && e.Dead.Sink == r.Name:
		return time.Time{}, false // it would not be taken either
	case r.digested(e) && r.Digest != nil:
		return r.Digest.Next(e.Time.Local()), true
	case r.digested(e):
		return time.Time{}, false
	case e.Severity() == audit.Critical:
		return e.Time, true
	case moves, e.Type == audit.Held, e.Condition != nil:
		return r.Quiet.End(e.Time.Add(max(r.Wait, r.FlapWindow))), true
	}
	return r.Quiet.End(e.Time.Add(r.Wait)), true
}

// matches tells whether e is about something that the route is for. What is about no tag
// is for all; the condition of an upstream for those that are told of a tag of it.
func (r Route) matches(e audit.Event) bool {
	prefix := r.Match.Prefix()
	switch {
	case e.Ref != (audit.Ref{}):
		return r.Match.Matches(e.Ref)
	case e.Condition != nil:
		upstream := e.Condition.Upstream + "/"
		return strings.HasPrefix(prefix, upstream) || strings.HasPrefix(upstream, prefix)
	}
	return true
}

// Recipients says who of the routes is to be told of an event.
func Recipients(routes []Route, e audit.Event) []audit.Recipient {
	var out []audit.Recipient
	for _, r := range routes {
		if at, ok := r.due(e); ok {
			out = append(out, audit.Recipient{Sink: r.Name, At: at})
		}
	}
	return out
}
