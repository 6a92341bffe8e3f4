package audit

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/opencontainers/go-digest"
)

// A ClaimStore keeps what refs meant by the word of others.
type ClaimStore interface {
	Claims(ctx context.Context, ref Ref) ([]Claim, error)

	// AddClaims commits e and the claims that came by it. A claim that is known with
	// another end has that from then on.
	AddClaims(ctx context.Context, e Event, ref Ref, claims []Claim) (int64, error)
}

// Backfill records what upstream says that a ref meant in the past: as its word, next
// to what was observed, with the digest of all that it said in the log. It returns how
// many claims were not known. If none is new, nothing is recorded.
func (l *Ledger) Backfill(ctx context.Context, store ClaimStore, ref Ref, source string, claims []Claim) (added int, err error) {
	known, err := store.Claims(ctx, ref)
	if err != nil {
		return 0, fmt.Errorf("read what is said of %s: %w", ref, err)
	}
	for _, c := range claims {
		if !says(known, c) {
			added++
		}
	}
	if added == 0 {
		return 0, nil
	}
	said, err := json.Marshal(claims)
	if err != nil {
		return 0, fmt.Errorf("encode what is said of %s: %w", ref, err)
	}
	e := l.about(ref, &Operator{Action: "backfill", Digest: digest.FromBytes(said), Old: source, New: strconv.Itoa(len(claims))})
	return added, l.commit(ctx, e, func(ctx context.Context) (int64, error) { return store.AddClaims(ctx, e, ref, claims) })
}

// says tells whether a claim is among those known.
func says(known []Claim, c Claim) bool {
	for _, k := range known {
		same := k.Basis == c.Basis && k.Served == c.Served && k.Source == c.Source && k.Digest == c.Digest && k.Since.Equal(c.Since)
		if same && (k.Until == nil) == (c.Until == nil) && (c.Until == nil || k.Until.Equal(*c.Until)) {
			return true
		}
	}
	return false
}
