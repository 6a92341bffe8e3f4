package audit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"
)

// A Decision is what an operator wants of a ref, and why.
type Decision struct {
	Action string        // Approve, Reject, HoldAt or Release
	Digest digest.Digest // what is approved, rejected or held; "" for HoldAt is what is served
	Reason string        // required
}

// The actions.
const (
	Approve = "approve" // serve what is pending
	Reject  = "reject"  // never serve what is pending
	HoldAt  = "hold"    // keep serving what is served, or an earlier head, until Release
	Release = "release" // take back HoldAt
)

// A ConflictError is a decision about a ref that is not as the operator thinks.
type ConflictError struct {
	Ref     Ref
	Pending digest.Digest // what could be decided about, "" for nothing
	What    string
}

func (e *ConflictError) Error() string {
	if e.Pending == "" {
		return fmt.Sprintf("%s: %s; nothing is pending", e.Ref, e.What)
	}
	return fmt.Sprintf("%s: %s; pending is %s", e.Ref, e.What, e.Pending)
}

// A NeverSeenError is fs.ErrNotExist about a ref.
type NeverSeenError struct{ Ref Ref }

func (e *NeverSeenError) Error() string { return e.Ref.String() + " was never seen here" }
func (*NeverSeenError) Unwrap() error   { return fs.ErrNotExist }

// ErrReason reports a decision without a reason that can be recorded.
var ErrReason = errors.New("a decision needs its reason: up to 1000 bytes of text, without control characters")

// reasonMost bounds a reason in bytes: it becomes part of a leaf.
const reasonMost = 1000

