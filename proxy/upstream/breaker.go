package upstream

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"
)

// A breaker keeps an endpoint that is in trouble from being asked again by
// every request. Silence and 429 open it at once, server errors after three in
// a row, since a single 500 often concerns a single path. While it is open,
// requests fail with what opened it; when its time is over one is let through.
type breaker struct {
	mu      sync.Mutex
	errors  int           // server errors in a row while closed
	wait    time.Duration // of the last break, doubled by the next
	until   time.Time     // refuses before
	cause   *Error        // what opened it, nil while closed
	probing bool          // one request is under way to see whether it is over
}

const (
	breakerFirst  = 500 * time.Millisecond // after the first failure
	breakerMost   = 30 * time.Second       // doubling up to here
	breakerErrors = 3                      // server errors that open it
)

// A probe is the right to find out whether a break is over. Who holds it gives it
// back to done.
type probe bool

// refuses returns why the endpoint is not to be asked now, or nil. The caller that
// gets nil after a break holds the probe; others are refused until it is done.
func (b *breaker) refuses() (*Error, probe) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cause == nil {
		return nil, false
	}
	if !b.probing && time.Until(b.until) <= 0 {
		b.probing = true
		return nil, true
	}
	return b.refusal(), false
}

// open returns why the endpoint is not to be asked now, or nil, to one who does not
// find out for others.
func (b *breaker) open() *Error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cause == nil || time.Until(b.until) <= 0 {
		return nil
	}
	return b.refusal()
}

// refusal tells what opened the breaker. b.mu is held.
func (b *breaker) refusal() *Error {
	left := time.Until(b.until)
	e := *b.cause
	if left > 0 && e.RetryAfter > 0 {
		e.RetryAfter = left
	}
	why := e.Err
	if why == nil {
		why = fmt.Errorf("%d %s", e.Status, http.StatusText(e.Status))
	}
	e.Message, e.Err = "", fmt.Errorf("not asked again for %v after: %w", max(0, left).Round(time.Millisecond), why)
	return &e
}

// done tells how a request ended: with an answer, which is nil or an error that
// is not the endpoint's trouble, or with trouble. A caller who has left says
// nothing about the endpoint, and a client that asks with its own credentials has
// a rate limit of its own.
func (b *breaker) done(p probe, left bool, e *Error, theirs bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if p {
		b.probing = false
	}
	switch {
	case left:
	case theirs && (e != nil && e.Status == http.StatusTooManyRequests || b.cause != nil && b.cause.Status == http.StatusTooManyRequests):
	case e == nil || !e.worthAnotherEndpoint():
		b.errors, b.wait, b.cause, b.probing = 0, 0, nil, false
	case b.cause != nil && !bool(p):
		// Asked before it opened: one break is not many because many were waiting.
	default:
		if b.errors++; e.Status >= http.StatusInternalServerError && b.errors < breakerErrors {
			return
		}
		b.wait = min(breakerMost, max(breakerFirst, 2*b.wait))
		jittered := b.wait + rand.N(b.wait/4) // so that many servers do not come back as one
		b.cause, b.until = e, time.Now().Add(max(jittered, e.RetryAfter))
	}
}
