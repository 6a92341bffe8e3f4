package audit

import (
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/opencontainers/go-digest"
)

// A State is all the ledger decides from about a ref. The zero State is a ref
// never seen before. Times are UTC milliseconds. A State is a value: what it
// points to is replaced, never changed.
type State struct {
	Head          digest.Digest `json:"-"` // what upstream says, confirmed
	HeadMediaType string        `json:"-"`
	HeadSize      int64         `json:"-"`
	HeadSince     time.Time     `json:"-"` // when Head was first seen, this time around
	LastConfirmed time.Time     `json:"-"` // the last answer that said Head
	Served        digest.Digest `json:"-"` // what clients are given, "" if nothing may be yet
	Index         int64         `json:"-"` // of the last event that says so
	Deleted       time.Time     `json:"-"` // when upstream was found to have it no longer, zero while it has

	ServedMediaType string `json:"served_media_type,omitempty"`
	ServedSize      int64  `json:"served_size,omitempty"`

	// Tombstone tells that upstream deleted the ref, and its rule serves it for ever.
	Tombstone bool `json:"tombstone,omitempty"`

	// Candidates are the heads since the served one, oldest first, each once. The
	// last one is the head, unless the head is served.
	Candidates []Candidate `json:"candidates,omitempty"`

	Behind  *Behind  `json:"behind,omitempty"`  // since when the head is not what is served
	Hold    *Hold    `json:"hold,omitempty"`    // by hand
	Missing *Missing `json:"missing,omitempty"` // upstream lately said that it is not there
	Flap    *Flap    `json:"flap,omitempty"`    // recent changes of the head
	Move    *Move    `json:"move,omitempty"`    // the last change of the head, for a day or until it is settled

	Profile string `json:"profile,omitempty"` // how upstream was asked when it said Head

	// Trust is what stood beside the head when that was looked at last, nil if it was not
	// since it is the head. Looked tells that it was, after the time in which it may come.
	Trust  *Trust `json:"trust,omitempty"`
	Looked bool   `json:"looked,omitempty"`
	Looks  int    `json:"looks,omitempty"` // that failed since

	// Doubt is that something stood beside the digest before that does not stand beside
	// the head, until it does or was told.
	Doubt *Doubt `json:"doubt,omitempty"`

	// Refused is what upstream claimed and did not have: told once a day.
	Refused *Change `json:"refused,omitempty"`

	// ClockGap is told once: the clock is behind what is recorded.
	ClockGap bool `json:"clock_gap,omitempty"`
}

// A Candidate is a confirmed head that is not served.
type Candidate struct {
	Digest    digest.Digest `json:"digest"`
	MediaType string        `json:"media_type,omitempty"`
	Size      int64         `json:"size,omitempty"`
	Since     time.Time     `json:"since"`               // first seen, this time around, by our clock
	Tenure    time.Duration `json:"tenure,omitempty"`    // confirmed as head, once it is left; it may have been longer
	Left      bool          `json:"left,omitempty"`      // it is no longer the head
	Withdrawn string        `json:"withdrawn,omitempty"` // how upstream took it back: never served by a rule
	Rejected  bool          `json:"rejected,omitempty"`  // by an operator
	Escalated string        `json:"escalated,omitempty"` // what of the move to it has it held, in any mode
	Bypass    string        `json:"bypass,omitempty"`    // why it need not wait
	Served    bool          `json:"served,omitempty"`    // it was, until an operator went back to an earlier one
}

// Behind tells how long what is served is not the head.
type Behind struct {
	Since time.Time `json:"since"`
	Told  bool      `json:"told,omitempty"` // policy.starved
}

// A Hold is an operator's: what is served stays until it is released.
type Hold struct {
	Since  time.Time `json:"since"`
	Reason string    `json:"reason"`
}

// Missing counts the answers that a known ref is not there.
type Missing struct {
	Since time.Time `json:"since"`
	Count int       `json:"count"`
}

// Flap keeps the changes of a head that is going back and forth.
type Flap struct {
	Recent []Change  `json:"recent"`          // within the window, oldest first
	Since  time.Time `json:"since,omitzero"`  // told as flapping since
	Count  int       `json:"count,omitempty"` // changes since it flaps
}

// A Change is one change of a head.
type Change struct {
	At     time.Time     `json:"at"`
	Digest digest.Digest `json:"digest"`
}

// Move is a recent change of a head. It is settled, and worth telling people,
// once a later answer has confirmed it; one that only a single edge of upstream
// gives waits longer.
type Move struct {
	Event   uuid.UUID `json:"event"`
	At      time.Time `json:"at"`
	Edge    string    `json:"edge,omitempty"`
	Settled bool      `json:"settled,omitempty"`
}

// Known tells whether the ref was ever seen.
func (s State) Known() bool { return s.Head != "" }

// Pending is the head that is not served, or "".
func (s State) Pending() digest.Digest {
	if s.Head == s.Served {
		return ""
	}
	return s.Head
}

// Held tells whether something is kept from being served, by a rule or by hand.
func (s State) Held() bool { return s.Known() && (s.Head != s.Served || s.Hold != nil) }

// Kept tells whether the bytes of what is served are to be kept whatever happens:
// upstream may have forgotten them, and they are promised.
func (s State) Kept() bool { return s.Held() || s.Tombstone }

