package audit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// A Cargo is what a bundle brings from another log: proven, and with all of its
// content here, before the ledger is told of it.
type Cargo struct {
	Bundle  digest.Digest // of its list of contents
	Origin  string        // the log's
	VKey    string        // by which it was checked
	LogSize int64
	Refs    []Carried
}

// A Carried ref is one of a Cargo.
type Carried struct {
	Ref       Ref
	Digest    digest.Digest // what is served there
	MediaType string
	Size      int64     // of the manifest in bytes
	Confirmed time.Time // the last time upstream said so, there
	Profile   string    // how upstream was asked
	Platforms []string  // whose images are complete; nil for all there are
	Claims    []Claim   // its history there, oldest first, then what was served
	Closed    *Claim    // how the claim ended that was the last one before these
	Referrers []Referrer
}

// A Referrer is a manifest whose subject is another.
type Referrer struct {
	Subject    digest.Digest
	Digest     digest.Digest
	Descriptor json.RawMessage
}

// What became of a ref that was carried here.
const (
	CarriedNew   = "new"   // it was not known
	CarriedMoved = "moved" // its head is another now
	CarriedSame  = "same"
	CarriedHeld  = "held"  // the policy does not serve it yet
	CarriedOlder = "older" // what is known here is newer: only its history was taken over
)

// An Importer takes over what another log says.
type Importer interface {
	// Import commits e, which says so, and for each ref what next makes of it, its
	// claims, its referrers and what is to be kept of it, in one transaction: all of
	// it or nothing, as Advance. confirmed is the latest time that any import before
	// has the ref confirmed at. A bundle that was imported already is
	// ErrImportedAlready, and changes nothing. It returns the index of e.
	Import(ctx context.Context, cargo Cargo, e Event, next func(c Carried, r Record, confirmed time.Time) (State, []Event)) (int64, error)
}

// ErrImportedAlready reports a bundle that was imported before.
var ErrImportedAlready = errors.New("this bundle was imported already")

// Import takes over what a cargo brings, by the policy that decides here: a rule
// that holds back moves holds these. It is recorded, durably and as a whole, when
// it returns; an error means that nothing of it was, or with ErrLedger, that it may
// have been. It returns what became of each ref.
func (l *Ledger) Import(ctx context.Context, store Importer, cargo Cargo) (map[Ref]string, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), importTimeout)
	defer cancel()
	l.deciding.RLock()
	defer l.deciding.RUnlock()
	policy, now := l.policy.Load(), l.now()
	action := l.about(Ref{}, &Operator{Action: "import", Digest: cargo.Bundle, Target: cargo.Origin, New: strconv.FormatInt(cargo.LogSize, 10)})
	became := make(map[Ref]string)
	var events []Event
	index, err := store.Import(ctx, cargo, action, func(c Carried, r Record, confirmed time.Time) (State, []Event) {
		s, es, what := policy.carry(c, r, confirmed, cargo.Origin, now)
		Identify(&s, es)
		became[c.Ref], events = what, append(events, es...)
		return s, es
	})
	if errors.Is(err, ErrImportedAlready) {
		return nil, err
	}
	l.mu.Lock()
	l.epoch++
	l.recent.Purge()
	l.mu.Unlock()
	if err != nil {
		l.unwritable.Store(&err)
		return nil, fmt.Errorf("import %s: %w: %w", cargo.Bundle, ErrLedger, err)
	}
	l.unwritable.Store(nil)
	for i, e := range append([]Event{action}, events...) {
		l.recorded(index+int64(i), e)
	}
	return became, nil
}

// importTimeout bounds the one transaction of an import.
const importTimeout = 2 * time.Minute

// importedProfile begins the profile of a head that came by a bundle.
const importedProfile = "bundle/"

