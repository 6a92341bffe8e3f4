package audit

import (
	"slices"
	"strings"
	"time"
)

// Trust is what stands beside an image that says where it comes from. That it is there
// is all that is known: nothing was verified.
type Trust struct {
	Signers    []string `json:"signers,omitempty"` // of its signatures, in order: the identity of their certificate, or "key"
	Provenance bool     `json:"provenance,omitempty"`
	SBOM       bool     `json:"sbom,omitempty"`
}

// None tells that nothing stands beside it.
func (t Trust) None() bool { return len(t.Signers) == 0 && !t.Provenance && !t.SBOM }

// String is t in words.
func (t Trust) String() string {
	var parts []string
	if len(t.Signers) > 0 {
		parts = append(parts, "signed by "+strings.Join(t.Signers, ", "))
	}
	if t.Provenance {
		parts = append(parts, "provenance")
	}
	if t.SBOM {
		parts = append(parts, "SBOM")
	}
	if len(parts) == 0 {
		return "nothing"
	}
	return strings.Join(parts, "; ")
}

// A TrustChange is what stands beside two digests.
type TrustChange struct{ Old, New Trust }

// The signals of what stands there no more.
const (
	signatureLost  = "signature_lost"
	signerChanged  = "signer_changed"
	provenanceLost = "provenance_lost"
	sbomLost       = "sbom_lost"
)

// lost are the signals of what stood beside the old digest and not beside the new one.
// Of several signers one that is the same is enough.
func (c TrustChange) lost() (signals []string) {
	same := slices.ContainsFunc(c.New.Signers, func(s string) bool { return slices.Contains(c.Old.Signers, s) })
	switch {
	case len(c.Old.Signers) > 0 && len(c.New.Signers) == 0:
		signals = append(signals, signatureLost)
	case len(c.Old.Signers) > 0 && !same:
		signals = append(signals, signerChanged)
	}
	if c.Old.Provenance && !c.New.Provenance {
		signals = append(signals, provenanceLost)
	}
	if c.Old.SBOM && !c.New.SBOM {
		signals = append(signals, sbomLost)
	}
	return signals
}

// A Doubt is that a signature, its signer or provenance is missed since a move.
type Doubt struct {
	Since time.Time `json:"since"`
	Had   Trust     `json:"had"` // what stood beside the digest before
}

// trustGrace is how long after a move what is missed may still come: images are pushed
// first, and signed then.
const trustGrace = 10 * time.Minute

// After looks that failed the time until the next is doubled by each so many times, and is
// a day from then on.
const looksDoubled = 7

// TrustDue is when what stands beside the head is to be looked at, zero for never: once
// after each move, when what belongs to it should have come, and later and later again
// while it cannot be.
func (s State) TrustDue() time.Time {
	wait := trustGrace<<min(s.Looks, looksDoubled) + time.Duration(max(0, s.Looks-looksDoubled))*24*time.Hour
	switch {
	case s.Doubt != nil:
		return s.Doubt.Since.Add(wait)
	case s.Move != nil && !s.Looked:
		return s.Move.At.Add(wait)
	}
	return time.Time{}
}

// trustDue tells that what stands beside the head is to be looked at now.
func (s State) trustDue(now time.Time) bool {
	due := s.TrustDue()
	return !due.IsZero() && s.Deleted.IsZero() && !now.Before(due)
}

// distrust adds to a move what is missed since, and keeps it until it is told or found.
// What was missed before, and not told yet, still is; and what stood beside the head, as
// far as that was seen in its time, is missed until it is known that it is not.
func (t *turn) distrust(e *Event, c *Comparison) {
	doubt, had := t.s.Doubt, t.s.Trust
	t.s.Doubt, t.s.Trust, t.s.Looked, t.s.Looks = nil, nil, false, 0
	var change TrustChange
	known := c != nil && c.Trust != nil
	switch {
	case known:
		change = *c.Trust
	case had != nil:
		change.Old = *had
	}
	if doubt != nil {
		change.Old = doubt.Had
	}
	if known {
		e.Signals = change.lost()
	}
	if slices.ContainsFunc(change.lost(), isDoubt) {
		t.s.Doubt = &Doubt{t.now, change.Old}
	}
}

// isDoubt tells the signals that are worth more than a word.
func isDoubt(signal string) bool { return signal != sbomLost }

// look notes what stands beside the head after its time, and tells what is missed, once.
func (t *turn) look() {
	if !t.s.trustDue(t.now) || t.seen.Trust == nil && !t.seen.Unseen {
		return
	}
	if t.seen.Trust == nil {
		t.s.Looks++
		return
	}
	doubt := t.s.Doubt
	t.s.Trust, t.s.Looked, t.s.Looks, t.s.Doubt = t.seen.Trust, true, 0, nil
	if doubt == nil {
		return
	}
	change := TrustChange{doubt.Had, *t.seen.Trust}
	lost := change.lost()
	if !slices.ContainsFunc(lost, isDoubt) {
		t.found()
		return
	}
	kind := Downgraded
	if !slices.Contains(lost, signatureLost) && !slices.Contains(lost, provenanceLost) {
		kind = TrustChanged
	}
	t.event(Event{Type: kind, New: t.s.head(), Signals: lost, Reason: "before: " + change.Old.String() + "; now: " + change.New.String()})
}
