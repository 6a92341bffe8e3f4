package audit

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/opencontainers/go-digest"

	"tidemark/audit/taglog"
)

// A Type says what an event is about. Types are hashed into the log: they may
// be added to, never changed.
type Type string

// The events about what a tag means upstream. After each of them but Deleted
// the ref's head is New.
const (
	FirstSeen  Type = "tag.first_seen" // the first confirmed answer about a ref
	Moved      Type = "tag.moved"      // the head changed to a digest it never was before
	Reverted   Type = "tag.reverted"   // the head changed back to an earlier one
	Repackaged Type = "tag.repackaged" // other digest, the same config and layers on every platform
	Restored   Type = "tag.restored"   // a deleted ref answers again, with the same digest or another
	Deleted    Type = "tag.deleted"    // upstream has it no longer, by more than one sign
)

// The events about what a policy and its operators make of that.
const (
	Held      Type = "tag.held"         // New is not served, Old is
	Released  Type = "tag.released"     // New is served from here on, Old was
	Rejected  Type = "tag.rejected"     // an operator refused New
	Withdrawn Type = "tag.withdrawn"    // upstream left New, which was never served, before its tenure
	Violation Type = "policy.violation" // an immutable ref moved, or a rejected digest is the head again
	Starved   Type = "policy.starved"   // the head moved long ago and nothing became eligible
	Burst     Type = "repo.burst"       // tags of one repository moved within an hour that do not usually
	Aliased   Type = "digest.aliased"   // one digest is the head of full versions of different numbers

	Downgraded   Type = "trust.downgraded" // a signature or provenance stood beside what the tag meant before, and none beside New
	TrustChanged Type = "trust.changed"    // New is signed by others

	Flapping Type = "tag.flapping" // the head goes back and forth; once when it begins, once when it ends
)

// The events about the record itself.
const (
	Inconsistent  Type = "upstream.inconsistent" // a digest that is not that of the bytes, or that cannot be had
	Gap           Type = "audit.gap"             // nothing could be observed for a while
	Snapshot      Type = "audit.snapshot"        // a commitment to what all refs mean
	Action        Type = "operator.action"       // somebody decided something
	ExposureFound Type = "exposure.found"        // clients had got New when it was denied
	Forked        Type = "log.forked"            // the log goes on under a new origin
	DeadLetter    Type = "notify.dead_letter"    // a sink could not be told of something
)

var types = map[Type]bool{
	FirstSeen: true, Moved: true, Reverted: true, Repackaged: true, Restored: true, Deleted: true,
	Held: true, Released: true, Rejected: true, Withdrawn: true, Violation: true, Starved: true, Flapping: true,
	Inconsistent: true, Gap: true, Snapshot: true, Action: true, Forked: true, DeadLetter: true, Burst: true, Aliased: true, Downgraded: true, ExposureFound: true, TrustChanged: true,
}

// notices are of events that sinks are told of, and that are no entries of the log: they
// are about an upstream's health, not about what a tag means.
var notices = map[Type]bool{AccessLost: true, Degraded: true, Recovered: true}

// Known tells whether t is a type of entries that this version writes.
func (t Type) Known() bool { return types[t] }

// Told tells whether sinks can be told of events of type t.
func (t Type) Told() bool { return types[t] || notices[t] }

// Moves tells the types after which the ref's head is New.
func (t Type) Moves() bool {
	return t == FirstSeen || t == Moved || t == Reverted || t == Repackaged || t == Restored
}

