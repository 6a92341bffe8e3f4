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

const (
	FirstSeen Type = "tag.first_seen" // the first confirmed answer about a ref
	Moved     Type = "tag.moved"      // the head changed to a digest it never was before
	Reverted  Type = "tag.reverted"   // the head changed back to an earlier one
)

// Known tells whether t is a type that this version writes.
func (t Type) Known() bool { return t == FirstSeen || t == Moved || t == Reverted }

// An Event is one entry of the ledger. Its JSON is the leaf: it is encoded
// once, stored and hashed as it is, and never encoded again.
type Event struct {
	V        int       `json:"v"`
	ID       uuid.UUID `json:"id"` // version 7 (RFC 9562): unique, and in order of time
	Type     Type      `json:"type"`
	Time     time.Time `json:"time"` // of the observation, milliseconds, UTC
	Ref      Ref       `json:"ref"`
	Old      *Content  `json:"old,omitempty"`
	New      *Content  `json:"new,omitempty"`
	Interval *Interval `json:"interval,omitempty"`
	Evidence Evidence  `json:"evidence"`

	// RevertsEvent is the event that had moved the ref away from New.
	RevertsEvent *uuid.UUID `json:"reverts_event,omitempty"`

	Policy Effect `json:"policy"`
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
	Trigger       string   `json:"trigger"` // what asked: pull
}

// An Effect says what the policy made of the event.
type Effect struct {
	Mode   string        `json:"mode"`
	Effect string        `json:"effect"`
	Served digest.Digest `json:"served"`
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

// moves tells the events after which the ref's head is New.
func (e Event) moves() bool { return e.Type.Known() }
