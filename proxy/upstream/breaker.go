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
	mu     sync.Mutex
	errors int       // in a row
	until  time.Time // refuses before
	cause  *Error    // what opened it, nil while closed
}

const (
	breakerFirst = 500 * time.Millisecond // after the first failure
	breakerMost  = 30 * time.Second       // doubling up to here
)

// refuses returns why the endpoint is not to be asked now, or nil. The caller
// that gets nil after a break is the probe; others wait for its outcome.
func (b *breaker) refuses() *Error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cause == nil {
		return nil
	}
	now := time.Now()
	if now.Before(b.until) {
		e := *b.cause
		e.Err = fmt.Errorf("not asked again for %v: %w", time.Until(b.until).Round(time.Millisecond), b.cause)
		if b.cause.Status != 0 {
			e.Err = fmt.Errorf("not asked again for %v", time.Until(b.until).Round(time.Millisecond))
			e.RetryAfter = max(e.RetryAfter, time.Until(b.until))
		}
		return &e
	}
	b.until = now.Add(breakerFirst) // one probe at a time
	return nil
}

func (b *breaker) failed(e *Error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.errors++
	if e.Status >= http.StatusInternalServerError && b.errors < 3 {
		return
	}
	wait := min(breakerMost, breakerFirst<<min(b.errors-1, 10))
	wait += rand.N(wait / 4) // so that many servers do not come back as one
	b.cause, b.until = e, time.Now().Add(max(wait, e.RetryAfter))
}

func (b *breaker) succeeded() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.errors, b.cause = 0, nil
}
