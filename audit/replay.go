package audit

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// A Withholding is that a policy would have kept a digest from being served.
type Withholding struct {
	Ref    Ref
	Digest digest.Digest
	Rule   string
	Mode   Mode
	Since  time.Time
	Until  *time.Time // nil if it still would
	Index  int64      // of the event by which the digest became the head
}

// Replay decides recorded history anew: what p would have held back, and for how
// long, between since and now. entries are the whole log, oldest first. What
// operators decided is not replayed: p may have asked them other questions.
func Replay(p *Policy, entries iter.Seq2[Entry, error], since, now time.Time) ([]Withholding, error) {
	refs := make(map[Ref]*replayed)
	var out []Withholding
	report := func(w Withholding) {
		if w.Until == nil || !w.Until.Before(since) {
			out = append(out, w)
		}
	}
	for entry, err := range entries {
		if err != nil {
			return nil, err
		}
		e, err := ParseLeaf(entry.Leaf)
		if err != nil {
			return nil, fmt.Errorf("entry %d: %w", entry.Index, err)
		}
		if !e.Type.Moves() && e.Type != Deleted || e.Interval == nil || e.Interval.NotAfter.After(now) {
			continue
		}
		r := refs[e.Ref]
		if r == nil {
			r = &replayed{policy: p, ref: e.Ref, past: make(map[digest.Digest]Past), report: report}
			refs[e.Ref] = r
		}
		r.event(entry.Index, e)
	}
	for _, r := range refs {
		r.until(now)
		if r.open != nil {
			report(*r.open)
		}
	}
	slices.SortFunc(out, func(a, b Withholding) int {
		return cmp.Or(cmp.Compare(a.Index, b.Index), a.Since.Compare(b.Since))
	})
	return out, nil
}

// replayed is one ref as it would have been.
type replayed struct {
	policy *Policy
	ref    Ref
	state  State
	past   map[digest.Digest]Past
	index  int64        // of the event by which the head is what it is
	open   *Withholding // what is held back at present
	report func(Withholding)
}

// until has time pass, with upstream saying the same and somebody asking
// whenever the answer may be another.
func (r *replayed) until(t time.Time) {
	for range 2 * candidatesMost { // each step serves or tells something
		due := r.state.due(r.policy, r.ref)
		if !r.state.Known() || due.IsZero() || due.After(t) || !r.state.Deleted.IsZero() {
			break
		}
		before := r.state
		r.see(Observation{Digest: r.state.Head, MediaType: r.state.HeadMediaType, Size: r.state.HeadSize}, due)
		if unchanged(before, r.state) {
			break
		}
	}
}

func (r *replayed) event(index int64, e Event) {
	at := e.Interval.NotAfter
	r.until(at.Add(-time.Millisecond))
	if nb := e.Interval.NotBefore; nb != nil && r.state.LastConfirmed.Before(*nb) {
		r.state.LastConfirmed = *nb
	}
	if e.Type == Deleted {
		n, over := r.policy.goneAfter()
		r.state.Missing = &Missing{Since: at.Add(-over), Count: n}
		r.see(Observation{Absent: errors.New("deleted"), Gone: true}, at)
		return
	}
	r.index = index
	var change *Comparison
	if e.Class != "" && e.Old != nil {
		change = &Comparison{Old: e.Old.Digest, New: e.New.Digest, Class: e.Class, Signals: e.Signals}
	}
	r.see(Observation{Digest: e.New.Digest, MediaType: e.New.MediaType, Size: e.New.Size, Evidence: e.Evidence, Change: change}, at)
}

func (r *replayed) see(seen Observation, at time.Time) {
	record := Record{State: r.state, Past: func(d digest.Digest) (Past, bool) {
		p, was := r.past[d]
		return p, was
	}}
	s, events := r.policy.Next(r.ref, record, seen, at)
	for _, e := range events {
		switch {
		case e.Type.Moves() && e.Old != nil:
			p := r.past[e.Old.Digest]
			if p.FirstSeen.IsZero() {
				p.FirstSeen = *e.Old.FirstSeen
			}
			r.past[e.Old.Digest] = p
		case e.Type == Withdrawn:
			p := r.past[e.New.Digest]
			p.Withdrawn = e.Reason
			r.past[e.New.Digest] = p
		}
	}
	r.state = s
	if pending := s.Pending(); r.open != nil && (r.open.Digest != pending || r.open.Index != r.index) {
		r.open.Until = &at
		r.report(*r.open)
		r.open = nil
	}
	if pending := s.Pending(); pending != "" && r.open == nil {
		rule := r.policy.Rule(r.ref)
		r.open = &Withholding{Ref: r.ref, Digest: pending, Rule: rule.Name, Mode: rule.Mode, Since: at, Index: r.index}
	}
}
