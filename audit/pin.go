package audit

import (
	"context"

	"github.com/opencontainers/go-digest"
)

// A Pin is content that an operator wants kept: a digest, or whatever a ref means.
type Pin struct {
	Target    string        // the ref, or the digest
	Ref       Ref           // zero when it is a digest
	Digest    digest.Digest // "" when it is a ref
	Platforms []string      // of an index; nil for all
	Reason    string        // may be ""
}

// A PinStore keeps pins.
type PinStore interface {
	// PutPin commits e and the pin, which replaces one of the same target.
	PutPin(ctx context.Context, e Event, p Pin) (int64, error)

	// DropPin commits e and takes the pin of a target away, with what bundles
	// brought for it. Without either it is fs.ErrNotExist, and nothing is done.
	DropPin(ctx context.Context, e Event, target string) (int64, error)
}

// Pin records a pin. It holds from when it returns.
func (l *Ledger) Pin(ctx context.Context, store PinStore, p Pin) error {
	if p.Reason != "" && !validReason(p.Reason) {
		return ErrReason
	}
	e := l.about(p.Ref, &Operator{Action: "pin", Reason: p.Reason, Digest: p.Digest})
	return l.commit(ctx, e, func(ctx context.Context) (int64, error) { return store.PutPin(ctx, e, p) })
}

// Unpin records that a pin is taken back.
func (l *Ledger) Unpin(ctx context.Context, store PinStore, p Pin) error {
	e := l.about(p.Ref, &Operator{Action: "unpin", Digest: p.Digest})
	return l.commit(ctx, e, func(ctx context.Context) (int64, error) { return store.DropPin(ctx, e, p.Target) })
}

// Act records what an operator did that changes no ref.
func (l *Ledger) Act(ctx context.Context, op Operator) error {
	return l.append(ctx, Event{Type: Action, Operator: &op})
}

// about is an operator's action about a target that the policy has no say in.
func (l *Ledger) about(ref Ref, op *Operator) Event {
	if ref != (Ref{}) {
		op.Target = ref.String()
	}
	return l.stamp(Event{Type: Action, Operator: op})
}