// An Event is one entry of the ledger. Its JSON is the leaf: it is encoded
// once, stored and hashed as it is, and never encoded again. Fields that do not
// belong to its type are absent. docs/formats.md has every key.
type Event struct {
	V    int       `json:"v"`
	ID   uuid.UUID `json:"id"` // version 7 (RFC 9562): unique, and in order of time
	Type Type      `json:"type"`
	Time time.Time `json:"time"`         // milliseconds, UTC
	Ref  Ref       `json:"ref,omitzero"` // zero when the event is about no single ref

	Old      *Content  `json:"old,omitempty"`
	New      *Content  `json:"new,omitempty"`
	Interval *Interval `json:"interval,omitempty"`
	Evidence Evidence  `json:"evidence,omitzero"`

	// RevertsEvent is the event that had moved the ref away from New. Amends is
	// the move that this one completes: an index that only grew.
	RevertsEvent *uuid.UUID `json:"reverts_event,omitempty"`
	Amends       *uuid.UUID `json:"amends,omitempty"`

	// Rebaseline tells that upstream was asked otherwise than before, with other
	// credentials or another Accept profile, so that the move may be none.
	Rebaseline bool `json:"rebaseline,omitempty"`

	Class   Class    `json:"class,omitempty"`
	Signals []string `json:"signals,omitempty"`
	Diff    *DiffRef `json:"diff,omitempty"`

	Tags     []string     `json:"tags,omitempty"`   // of the repository, that a burst or an alias is about
	Reason   string       `json:"reason,omitempty"` // of releases, withdrawals and inconsistencies, in one word or sentence
	Operator *Operator    `json:"operator,omitempty"`
	Flap     *FlapCount   `json:"flap,omitempty"`
	Gap      *Blind       `json:"gap,omitempty"`
	Snapshot *Commitment  `json:"snapshot,omitempty"`
	Fork     *ForkedTrees `json:"fork,omitempty"`
	Dead     *Undelivered `json:"dead,omitempty"`
	Exposed  *Exposed     `json:"exposed,omitempty"`

	// Condition is of an upstream; such events are no entries of the log.
	Condition *Condition `json:"condition,omitempty"`

	Policy Effect `json:"policy,omitzero"`

	// Recipients are who is to be told. Flapped is the move that this one takes back so
	// soon (AUDIT.md, R4) that a sink that was not told of it, or of what came of it, yet is
	// told of neither.
	Recipients []Recipient `json:"-"`
	Flapped    uuid.UUID   `json:"-"`
}

// Content is what a ref meant on one side of an event.
type Content struct {
	Digest    digest.Digest `json:"digest"`
	MediaType string        `json:"mediaType,omitempty"`
	Size      int64         `json:"size,omitempty"` // of the manifest in bytes
	FirstSeen *time.Time    `json:"first_seen,omitempty"`
}

// An Interval says when a change happened upstream: after the last answer that
// confirmed the old digest, at the latest with the first that told the new one.
// A first sighting has no NotBefore.
type Interval struct {
	NotBefore *time.Time `json:"not_before,omitempty"`
	NotAfter  time.Time  `json:"not_after"`
}

// Evidence says how an observation was made.
type Evidence struct {
	Via           []string `json:"via"`                  // requests made, such as HEAD, GET
	BodyVerified  bool     `json:"body_sha256_verified"` // the manifest's bytes were here and hash to the digest
	AcceptProfile string   `json:"accept_profile"`
	Identity      string   `json:"identity,omitempty"` // as whom upstream was asked: anonymous, or a short hash of the user's name
	Edge          string   `json:"edge,omitempty"`     // which of upstream's machines answered, as it said itself
	Trigger       string   `json:"trigger"`            // what asked: pull, poll, push, warm or import
}

// TriggerImport is the trigger of what was not asked, but carried here in a bundle.
const TriggerImport = "import"

// Profile names how upstream was asked. Answers to different profiles cannot
// be compared.
func (e Evidence) Profile() string {
	if e.AcceptProfile == "" && e.Identity == "" {
		return ""
	}
	return e.AcceptProfile + "/" + e.Identity
}

