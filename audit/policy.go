package audit

import (
	"time"

	"github.com/google/uuid"
	"github.com/opencontainers/go-digest"
)

// A State is all the ledger decides from about a ref. The zero State is a ref
// never seen before. Times are UTC milliseconds.
type State struct {
	Head          digest.Digest // what upstream says, confirmed
	HeadMediaType string
	HeadSize      int64
	HeadSince     time.Time     // when Head was first seen, this time around
	LastConfirmed time.Time     // the last answer that said Head
	Served        digest.Digest // what clients are given
	Index         int64         // of the event by which Served is served
}

// Known tells whether the ref was ever seen.
func (s State) Known() bool { return s.Head != "" }

// An Observation is one answer of an upstream about a ref, made with the
// canonical Accept profile, whose digest was checked against its bytes if it is
// not the head that is known already.
type Observation struct {
	Digest    digest.Digest
	MediaType string
	Size      int64
	Evidence  Evidence
}

// A History tells whether a digest was the head of the ref before, and if so
// which event moved the ref away from it.
type History func(digest.Digest) (left uuid.UUID, was bool)

// A Policy decides what an observation means. The zero Policy observes: what
// upstream says is served at once, and every move is an event.
type Policy struct{}

// ModeObserve is the mode of the zero Policy, as events and answers name it.
const ModeObserve = "observe"

// Next returns the state that follows s when upstream answers seen at now, and
// what happened, if anything did. It touches neither clock nor storage: the
// store calls it with the ref's row locked and commits what it returns. The
// events have no ID yet.
func (p Policy) Next(ref Ref, s State, past History, seen Observation, now time.Time) (State, []Event) {
	now = now.UTC().Truncate(time.Millisecond)
	if now.Before(s.LastConfirmed) {
		now = s.LastConfirmed // a clock that was set back does not turn an interval round
	}
	if seen.Digest == s.Head {
		s.LastConfirmed = now
		return s, nil
	}
	e := Event{
		Type:     Moved,
		Time:     now,
		Ref:      ref,
		New:      &Content{Digest: seen.Digest, MediaType: seen.MediaType, Size: seen.Size},
		Interval: &Interval{NotAfter: now},
		Evidence: seen.Evidence,
		Policy:   Effect{Mode: ModeObserve, Effect: "serving-new", Served: seen.Digest},
	}
	if s.Known() {
		since, confirmed := s.HeadSince, s.LastConfirmed
		e.Old = &Content{Digest: s.Head, MediaType: s.HeadMediaType, Size: s.HeadSize, FirstSeen: &since}
		e.Interval.NotBefore = &confirmed
		if left, was := past(seen.Digest); was {
			e.Type, e.RevertsEvent = Reverted, &left
		}
	} else {
		e.Type = FirstSeen
	}
	return State{
		Head: seen.Digest, HeadMediaType: seen.MediaType, HeadSize: seen.Size,
		HeadSince: now, LastConfirmed: now, Served: seen.Digest, Index: s.Index,
	}, []Event{e}
}