func validReason(s string) bool {
	return strings.TrimSpace(s) != "" && len(s) <= reasonMost && utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

// Decide returns the state that follows r's when an operator decides d at now,
// and what happened. Like Next it touches neither clock nor storage. An unknown
// ref is fs.ErrNotExist, one that is not as the decision says a ConflictError.
func (p *Policy) Decide(ref Ref, r Record, d Decision, now time.Time) (State, []Event, error) {
	t := p.turn(ref, r, now)
	switch {
	case !validReason(d.Reason):
		return State{}, nil, ErrReason
	case !t.s.Known():
		return State{}, nil, &NeverSeenError{ref}
	}
	if t.rule.Mode == Deny && (d.Action == Approve || d.Action == HoldAt) {
		return State{}, nil, t.conflict("rule %q denies it: nothing is served, whatever is decided; change the rule", t.rule.Name)
	}
	t.event(Event{Type: Action, Operator: &Operator{Action: d.Action, Reason: d.Reason, Digest: d.Digest}})
	var err error
	switch d.Action {
	case Approve:
		err = t.approve(d)
	case Reject:
		err = t.reject(d)
	case HoldAt:
		err = t.holdAt(d)
	case Release:
		err = t.unhold()
	default:
		err = fmt.Errorf("%q is not one of approve, reject, hold, release", d.Action)
	}
	if err != nil {
		return State{}, nil, err
	}
	s, events := t.end()
	return s, events, nil
}

func (t *turn) conflict(format string, args ...any) error {
	return &ConflictError{t.ref, t.s.Pending(), fmt.Sprintf(format, args...)}
}

// pending returns the candidate that a decision is about.
func (t *turn) pending(d Decision) (Candidate, error) {
	c, ok := t.s.candidate(t.s.Head)
	switch {
	case t.s.Hold != nil:
		return c, t.conflict("it is held by hand since %s; release it first", t.s.Hold.Since.Format(time.RFC3339))
	case t.p.Denies(d.Digest):
		return c, t.conflict("audit.denied has %s; take it out there first", d.Digest)
	case !ok || d.Digest != c.Digest:
		return c, t.conflict("%s is not what waits for a decision", d.Digest)
	case !t.s.Deleted.IsZero():
		return c, t.conflict("upstream has deleted it at %s", t.s.Deleted.Format(time.RFC3339))
	}
	return c, nil
}

func (t *turn) approve(d Decision) error {
	c, err := t.pending(d)
	if err != nil {
		return err
	}
	was := t.s.served()
	t.give(c)
	t.lag()
	t.release(was, c, "approved", &Operator{Action: d.Action, Reason: d.Reason})
	return nil
}

func (t *turn) reject(d Decision) error {
	c, err := t.pending(d)
	if err != nil {
		return err
	}
	if c.Rejected {
		return t.conflict("%s is rejected already", c.Digest)
	}
	c.Rejected = true
	t.s.setCandidate(c)
	t.event(Event{
		Type: Rejected, Old: t.s.served(), New: t.s.head(), Policy: Effect{Effect: servingOld},
		Operator: &Operator{Action: d.Action, Reason: d.Reason},
	})
	return nil
}

func (t *turn) holdAt(d Decision) error {
	if d.Digest != "" && d.Digest != t.s.Served {
		if err := t.goBack(d.Digest); err != nil {
			return err
		}
	}
	if t.s.Served == "" {
		return t.conflict("nothing is served yet that could be kept")
	}
	t.s.Hold = &Hold{Since: t.now, Reason: d.Reason}
	t.lag()
	e := Event{
		Type: Held, Old: t.s.served(), Reason: "operator", Policy: Effect{Effect: servingOld},
		Operator: &Operator{Action: d.Action, Reason: d.Reason},
	}
	if t.s.Head != t.s.Served {
		e.New = t.s.head()
	}
	t.event(e)
	return nil
}

// goBack serves an earlier head again. What was served until now waits from here
// on, first in line; what is older than the one gone back to does not.
func (t *turn) goBack(d digest.Digest) error {
	c, ok := t.s.candidate(d)
	past, was := t.past(d)
	switch {
	case t.p.Denies(d):
		return t.conflict("audit.denied has %s; take it out there first", d)
	case d == t.s.Head:
		return t.conflict("%s is pending; approve it to have it served", d)
	case ok:
	case was:
		c = Candidate{Digest: d, MediaType: past.MediaType, Size: past.Size}
	default:
		return t.conflict("%s was never what this tag meant", d)
	}
	waiting := t.s.Candidates
	if ok {
		waiting = waiting[slices.IndexFunc(waiting, func(o Candidate) bool { return o.Digest == d })+1:]
	}
	now := Candidate{
		Digest: t.s.Served, MediaType: t.s.ServedMediaType, Size: t.s.ServedSize, Since: t.s.HeadSince,
		Left: t.s.Served != t.s.Head, Served: true,
	}
	if len(waiting) > 0 {
		now.Since = waiting[0].Since
	}
	t.s.Candidates = append([]Candidate{now}, waiting...)
	t.s.Served, t.s.ServedMediaType, t.s.ServedSize = c.Digest, c.MediaType, c.Size
	return nil
}

// unhold takes back a hold by hand; from here on the rules decide again.
func (t *turn) unhold() error {
	if t.s.Hold == nil {
		return t.conflict("it is not held by hand; what a rule holds is approved or rejected")
	}
	t.s.Hold = nil
	was := t.s.served()
	i := slices.IndexFunc(t.s.Candidates, func(c Candidate) bool { return c.Served && !c.barred() })
	if i < 0 || !t.s.Deleted.IsZero() {
		t.serve(false)
		return nil
	}
	c := t.s.Candidates[i] // from where the hold went back
	t.give(c)
	if !t.serveAfter(was, false) {
		t.release(was, c, "released", nil)
	}
	return nil
}

// Decide carries out an operator's decision about ref: recorded, durably, when
// it returns, and what Resolve answers from then on, whatever is under way. Its
// errors are those of Policy.Decide, and ErrLedger.
func (l *Ledger) Decide(ctx context.Context, ref Ref, d Decision) (State, error) {
	return l.decide(ctx, ref, d, nil)
}

// Try tells what Decide would refuse, and changes nothing.
func (l *Ledger) Try(ctx context.Context, ref Ref, d Decision) error {
	_, err := l.decide(ctx, ref, d, errTried)
	if errors.Is(err, errTried) {
		return nil
	}
	return err
}

var errTried = errors.New("only tried")

func (l *Ledger) decide(ctx context.Context, ref Ref, d Decision, then error) (State, error) {
	s, _, err := l.known(ctx, ref)
	if err != nil {
		return State{}, fmt.Errorf("%s %s: %w: %w", d.Action, ref, ErrLedger, err)
	}
	now := l.now()
	var refused error
	next, _, err := l.advance(ctx, ref, s, func(p *Policy, r Record) (s State, events []Event, _ error) {
		if s, events, refused = p.Decide(ref, r, d, now); refused == nil {
			refused = then
		}
		return s, events, refused
	})
	if refused != nil {
		return State{}, refused
	}
	l.mu.Lock()
	l.epoch++ // whoever has read the state before must not remember it after this
	l.recent.Remove(ref)
	l.mu.Unlock()
	if err != nil {
		l.unwritable.Store(&err)
		return State{}, fmt.Errorf("%s %s: %w: %w", d.Action, ref, ErrLedger, err)
	}
	return next, nil
}
