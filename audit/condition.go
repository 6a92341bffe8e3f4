package audit

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/rs/zerolog"
)

// The conditions of an upstream. They are not entries of the log: they are
// about the upstream's health, not about what a tag means.
const (
	AccessLost = "upstream.access_lost" // it no longer lets us see what it did
	Degraded   = "upstream.degraded"    // it fails, is silent, or asks us to wait
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
	// PutCondition records that a condition began or, with Until, that it ended.
	PutCondition(ctx context.Context, c Condition) error
}

// streak is how many failures in a row are a condition: one may be chance.
const streak = 3

// Conditions follows how upstreams are doing from the questions about tags, and
// writes it down off the path of a pull.
type Conditions struct {
	store ConditionStore
	now   func() time.Time
	log   zerolog.Logger

	mu      sync.Mutex
	failing map[string]*failing
	queue   []Condition
	wake    chan struct{} // holds one
}

type failing struct {
	kind  string
	count int
	since time.Time
	told  bool
}

// NewConditions returns conditions in a store. now is the clock, nil for
// time.Now. It starts nothing.
func NewConditions(store ConditionStore, now func() time.Time, log zerolog.Logger) *Conditions {
	if now == nil {
		now = time.Now
	}
	return &Conditions{store: store, now: now, log: log, failing: make(map[string]*failing), wake: make(chan struct{}, 1)}
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
	now := c.now().UTC().Truncate(time.Millisecond)
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.failing[upstream]
	if f != nil && f.kind != kind {
		if f.told {
			c.put(Condition{Upstream: upstream, Type: f.kind, Since: f.since, Until: &now})
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
	if f.count++; f.count >= streak && !f.told {
		f.told = true
		c.put(Condition{Upstream: upstream, Type: kind, Since: f.since, Cause: err.Error()})
	}
}

// put tells of a condition and queues it. c.mu is held.
func (c *Conditions) put(r Condition) {
	line := c.log.Warn().Str("kind", r.Type)
	if r.Until != nil {
		line = c.log.Info().Str("kind", "upstream.recovered")
	}
	line.Str("upstream", r.Upstream).Str("cause", r.Cause).Msg("condition of an upstream")
	c.queue = append(c.queue, r)
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Now returns what lasts at present, by upstream.
func (c *Conditions) Now() map[string]Condition {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make(map[string]Condition)
	for name, f := range c.failing {
		if f.told {
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
		if err := c.store.PutCondition(ctx, r); err != nil {
			c.log.Warn().Err(err).Str("upstream", r.Upstream).Msg("the condition of an upstream could not be written down yet")
			c.mu.Lock()
			c.queue = append(queue[i:], c.queue...)
			c.mu.Unlock()
			return false
		}
	}
	return true
}