// An Effect says what the policy made of the event.
type Effect struct {
	Rule   string        `json:"rule,omitempty"` // the name of the rule that applied; "" is the implicit last one
	Mode   Mode          `json:"mode"`
	Effect string        `json:"effect,omitempty"` // serving-new, serving-old or refusing
	Served digest.Digest `json:"served,omitempty"`
	Until  *time.Time    `json:"until,omitempty"` // when what is held becomes eligible, if nothing happens until then
	SHA256 string        `json:"policy_sha256,omitempty"`
}

// The effects.
const (
	servingNew = "serving-new"
	servingOld = "serving-old"
	refusing   = "refusing"
)

// An Operator is who decided something, and why.
type Operator struct {
	Action string        `json:"action"` // approve, reject, hold, release, pin, unpin, purge, scrub, import, backfill, acknowledge, mute, unmute, policy.changed, credentials.changed
	Reason string        `json:"reason,omitempty"`
	Digest digest.Digest `json:"digest,omitempty"`
	Target string        `json:"target,omitempty"` // what it is about, if it is no ref: an upstream
	Old    string        `json:"old,omitempty"`    // of policies their sha256, of credentials the identities
	New    string        `json:"new,omitempty"`
	Entry  *int64        `json:"entry,omitempty"` // of the log, that it is about
	Until  *time.Time    `json:"until,omitempty"` // of mutes
}

// A FlapCount tells of a ref that goes back and forth.
type FlapCount struct {
	State   string          `json:"state"` // open or closed
	Since   time.Time       `json:"since"`
	Changes int             `json:"changes"`
	Digests []digest.Digest `json:"digests,omitempty"`
}

// Blind is a time in which nothing could be observed.
type Blind struct {
	Start time.Time `json:"start"`
	End   time.Time `json:"end"`
	Cause string    `json:"cause"` // upstream, stopped or clock
}

// A Commitment is to the bytes of a listing: JSON lines, one a ref.
type Commitment struct {
	Digest    digest.Digest `json:"digest"`
	Size      int64         `json:"size"`
	Refs      int64         `json:"refs"`
	Exposures digest.Digest `json:"exposures"` // of the listing of who pulled what, which is kept for a while only
}

// Undelivered is a message that a sink never took.
type Undelivered struct {
	Sink     string  `json:"sink"`
	Entries  []int64 `json:"entries"` // of the log, that it was about: the first hundred
	Attempts int     `json:"attempts"`
	Error    string  `json:"error"` // the last one
}

// ForkedTrees are what was signed last under the old origin, and what the log
// goes on from.
type ForkedTrees struct {
	OldOrigin string `json:"old_origin"`
	NewOrigin string `json:"new_origin"`
	OldSize   int64  `json:"old_size"`
	OldRoot   string `json:"old_root"`
	Size      int64  `json:"size"`
	Root      string `json:"root"`
}

// leafVersion is the version of the leaf format, docs/formats.md.
const leafVersion = 1

// Leaf encodes the event for the log.
func (e Event) Leaf() ([]byte, error) {
	e.V = leafVersion
	leaf, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("encode %s of %s: %w", e.Type, e.Ref, err)
	}
	if len(leaf) > taglog.MaxRecord {
		return nil, fmt.Errorf("%s of %s has %d bytes, more than a leaf can have", e.Type, e.Ref, len(leaf))
	}
	return leaf, nil
}

// ParseLeaf reads an event from its leaf. Fields that are not known here are
// passed over: a later version may have written them.
func ParseLeaf(leaf []byte) (Event, error) {
	var e Event
	if err := json.Unmarshal(leaf, &e); err != nil {
		return Event{}, fmt.Errorf("leaf: %w", err)
	}
	if e.V != leafVersion {
		return Event{}, fmt.Errorf("leaf has version %d, not %d", e.V, leafVersion)
	}
	return e, nil
}

// newID returns an event's identity.
func newID() uuid.UUID {
	id, err := uuid.NewV7()
	if err != nil {
		panic("audit: no randomness: " + err.Error())
	}
	return id
}