// carry is what a policy makes of a ref that was carried here. What was seen here
// later than there stays, and so does what a later bundle brought.
func (p *Policy) carry(c Carried, r Record, confirmed time.Time, origin string, now time.Time) (State, []Event, string) {
	known := confirmed
	if r.State.Known() && !strings.HasPrefix(r.State.Profile, importedProfile) {
		known = r.State.LastConfirmed
	}
	seenHere := r.State.Known() && known == r.State.LastConfirmed
	switch {
	case r.State.Known() && c.Confirmed.Before(known) && r.State.Head != c.Digest:
		return r.State, nil, CarriedOlder
	case seenHere && r.State.Head == c.Digest:
		return r.State, nil, CarriedSame
	}
	s, events := p.Next(c.Ref, r, Observation{
		Digest: c.Digest, MediaType: c.MediaType, Size: c.Size,
		Evidence: Evidence{Via: []string{"bundle"}, BodyVerified: true, AcceptProfile: importedProfile + origin, Identity: c.Profile, Trigger: TriggerImport},
	}, now)
	switch {
	case s.Served != c.Digest:
		return s, events, CarriedHeld
	case !r.State.Known():
		return s, events, CarriedNew
	case r.State.Served != s.Served:
		return s, events, CarriedMoved
	}
	return s, events, CarriedSame
}

// A History is made of the events of another log, one ref at a time: what the ref meant
// there, and what clients were given, which under a rule that holds is something else.
type History struct {
	Source string
	Claims []Claim // what it meant, oldest first
	Closed *Claim  // the end of the claim before the first of Claims, of what it meant

	served  []Claim
	deleted bool // upstream has it no longer
	profile string
}

// Add follows the next event of the ref, at its index in that log.
func (h *History) Add(index int64, e Event) {
	h.serve(index, e)
	if !e.Type.Moves() && e.Type != Deleted || e.Interval == nil {
		return
	}
	if e.Old != nil && !(e.Type == Restored && e.Old.Digest == "") {
		h.close(e)
	}
	if e.New == nil {
		return
	}
	h.profile = e.Evidence.Profile()
	h.Claims = append(h.Claims, Claim{
		Basis: Imported, Source: h.Source, Digest: e.New.Digest, MediaType: e.New.MediaType, Size: e.New.Size,
		NotBefore: e.Interval.NotBefore, Since: e.Interval.NotAfter, LastConfirmed: e.Interval.NotAfter, SourceIndex: &index,
	})
}

// serve follows what clients were given. While upstream had the ref no longer they were
// given nothing that counts as what it meant.
func (h *History) serve(index int64, e Event) {
	var last *Claim
	if n := len(h.served); n > 0 && h.served[n-1].Until == nil {
		last = &h.served[n-1]
	}
	given := e.Policy.Served
	if h.deleted = e.Type == Deleted || h.deleted && !e.Type.Moves(); h.deleted {
		given = ""
	}
	if last != nil && last.Digest == given {
		return
	}
	if last != nil {
		until := e.Time
		last.Until, last.EndReason, last.LastConfirmed = &until, string(e.Type), until
		if e.Interval != nil && e.Interval.NotBefore != nil {
			last.LastConfirmed = *e.Interval.NotBefore
		}
	}
	if given != "" {
		h.served = append(h.served, Claim{
			Basis: Imported, Served: true, Source: h.Source, Digest: given, Since: e.Time, LastConfirmed: e.Time, SourceIndex: &index,
		})
	}
}

// All are the claims that the history makes.
func (h *History) All() []Claim { return append(slices.Clip(h.Claims), h.served...) }

// close ends the last claim, or the one before all of them.
func (h *History) close(e Event) {
	var last *Claim
	switch n := len(h.Claims); {
	case n > 0:
		last = &h.Claims[n-1]
	case h.Closed == nil:
		h.Closed = &Claim{Basis: Imported, Source: h.Source, Digest: e.Old.Digest}
		last = h.Closed
	default:
		return // it had ended: the ref was deleted in between
	}
	if last.Until != nil {
		return
	}
	until := e.Interval.NotAfter
	last.Until, last.EndReason = &until, string(e.Type)
	if e.Interval.NotBefore != nil {
		last.LastConfirmed = *e.Interval.NotBefore
	}
}

// Profile is how upstream was asked when it said the last head.
func (h *History) Profile() string { return h.profile }
