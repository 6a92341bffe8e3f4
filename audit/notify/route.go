package notify

import (
	"strings"
	"time"

	"github.com/google/uuid"

	"tidemark/audit"
)

// Of what a sink is told, and when.

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
