package audit

import (
	"context"
	"time"

	"golang.org/x/mod/sumdb/tlog"
)

// A Store keeps refs and events for a Ledger. It is shared by every goroutine
// of a process and, for a store that several processes share, by all of them.
// Package audittest holds what every implementation must do.
type Store interface {
	// State returns what is recorded of ref, or the zero State.
	State(ctx context.Context, ref Ref) (State, error)

	// Advance locks ref, calls next with what is recorded of it, and commits in
	// one transaction: the new state, the events, and the tree hashes that seal
	// them. When Advance returns nil all of it survives a power cut, and the
	// state it returns carries the index of the last event. When it returns an
	// error, what happened is all or nothing; State tells which. An error of next
	// is returned and nothing was done. Calls are serialized: events are numbered
	// without gaps in the order in which they were committed. next may be called
	// more than once.
	Advance(ctx context.Context, ref Ref, next func(Record) (State, []Event, error)) (State, error)

	// Append commits an event that is about no single ref, and returns its index.
	// The same holds for it as for Advance.
	Append(ctx context.Context, e Event) (int64, error)

	// Confirm records for each ref when its head was last confirmed, if that is
	// later than what is recorded. It need not survive a power cut at once.
	Confirm(ctx context.Context, confirmed map[Ref]time.Time) error
}

// A Memory keeps small facts that outlive a process, beside the ledger.
type Memory interface {
	// Recall returns what was remembered under key, or "".
	Recall(ctx context.Context, key string) (string, error)

	// Remember replaces it. It need not survive a power cut at once.
	Remember(ctx context.Context, key, value string) error
}

// A Log is the sealed side of a store: what a Signer signs and anyone verifies.
type Log interface {
	// Tree returns the committed tree.
	Tree(ctx context.Context) (tlog.Tree, error)

	// ReadHashes reads committed hashes (tlog.HashReader).
	tlog.HashReader

	// Checkpoint returns the last checkpoint saved, or nil.
	Checkpoint(ctx context.Context) ([]byte, error)

	// SaveCheckpoint keeps the signed checkpoint of a tree. There is at most
	// one root for each size: another one for the same size is an error.
	SaveCheckpoint(ctx context.Context, tree tlog.Tree, signed []byte, at time.Time) error
}
