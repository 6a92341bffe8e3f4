package audit

import (
	"context"
	"time"
)

// A Recipient is that a sink is to be told of an event. It is committed with the event,
// in the same transaction, and not part of the leaf.
type Recipient struct {
	Sink string
	At   time.Time // not before
}

// A Letter is an event that a sink is still to be told of.
type Letter struct {
	Index    int64
	Leaf     []byte
	Ref      Ref       // zero when it is about no single ref
	Batch    string    // the message that it is part of, "" until it was tried for the first time
	Attempts int       // that failed
	At       time.Time // not before
	Reminder int       // how often the sink was reminded of it, with this time
}

// A Delivery is what became of the letters of a message.
type Delivery struct {
	Sink  string
	Batch string
	Sent  bool      // it was acknowledged: the letters are done with
	Dead  bool      // it never will be: they are kept, and not tried again
	Again time.Time // else, when to try again
	Error string    // what the sink said, without secrets
}

// An Outbox keeps the letters of a ledger, beside it.
type Outbox interface {
	// Due returns letters of a sink that may be sent now, at most limit: those of messages
	// that were tried before first, each message together, then the others, oldest first.
	// One about a ref waits for a message about the same ref that was not taken yet.
	Due(ctx context.Context, sink string, now time.Time, limit int) ([]Letter, error)

	// NextDue is when a letter of the sink may be sent, zero for never.
	NextDue(ctx context.Context, sink string) (time.Time, error)

	// Seal makes letters one message, durably, before it is tried for the first time:
	// what is tried again after a crash is the same message.
	Seal(ctx context.Context, sink, batch string, indexes []int64) error

	// Settle records what became of a message, durably.
	Settle(ctx context.Context, d Delivery) error

	// Unheeded returns the alerts that are open and that nobody acknowledged, of which the
	// sink was not told since a time, nor is to be.
	Unheeded(ctx context.Context, sink string, before time.Time) ([]Letter, error)

	// Remind has a sink be told again of alerts, under another message than before.
	Remind(ctx context.Context, sink string, indexes []int64, now time.Time) error
}

// OutboxCount is how many letters of a sink are in a state: pending or dead.
type OutboxCount struct {
	Sink, State string
	N           int64
}
