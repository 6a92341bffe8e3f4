package audit

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"maps"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/rs/zerolog"
)

// A Lister reads everything that a snapshot commits to.
type Lister interface {
	// EachTag yields the refs that q selects, in order.
	EachTag(ctx context.Context, q TagQuery) iter.Seq2[Tag, error]

	// EachExposure yields who resolved and fetched what, in order.
	EachExposure(ctx context.Context) iter.Seq2[Exposure, error]
}

// Snapshots commits once a day to what every ref means, so that the state of the
// ledger, which is derived from the log, cannot be changed unnoticed either.
type Snapshots struct {
	ledger *Ledger
	lister Lister
	memory Memory
	keep   func(ctx context.Context, listing []byte) (digest.Digest, error)
	log    zerolog.Logger
}

// NewSnapshots returns the snapshots of a ledger. keep stores a listing as
// content. It starts nothing.
func NewSnapshots(l *Ledger, lister Lister, m Memory, keep func(context.Context, []byte) (digest.Digest, error), log zerolog.Logger) *Snapshots {
	return &Snapshots{l, lister, m, keep, log}
}

const (
	snapshotEvery = 24 * time.Hour
	snapshotLook  = time.Hour // whether it is time
	memoryShot    = "snapshot"
)

// Run takes snapshots until ctx ends.
func (s *Snapshots) Run(ctx context.Context) error {
	tick := time.NewTicker(snapshotLook)
	defer tick.Stop()
	for {
		if err := s.Look(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn().Err(err).Msg("what the tags mean could not be committed to; it is tried again in an hour")
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// Look takes a snapshot if the last one is a day old. Of an empty ledger there
// is none.
func (s *Snapshots) Look(ctx context.Context) error {
	last, err := s.memory.Recall(ctx, memoryShot)
	if err != nil {
		return err
	}
	now := s.ledger.now()
	at, err := time.Parse(time.RFC3339, last)
	if err == nil && now.Sub(at) < snapshotEvery {
		return nil
	}
	if err == nil { // the first one waits for a day, too
		if err := s.Take(ctx); err != nil {
			return err
		}
	}
	return s.memory.Remember(ctx, memoryShot, now.UTC().Format(time.RFC3339))
}

// A snapshotLine is a ref in a listing.
type snapshotLine struct {
	Ref           string        `json:"ref"`
	Head          digest.Digest `json:"head"`
	Served        digest.Digest `json:"served"`
	LastConfirmed time.Time     `json:"last_confirmed"`
	Deleted       *time.Time    `json:"deleted,omitempty"`
}

// Take commits to what every ref means now.
func (s *Snapshots) Take(ctx context.Context) error {
	var listing bytes.Buffer
	enc := json.NewEncoder(&listing)
	refs := int64(0)
	for t, err := range s.lister.EachTag(ctx, TagQuery{}) {
		if err != nil {
			return fmt.Errorf("list the tags: %w", err)
		}
		line := snapshotLine{Ref: t.Ref.String(), Head: t.State.Head, Served: t.State.Served, LastConfirmed: t.State.LastConfirmed}
		if !t.State.Deleted.IsZero() {
			line.Deleted = &t.State.Deleted
		}
		if err := enc.Encode(line); err != nil {
			return err
		}
		refs++
	}
	if refs == 0 {
		return nil
	}
	pulled := digest.SHA256.Digester()
	enc = json.NewEncoder(pulled.Hash())
	for x, err := range s.lister.EachExposure(ctx) {
		if err != nil {
			return fmt.Errorf("list the exposures: %w", err)
		}
		if err := enc.Encode(x); err != nil {
			return err
		}
	}
	kept, err := s.keep(ctx, listing.Bytes())
	if err != nil {
		return fmt.Errorf("keep the listing: %w", err)
	}
	return s.ledger.append(ctx, Event{Type: Snapshot, Snapshot: &Commitment{
		Digest: kept, Size: int64(listing.Len()), Refs: refs, Exposures: pulled.Digest(),
	}})
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