// Settled tells whether the last move was confirmed as alerts want it.
func (s State) Settled() bool { return s.Move == nil || s.Move.Settled }

// candidate returns the candidate of a digest.
func (s State) candidate(d digest.Digest) (Candidate, bool) {
	i := slices.IndexFunc(s.Candidates, func(c Candidate) bool { return c.Digest == d })
	if i < 0 {
		return Candidate{}, false
	}
	return s.Candidates[i], true
}

// setCandidate replaces the candidate of c's digest, in a list of its own.
func (s *State) setCandidate(c Candidate) {
	s.Candidates = slices.Clone(s.Candidates)
	i := slices.IndexFunc(s.Candidates, func(o Candidate) bool { return o.Digest == c.Digest })
	if i >= 0 {
		s.Candidates[i] = c
	}
}

// head is the head as an event tells it.
func (s State) head() *Content {
	since := s.HeadSince
	return &Content{Digest: s.Head, MediaType: s.HeadMediaType, Size: s.HeadSize, FirstSeen: &since}
}

// served is what is served as an event tells it, nil for nothing.
func (s State) served() *Content {
	if s.Served == "" {
		return nil
	}
	return &Content{Digest: s.Served, MediaType: s.ServedMediaType, Size: s.ServedSize}
}

// An Observation is one answer of an upstream about a ref, made with the
// canonical Accept profile, whose digest was checked against its bytes if it is
// not the head that is known already.
type Observation struct {
	Digest    digest.Digest
	MediaType string
	Size      int64
	Evidence  Evidence

	// Absent is upstream's answer that there is no such tag. Gone tells that its
	// list of tags, or the absence of the whole repository, says the same.
	Absent error
	Gone   bool

	// Trust is what stands beside the digest, nil when that was not looked at. Unseen tells
	// that it was to be, and could not.
	Trust  *Trust
	Unseen bool

	// Served is what is different from the digest that is served, when that is not the
	// head: what a rule is raised or lowered by.
	Served *Comparison

	// Change is what is different from the head that was known, nil when that
	// could not be found out.
	Change *Comparison

	// Every is how often the ref is asked about on a schedule, 0 without one.
	Every time.Duration

	// Blind is what kept upstream from answering before this, "" for nothing.
	Blind string
}

// A Past is what is known of a digest that was a head of the ref before.
type Past struct {
	FirstSeen time.Time // ever
	MediaType string
	Size      int64
	Left      uuid.UUID // the event that moved the ref away from it
	Withdrawn string    // how upstream took it back before it was served
	Rejected  bool      // an operator did not want it, and nobody approved it since
	Escalated string    // what raised the rule for it, until that was taken back
}

// A Record is what a store knows of a ref when something happens to it.
type Record struct {
	State State

	// Past tells of a digest that was a head before and is none any more.
	Past func(digest.Digest) (past Past, was bool)

	// Neighbours tells of the repository of a ref whose head becomes another digest, which
	// is "" at a first sight; nil when that is not known.
	Neighbours func(old, new digest.Digest, now time.Time) Neighbourhood

	// Former returns the newest digest that was served for the ref, that is not to be
	// skipped, and that nobody rejected, upstream did not take back and no rule was raised
	// for; nil when that is not known.
	Former func(skip func(digest.Digest) bool) (Content, bool)

	// Burst tells whether a burst that the ref was part of was told within a time; nil
	// when that is not known.
	Burst func(from, to time.Time) bool

	// Last is the time of the newest entry of the log, zero without one.
	Last time.Time
}

// DiffRef refers to a diff of package audit/diff, which is stored as content.
type DiffRef struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`

	Platforms     PlatformCount `json:"platforms"`
	Layers        LayerCount    `json:"layers"`
	BytesDelta    int64         `json:"bytes_delta"`
	ConfigChanged []string      `json:"config_changed,omitempty"`
}

// PlatformCount and LayerCount are a diff in numbers, layers summed over the
// platforms that were compared.
type (
	PlatformCount struct {
		Added   int `json:"added"`
		Removed int `json:"removed"`
		Changed int `json:"changed"`
	}
	LayerCount struct {
		Shared  int `json:"shared"`
		Added   int `json:"added"`
		Removed int `json:"removed"`
	}
)

// A Class says what a move looks like. Classes are hashed into the log.
type Class string

// The classes, first match wins (AUDIT.md, A8.4).
const (
	ClassRepackaged      Class = "repackaged"
	ClassAttestationOnly Class = "attestation_only"
	ClassPlatformAdded   Class = "platform_added"
	ClassPlatformRemoved Class = "platform_removed"
	ClassBaseRefresh     Class = "base_refresh"
	ClassRebuild         Class = "rebuild"
	ClassRelease         Class = "release"
	ClassRollback        Class = "rollback"
	ClassUnknown         Class = "unknown"
)

// A Comparison is what changed from one digest to another, as far as the
// policy is concerned.
type Comparison struct {
	Old, New digest.Digest
	Class    Class    // "" when the manifests do not tell
	Signals  []string // became_index, entrypoint_changed, …
	Diff     *DiffRef

	OldVersion, NewVersion string    // that the images say they are of, "" if they do not
	Created                time.Time // that the newest of the images claims to be from, zero if none does

	Trust *TrustChange // nil when it is not known, or nothing stood beside the old one

	// Base is the base image that a rebuild took over anew, if its layers are those of a
	// digest that it moved to.
	Base Ref
}
