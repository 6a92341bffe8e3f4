package audit

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/rs/zerolog"
)

// The conditions of an upstream. They are not entries of the log: they are
// about the upstream's health, not about what a tag means.
const (
	AccessLost = "upstream.access_lost" // it no longer lets us see what it did
	Degraded   = "upstream.degraded"    // it fails, is silent, or asks us to wait
	Recovered  = "upstream.recovered"   // either of them is over
)

// A Trouble is an error of an upstream that says something about its condition.
type Trouble interface {
	error

	// Condition is AccessLost, Degraded, or "" for an answer like any other.
	Condition() string
}

// A Condition is a time in which an upstream was in trouble.
type Condition struct {
	Upstream string     `json:"upstream"`
	Type     string     `json:"type"`
	Since    time.Time  `json:"since"`
	Until    *time.Time `json:"until,omitempty"` // nil while it lasts
	Cause    string     `json:"cause"`
}

// A ConditionStore keeps conditions.
type ConditionStore interface {
	// PutCondition records that a condition began or, with Until, that it ended, and in the
	// same transaction whom to tell of it: the recipients of told.
	PutCondition(ctx context.Context, c Condition, told Event) error
}

// streak is how many failures in a row are a condition: one may be chance.
const streak = 3

// Conditions follows how upstreams are doing from the questions about tags, and
// writes it down off the path of a pull.
type Conditions struct {
	o ConditionOptions

	mu      sync.Mutex
	failing map[string]*failing
	queue   []change
	wake    chan struct{} // holds one
}

// ConditionOptions configure Conditions. Store is required.
type ConditionOptions struct {
	Store ConditionStore

	// Notify, if set, says who is to be told of a condition; Told is called when that was
	// written down.
	Notify func(Event) []Recipient
	Told   func()

	// Open are the conditions that a process before left open.
	Open []Condition

	Now func() time.Time // the clock, nil for time.Now
	Log zerolog.Logger
}

// A change is that a condition began or ended, and what is told of it.
type change struct {
	Condition
	told Event
}

type failing struct {
	kind  string
	count int
	since time.Time
	told  uuid.UUID // by which event that it began, zero when it was not
}

// NewConditions returns conditions. It starts nothing.
func NewConditions(o ConditionOptions) *Conditions {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Notify == nil {
		o.Notify = func(Event) []Recipient { return nil }
	}
	if o.Told == nil {
		o.Told = func() {}
	}
	c := &Conditions{o: o, failing: make(map[string]*failing), wake: make(chan struct{}, 1)}
	for _, open := range o.Open {
		if open.Until == nil {
			c.failing[open.Upstream] = &failing{kind: open.Type, count: streak, since: open.Since, told: newID()}
		}
	}
	return c
}

// Answered is told how a question about a tag ended.
func (c *Conditions) Answered(upstream string, err error) {
	kind := ""
	var t Trouble
	if errors.As(err, &t) {
		kind = t.Condition()
	} else if err != nil {
		return // ours, or the client's
	}
	now := c.o.Now().UTC().Truncate(time.Millisecond)
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.failing[upstream]
	if f != nil && f.kind != kind {
		if f.told != uuid.Nil {
			c.put(Condition{Upstream: upstream, Type: f.kind, Since: f.since, Until: &now}, f.told)
		}
		delete(c.failing, upstream)
		f = nil
	}
	if kind == "" {
		return
	}
	if f == nil {
		f = &failing{kind: kind, since: now}
		c.failing[upstream] = f
	}
	if f.count++; f.count >= streak && f.told == uuid.Nil {
		f.told = c.put(Condition{Upstream: upstream, Type: kind, Since: f.since, Cause: err.Error()}, uuid.Nil)
	}
}

// put tells of a condition and queues it, and returns as what event. With one that began
// comes the event that told so: who was not told of that need not be told of either. c.mu
// is held.
func (c *Conditions) put(r Condition, began uuid.UUID) uuid.UUID {
	e := Event{ID: newID(), Type: Type(r.Type), Time: c.o.Now().UTC().Truncate(time.Millisecond), Condition: &r, Reason: r.Cause, Flapped: began}
	line := c.o.Log.Warn().Str("kind", r.Type)
	if r.Until != nil {
		e.Type = Recovered
		line = c.o.Log.Info().Str("kind", Recovered)
	}
	e.Recipients = c.o.Notify(e)
	line.Str("upstream", r.Upstream).Str("cause", r.Cause).Msg("condition of an upstream")
	c.queue = append(c.queue, change{r, e})
	select {
	case c.wake <- struct{}{}:
	default:
	}
	return e.ID
}

// Now returns what lasts at present, by upstream.
func (c *Conditions) Now() map[string]Condition {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make(map[string]Condition)
	for name, f := range c.failing {
		if f.told != uuid.Nil {
			out[name] = Condition{Upstream: name, Type: f.kind, Since: f.since}
		}
	}
	return out
}

// conditionRetry is how long what could not be written down waits.
const conditionRetry = time.Minute

// Run writes conditions down until ctx ends, and those that are left then.
func (c *Conditions) Run(ctx context.Context) error {
	var again <-chan time.Time
	for {
		select {
		case <-c.wake:
		case <-again:
		case <-ctx.Done():
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			c.flush(ctx)
			return nil
		}
		if again = nil; !c.flush(ctx) {
			again = time.After(conditionRetry)
		}
	}
}

// flush writes down what is queued, and tells whether all of it could be. What
// could not stays at the head of the queue.
func (c *Conditions) flush(ctx context.Context) bool {
	c.mu.Lock()
	queue := c.queue
	c.queue = nil
	c.mu.Unlock()
	for i, r := range queue {
		if err := c.o.Store.PutCondition(ctx, r.Condition, r.told); err != nil {
			c.o.Log.Warn().Err(err).Str("upstream", r.Upstream).Msg("the condition of an upstream could not be written down yet")
			c.mu.Lock()
			c.queue = append(queue[i:], c.queue...)
			c.mu.Unlock()
			return false
		}
		c.o.Told()
	}
	return true
}
