// Package notify tells others of events: at least once, from an outbox that is
// committed with the event, and never in the way of a pull.
package notify

import (
	"context"
	"time"

	"tidemark/audit"
)

// A Sink is one place that is told. Send is given the same message again until it
// returns nil; a message is known by its ID.
type Sink interface {
	// Send tells of m. What it returns holds no secret; a *Failure says more than that
	// it is to be tried again.
	Send(ctx context.Context, m Message) error
}

// A Failure is why a sink did not take a message.
type Failure struct {
	After time.Duration // the sink asked not to be told again before this, 0 if it did not
	Gone  bool          // nobody is there any more: the sink is not to be told anything again
	Err   error
}

func (f *Failure) Error() string { return f.Err.Error() }
func (f *Failure) Unwrap() error { return f.Err }

// A Message is what a sink is told at once.
type Message struct {
	ID     string // the same whenever it is sent again, and no other message's
	Origin string // of the log
	Items  []Item // at least one, oldest first
	Digest bool   // it is the digest of what was not worth a message of its own

	// Reminder counts how often it was told before: something is still open, and nobody
	// acknowledged it.
	Reminder int
	Test     bool // it never happened

	title, text string // by templates, "" for what is built in
}

// Severity is that of the most severe item.
func (m Message) Severity() audit.Severity {
	s := audit.Info
	for _, i := range m.Items {
		s = max(s, i.Event.Severity())
	}
	return s
}

// An Item is one event that a message is about.
type Item struct {
	Index   int64
	Leaf    []byte // as it is hashed
	Event   audit.Event
	Clients int // that had the digest from before, -1 if that is not known
}
